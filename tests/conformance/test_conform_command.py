"""`nsa conform` and `nsa demo`: their exit codes are what CI sees of the suite."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from backends import Fake, registered

from nsa_neuron import cli, conformance, demo
from nsa_neuron.cli import main
from nsa_neuron.conformance import Outcome, Place, Report, Status
from nsa_neuron.registry import REGISTRY, Target

CASES = ("--op", "gated_sum", "--tag", "edge", "--dtype", "fp32")


@pytest.fixture
def read(capsys: pytest.CaptureFixture[str]):
    """Runs `nsa conform` and holds it to an exit code; returns its JSON."""

    def run(code: int, *words: str):
        assert main(["conform", *words, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return run


def wrong_on_one_token(results, values):
    """Wrong in one case of many, by more than any budget."""
    return tuple(x + 1 if x.shape[1] == 1 else x for x in results)


def test_one_failed_case_of_many_is_exit_code_1_in_text_and_json(read, capsys) -> None:
    with registered(Fake(wrong_on_one_token)):
        report = read(cli.FAILED, "--backend", "fake", *CASES)
        assert main(["conform", "--backend", "fake", *CASES]) == cli.FAILED
    statuses = {row["status"] for row in report["rows"]}
    assert statuses == {"pass", "fail"} and report["ok"] is False
    assert [cell["status"] for cell in report["cells"]] == ["fail"]
    out = capsys.readouterr().out
    failed = sum(row["status"] == "fail" for row in report["rows"])
    assert f"\n{failed} of {len(report['rows'])} cases fail" in out
    assert "FAIL gated_sum on fake:hw fp32, case one_token: o: largest error" in out


def test_one_backend_that_fails_beside_one_that_passes_is_exit_code_1(read) -> None:
    with registered(Fake(wrong_on_one_token)):
        report = read(cli.FAILED, "--backend", "reference", "--backend", "fake", *CASES)
    cells = {cell["target"]: cell["status"] for cell in report["cells"]}
    assert cells == {"reference:eager": "pass", "fake:hw": "fail"}


def gap_file(folder, case: str) -> str:
    row = {"op": "gated_sum", "mode": "hw", "dtype": "*", "case": case, "reason": "off by one"}
    (folder / "gaps.json").write_text(json.dumps({"gaps": [row]}))
    return f"fake={folder / 'gaps.json'}"


def test_a_known_gap_is_exit_code_0_and_one_that_closed_is_1(read, tmp_path) -> None:
    exact = [*CASES, "--known-gaps", gap_file(tmp_path, "one_token*")]
    with registered(Fake(wrong_on_one_token)):
        words = ["--backend", "fake", *exact, "--case", "one_token"]
        assert read(0, *words)["cells"][0]["status"] == "known gap"
    with registered(Fake()):
        report = read(cli.FAILED, *words)
    assert "remove it in" in report["cells"][0]["summary"]


def test_a_gap_that_covers_too_much_is_exit_code_1(read, tmp_path) -> None:
    with registered(Fake(wrong_on_one_token)):
        words = ["--backend", "fake", *CASES, "--known-gaps", gap_file(tmp_path, "*")]
        report = read(cli.FAILED, *words)
    assert {row["status"] for row in report["rows"]} == {"known gap", "fail"}


def test_a_refused_case_is_no_failure(read) -> None:
    with registered(Fake(only=("attention",))):
        words = ["--backend", "fake", "--backend", "reference", *CASES]
        assert read(0, *words)["cells"][0]["status"] == "unsupported"


@pytest.mark.parametrize("words", [[], ["--json"]])
@pytest.mark.parametrize(("status", "code"), [(Status.PASS, 0), (Status.FAIL, 1)])
def test_the_demo_fails_where_its_matrix_does(monkeypatch, capsys, status, code, words) -> None:
    target = Target("reference", "eager")
    done = Outcome("attention", str(target), "float32", "a", Status.PASS)
    last = Outcome("attention", str(target), "float32", "b", status)
    made = Report((Place(target, "", "cpu"),), [done, last])
    monkeypatch.setattr(conformance, "run", lambda **_: made)
    found = SimpleNamespace(to_json=dict, parameters=1)
    monkeypatch.setattr(demo, "run", lambda *_: found)
    for form in ("report", "selection_report"):
        monkeypatch.setattr(demo, form, lambda result: "")
    assert demo.main(words) == code


def test_nothing_fails_is_exit_code_0(read) -> None:
    report = read(0, "--backend", "reference", "--op", "gated_sum", "--tag", "smoke")
    assert report["ok"]
    assert {cell["dtype"] for cell in report["cells"]} == {
        "float32", "float16", "bfloat16", "float64",
    }  # fmt: skip


def test_it_prints_the_matrix_and_writes_a_page(tmp_path, capsys) -> None:
    page = tmp_path / "report.html"
    words = ["conform", "--backend", "reference", "--op", "gated_sum", "--case", "one_token"]
    assert main([*words, "--dtype", "bf16", "--html", str(page), "--verbose"]) == 0
    out = capsys.readouterr().out
    assert "reference:eager" in out and "✓" in out and "0 of 2 cases fail" in out
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    assert "A selection: backend reference; op gated_sum; case one_token; dtype bfloat16." in text


@pytest.mark.parametrize(
    "words",
    [
        ["conform", "--backend", "reference", "--op", "gated_sum", "--case", "no_such_case"],
        ["conform", "--backend", "neuron:hw", "--op", "gated_sum", "--case", "one_token"],
    ],
)
def test_having_run_nothing_is_no_success(words, capsys) -> None:
    if words[2] == "neuron:hw" and not REGISTRY.get("neuron").modes()["hw"]:
        pytest.skip("a Trainium2 is here")
    assert main(words) == cli.UNUSABLE
    out, err = capsys.readouterr()
    assert "no_such_case" in err or "nothing could be run" in out
