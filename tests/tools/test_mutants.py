"""Planted faults match the code as it is, and the runner tells what is caught from what is not."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("tomllib")

from tools.mutants.faults import Fault, StaleFault, load, stale
from tools.mutants.runner import Runner
from tools.mutants.score import Outcome, shares, table

ROOT = Path(__file__).parents[2]
WINGS = {
    "conformance", "cost", "cpu", "distributed", "neuron", "nn", "profiler", "reference",
    "registry", "simulator", "triton",
}  # fmt: skip


def test_every_fault_stands_once_in_its_file_and_names_tests_that_exist() -> None:
    faults = load()
    problems = stale(faults, ROOT)
    assert not problems, "\n".join(problems)
    assert {fault.wing for fault in faults} == WINGS
    assert len(faults) >= 200
    assert all(fault.tests and fault.why for fault in faults)
    assert all(len(fault.harmless) > 40 for fault in faults if fault.harmless), "a proof, please"


def test_the_documents_table_counts_what_there_is() -> None:
    rows = re.findall(r"^\| (\w+) \| (\d+) \|$", (ROOT / "docs/testing.md").read_text(), re.M)
    counts = Counter(fault.wing for fault in load())
    assert {wing: int(count) for wing, count in rows} == counts


def test_no_fault_is_planted_in_tests_or_tools() -> None:
    for fault in load():
        assert fault.file.startswith(("nsa_neuron/", "cuda_kernels/", "nki_kernels/")), fault


SUM = """
def total(xs):
    n = 0
    for x in xs:
        n += x
    return n
"""
TESTS = """
import os, subprocess, sys
from summing import total

def test_total(): assert total([1, 2, 3]) == 6
def test_nothing(): assert True
def test_broken(): assert False
def test_stuck():
    while total([1]) != 1: pass
def test_dies():
    if total([1]) != 1: os.abort()
def test_earlier(): sys.earlier = True
def test_later(): assert not hasattr(sys, "earlier")
def test_leaves():
    left = subprocess.Popen(["sleep", "1000"])
    open("left", "w").write(str(left.pid))
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # A dozen starts of pytest, each of which would load plugins that nothing here needs.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    root = tmp_path / "project"
    (root / "summing").mkdir(parents=True)
    (root / "summing" / "__init__.py").write_text(SUM)
    (root / "test_sum.py").write_text(TESTS)
    (root / "ignored.txt").write_text("")
    (root / ".gitignore").write_text("ignored.txt\n")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return root


def fault(tests: str, old: str = "n += x", new: str = "n -= x", **more: str) -> Fault:
    line = f"test_sum.py -k {tests}"
    return Fault("wing", tests, "summing/__init__.py", old, new, (line,), (), "why", **more)


def run(project: Path, *faults: Fault, limit: int = 20, workers: int = 1) -> list[Outcome]:
    return Runner(project, project.parent / "work", limit).run(list(faults), workers)


def test_what_tests_notice_is_caught_and_what_they_do_not_survives(project: Path) -> None:
    found = run(project, fault("total"), fault("nothing"), fault("broken"), fault("dies"))
    assert [o.status for o in found] == ["caught", "survived", "undecided", "caught"]
    assert "test_total" in found[0].detail and "why" in found[1].detail
    assert "without it, pytest" in found[2].detail and "SIGABRT" in found[3].detail


def test_tests_that_select_nothing_decide_nothing(project: Path) -> None:
    assert run(project, fault("absent"))[0].status == "undecided"


def test_tests_that_fail_after_others_anyway_decide_nothing(project: Path) -> None:
    assert run(project, fault("'earlier or later'"))[0].status == "undecided"


def test_no_process_is_left_behind(project: Path) -> None:
    run(project, fault("leaves"))
    left = Path("/proc", (project.parent / "work" / "copy0" / "left").read_text())
    for _ in range(100):  # the system needs a moment
        try:
            state = (left / "stat").read_text().split()[2]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":  # dead, and nobody asked yet
            return
        time.sleep(0.05)
    pytest.fail("it still runs")


def test_nothing_of_the_project_is_imported_before_the_fault_is_there(project: Path) -> None:
    (project / "test_sum.py").write_text(
        "from pathlib import Path\nimport sys\nwarm = set(sys.modules)\nimport summing\n"
        "def test_total():\n"
        "    assert 'fractions' in warm and 'summing' not in warm\n"
        "    assert Path(summing.__file__).is_relative_to(Path.cwd())\n"
    )
    runner = Runner(project, project.parent / "work", 20, warm=("fractions", "not_installed"))
    assert runner.run([fault("total")], 1)[0].status == "survived"


