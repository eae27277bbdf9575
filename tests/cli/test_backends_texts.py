"""What `nsa explain` and `nsa backends` print, from verdicts that are made up."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch

import nsa_neuron
from nsa_neuron.cli import backends, coverage, explain, main, shared
from nsa_neuron.conformance.targets import Place
from nsa_neuron.registry import Supported, Target, Unsupported, requesting


def lines(text: str) -> list[str]:
    return text.strip("\n").split("\n")


def place(name: str, hindrance: str = "", device: str = "cpu") -> Place:
    return Place(Target(*name.split(":")), hindrance, device)


def verdict(target: str, **facts: Any) -> dict[str, Any]:
    usual = {"device": "cpu", "hindrance": "", "supported": True, "chosen": False}
    return {**usual, "target": target, **facts}


def test_an_explanation_says_of_each_target_what_it_would_do(monkeypatch) -> None:
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    bound = shared.bind(nsa_neuron.ops.get("gated_sum"), {"S": 4}, {}, torch.float16)
    refusal = {"supported": False, "rule": "dtype", "reason": "none of them"}
    rows = [
        verdict("a:x", chosen=True), verdict("b:x"), verdict("c:x", hindrance="no GPU"),
        verdict("d:x", **refusal), verdict("e:x", **refusal, hindrance="no GPU"),
    ]  # fmt: skip
    assert lines(explain._text(bound, rows)) == [
        "gated_sum(float16, o_cmp[1, 4, 16, 128], o_slc[1, 4, 16, 128], o_win[1, 4, 16, 128], "
        "gates[1, 4, 16, 3])",
        "tensors on  target  verdict",
        "----------  ------  ------------------------------------------",
        "\x1b[32mcpu         a:x     chosen\x1b[0m",
        "cpu         b:x     would take it if asked",
        "cpu         c:x     would take it, but cannot run here: no GPU",
        "\x1b[90mcpu         d:x     refuses by rule 'dtype': none of them\x1b[0m",
        "\x1b[90mcpu         e:x     refuses by rule 'dtype': none of them\x1b[0m",
    ]


def test_verdicts_are_those_of_the_backend_in_its_mode(monkeypatch) -> None:
    asked = []

    def supports(bound: Any, mode: str) -> Any:
        asked.append((bound, mode))
        return {"yes": Supported(), "plan": Supported(("a", 1))}.get(
            mode, Unsupported("dtype", "none")
        )

    monkeypatch.setattr(explain.REGISTRY, "get", lambda name: SimpleNamespace(supports=supports))
    rows = [explain.verdict("call", place(f"b:{mode}", "why")) for mode in ("yes", "plan", "no")]
    assert asked == [("call", mode) for mode in ("yes", "plan", "no")]
    same = {"hindrance": "why"}
    yes = {"supported": True, "rule": "", "reason": ""}
    assert rows == [
        {"target": "b:yes", **same, **yes, "plan": ""},
        {"target": "b:plan", **same, **yes, "plan": "('a', 1)"},
        {"target": "b:no", **same, "supported": False, "rule": "dtype", "reason": "none"},
    ]
    assert explain.verdict("call", place("b:?", "broken")) == {
        "target": "b:?", "hindrance": "broken", "supported": False, "rule": "available",
        "reason": "broken",
    }  # fmt: skip
    assert len(asked) == 3, "a backend that cannot be imported is not asked"


def test_the_automatic_choice_asks_in_its_own_order_for_each_type_of_device(monkeypatch) -> None:
    monkeypatch.setattr(explain, "AUTOMATIC", {"cpu": ("b:x", "gone:x", "a:x"), "cuda": ("c:x",)})
    monkeypatch.setattr(explain, "ANYWHERE", ("a:x",))
    places = [place("a:x"), place("b:x"), place("c:x")]
    found = [[str(p.target) for p in explain._automatic(places, d)] for d in
             ("cpu", "cuda:1", "cuda", "xpu")]  # fmt: skip
    assert found == [["b:x", "a:x"], ["c:x"], ["c:x"], ["a:x"]]


def test_everyone_is_asked_on_every_device_the_automatic_ones_first(capsys) -> None:
    main(["explain", "gated_sum", "--json"])
    rows = json.loads(capsys.readouterr().out)["verdicts"]
    by_device: dict[str, list[str]] = {}
    for row in rows:
        by_device.setdefault(row["device"], []).append(row["target"])
    assert list(by_device) == ["cpu", "cuda", "neuron"]
    assert len({frozenset(x) for x in by_device.values()}) == 1
    for device, targets in by_device.items():
        order = [t for t in explain.AUTOMATIC[device] if t in targets]
        assert targets[: len(order)] == order and len(set(targets)) == len(targets)
        chosen = [r["target"] for r in rows if r["device"] == device and r["chosen"]]
        assert set(chosen) <= set(order), "who is not asked by itself is never chosen"
    with requesting("reference:eager"):
        assert main(["explain", "gated_sum"]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[-1] == "NSA_BACKEND=reference:eager: nobody else is asked"
        assert main(["explain", "gated_sum", "--policy", "cpu:torch"]) == 0
    assert "nobody else" not in capsys.readouterr().out


def test_a_backend_s_row_is_its_target_s() -> None:
    column = [coverage.Covered("attention", Supported(), None)]
    there, absent = place("a:x"), place("b:y", "no GPU", "cuda")
    assert backends._row(there, {"a:x": column}, "a:x") == {
        "backend": "a", "mode": "x", "available": True, "reason": "", "device": "cpu",
        "requested": True, "kernels": {"attention": "fwd"},
    }  # fmt: skip
    assert backends._row(absent, {"a:x": column}, None) == {
        "backend": "b", "mode": "y", "available": False, "reason": "no GPU", "device": "cuda",
        "requested": False, "kernels": {},
    }  # fmt: skip


def test_the_table_of_backends_is_coloured_by_who_can_run(monkeypatch, capsys) -> None:
    monkeypatch.setattr(backends, "find_targets", lambda: [place("a:x"), place("b:y", "no GPU")])
    monkeypatch.setattr(coverage, "covered", lambda places: {})
    monkeypatch.setattr(coverage, "rows", lambda cover: [["attention"]])
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["backends"]) == 0
    assert lines(capsys.readouterr().out) == [
        "target  here       tensors on  requested",
        "------  ---------  ----------  ---------",
        "\x1b[32ma:x     available  cpu\x1b[0m",
        "\x1b[90mb:y     no GPU     cpu\x1b[0m",
        "",
        "kernels",
        "op",
        "---------",
        "attention",
    ]


def test_what_is_public_is_no_backward_op_and_nothing_that_autograd_runs() -> None:
    names = [spec.name for spec in coverage.public()]
    assert names == [n for n in names if not n.endswith(("_backward", "_forward"))]
    every = {spec.name for spec in nsa_neuron.ops.OPS}
    assert {n for n in every if not n.endswith(("_backward", "_forward"))} == set(names)


def test_a_column_per_target_a_row_per_op(monkeypatch) -> None:
    specs = [SimpleNamespace(name="one"), SimpleNamespace(name="two")]
    monkeypatch.setattr(coverage, "public", lambda: specs)
    no = Unsupported("kernel", "none")
    cover = {
        "cpu:x": [coverage.Covered("one", Supported(), Supported()),
                  coverage.Covered("two", no, None)],
        "cuda:hw": [coverage.Covered("one", Unsupported("dtype", ""), None),
                    coverage.Covered("two", Supported(), None)],
    }  # fmt: skip
    assert coverage.rows(cover) == [["one", "fwd, bwd", "no: dtype"], ["two", "no kernel", "fwd"]]
    asked = []
    found = [place("cuda:sim"), place("cpu:x"), place("cuda:hw")]
    monkeypatch.setattr(coverage, "find_targets", lambda order: found)
    monkeypatch.setattr(coverage, "covered", lambda places: asked.extend(places) or cover)
    assert lines(coverage.markdown()) == [
        "| | cpu:x | cuda:hw (H200) |", "|---|---|---|", "| `one` | fwd, bwd | no path yet |",
        "| `two` | no kernel | not run |",
    ]  # fmt: skip
    assert [str(p.target) for p in asked] == ["cpu:x", "cuda:hw", "cuda:sim"]
    mark = coverage.MARK
    page = f"before\n{mark}\nold\n{mark}\nafter {mark} more"
    new = f"before\n{mark}\n{coverage.markdown()}\n{mark}\nafter {mark} more"
    assert coverage.rewrite(page) == new


def test_verdicts_of_the_table_are_on_a_typical_call_of_bfloat16(monkeypatch) -> None:
    asked = []

    def supports(bound: Any, mode: str) -> Any:
        asked.append((bound.spec.name, str(bound.device), str(bound.dtype), mode))
        return Supported()

    monkeypatch.setattr(coverage.REGISTRY, "get", lambda name: SimpleNamespace(supports=supports))
    found = coverage.covered([place("a:x", device="cuda"), place("b:?", "broken")])
    assert list(found) == ["a:x"]
    assert {(device, dtype, mode) for _, device, dtype, mode in asked} == {
        ("cuda", "torch.bfloat16", "x")
    }
    assert {n for n, *_ in asked} >= {"attention", "attention_backward", "decode"}
    by_op = {each.op: each.text() for each in found["a:x"]}
    assert by_op["attention"] == "fwd, bwd" and by_op["decode"] == "fwd"