def test_what_noticed_the_last_time_is_tried_first(project: Path) -> None:
    everything = Fault(**{**vars(fault("total")), "tests": ("test_sum.py",)})
    assert "test_total" in run(project, everything)[0].detail
    (project / "test_sum.py").write_text("def test_before(): assert False" + TESTS)
    assert "test_total" in run(project, everything)[0].detail
    (project / "test_sum.py").write_text(TESTS.replace("test_total", "test_renamed"))
    assert "test_renamed" in run(project, everything)[0].detail


def test_a_fault_that_never_ends_is_caught_by_its_cpu_time(project: Path) -> None:
    (outcome,) = run(project, fault("stuck"), limit=2)
    assert outcome.status == "caught" and "hit the limit of 2 s" in outcome.detail


def test_a_fault_that_cannot_be_imported_is_caught(project: Path) -> None:
    assert run(project, fault("total", new="n +/ x"))[0].status == "caught"


def test_the_project_itself_and_what_git_ignores_stay_as_they_are(project: Path) -> None:
    run(project, fault("total"), fault("nothing"), workers=2)
    assert (project / "summing" / "__init__.py").read_text() == SUM
    for copy in (project.parent / "work").glob("copy*"):
        assert (copy / "summing" / "__init__.py").read_text() == SUM
        assert not (copy / "ignored.txt").exists()


def test_known_outcomes_are_not_run_again_until_something_changes(project: Path) -> None:
    first = run(project, fault("total"))
    (project.parent / "work" / "outcomes.jsonl").write_text(
        (project.parent / "work" / "outcomes.jsonl").read_text().replace("test_total", "kept")
    )
    assert "kept" in run(project, fault("total"))[0].detail
    assert first[0].status == "caught"
    (project / "test_sum.py").write_text(TESTS.replace("== 6", "in (6, -6)"))
    assert run(project, fault("total"))[0].status == "survived"


def test_a_wings_own_tests_are_the_last_word_if_asked(project: Path) -> None:
    narrow = fault("nothing")
    wide = Fault(**{**vars(narrow), "wide": ("test_sum.py -k total",)})
    for asked, status in ((False, "survived"), (True, "caught")):
        runner = Runner(project, project.parent / "work", 20, wide=asked)
        assert runner.run([wide], 1)[0].status == status


def test_what_is_harmless_is_told_and_not_run(project: Path) -> None:
    (outcome,) = run(project, fault("nothing", harmless="the same sum"))
    assert (outcome.status, outcome.detail) == ("harmless", "the same sum")


@pytest.mark.parametrize("old", ["n *= x", "n"])
def test_texts_that_stand_there_never_or_twice_are_stale(project: Path, old: str) -> None:
    with pytest.raises(StaleFault, match="not once"):
        fault("total", old).planted(SUM)
    assert stale([fault("total", old)], project)
    assert not stale([fault("total")], project)


def test_tests_that_do_not_exist_are_stale(project: Path) -> None:
    lost = Fault(**{**vars(fault("total")), "tests": ("test_gone.py",)})
    assert stale([lost], project) == ["wing/total: there is no test_gone.py"]


ROW = '[[fault]]\nname = "a"\nfile = "f"\nold = "x"\nnew = "{new}"\ntests = ["t"]\n'


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (ROW.format(new="y"), "must have"),
        (ROW.format(new="y") + 'why = "w"\ntypo = 1\n', "must have"),
        (ROW.format(new="x") + 'why = "w"\n', "changes nothing"),
        (2 * (ROW.format(new="y") + 'why = "w"\n'), "named w/a"),
    ],
)
def test_faults_that_are_not_well_formed_are_refused(tmp_path: Path, rows: str, said: str) -> None:
    (tmp_path / "w.toml").write_text('wing = "w"\ntests = []\n' + rows)
    with pytest.raises(StaleFault, match=said):
        load(tmp_path)


def test_the_score_counts_what_is_not_harmless_and_undecided_is_not_caught() -> None:
    statuses = ["caught"] * 18 + ["survived", "undecided", "harmless"]
    outcomes = [Outcome("a", str(i), s, f"detail {i}") for i, s in enumerate(statuses)]
    outcomes.append(Outcome("b", "x", "caught"))
    assert shares(outcomes) == {"a": 0.9, "b": 1.0}
    lines = table(outcomes).splitlines()
    assert lines[1].split() == ["a", "21", "1", "18", "1", "1", "90%"]
    assert lines[3].split() == ["all", "22", "1", "19", "1", "1", "90%"]
    assert "survived a/18: detail 18" in lines and "undecided a/19: detail 19" in lines


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.mutants", *words], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command_lists_faults_and_refuses_unknown_wings() -> None:
    shown = command("--show", "--wing", "conformance")
    assert shown.returncode == 0 and "conformance/budget-factor" in shown.stdout
    refused = command("--wing", "kitchen")
    assert refused.returncode == 2 and "no wing 'kitchen'" in refused.stderr
