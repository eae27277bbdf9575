"""Backends against each other, earlier reports on the page, cases by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nsa_neuron import conformance
from nsa_neuron.cli import main
from nsa_neuron.conformance import history, html, text
from nsa_neuron.conformance.between import compare, worst_of_pairs
from nsa_neuron.conformance.problems import Problem, solve
from nsa_neuron.ops import get

if TYPE_CHECKING:
    from pathlib import Path

PROBLEM = Problem(get("sliding_window_attention"), "one_token", torch.float32)
SELECTION = Problem(get("select_blocks"), "several_tiles", torch.float32)


def test_equal_results_are_not_apart_and_others_by_their_largest_difference() -> None:
    solution = solve(PROBLEM)
    o, lse = solution.eager
    (same,) = compare(PROBLEM, solution, {"a": (o, lse), "b": (o.clone(), lse)})
    assert same.difference == 0 and same.share == 0
    (moved,) = compare(PROBLEM, solution, {"a": (o, lse), "b": (o + 0.5, lse)})
    assert (moved.one, moved.other, moved.result) == ("a", "b", "o")
    assert moved.difference == pytest.approx(0.5) and moved.share > 1000
    judge = get("sliding_window_attention").compare["o"]
    one_target_may = judge(o, solution.oracle[0], o, solution.inputs).budget
    assert moved.budget == pytest.approx(2 * one_target_may)
    nan = compare(PROBLEM, solution, {"a": (o * float("nan"), lse), "b": (o, lse)})[0]
    assert nan.difference == float("inf")


def test_three_targets_are_three_pairs() -> None:
    solution = solve(PROBLEM)
    found = compare(PROBLEM, solution, dict.fromkeys("abc", solution.eager))
    assert [(a.one, a.other) for a in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert worst_of_pairs([*found, *found]) == found
    near, far = (replace(found[0], difference=x, budget=1.0) for x in (0.25, 0.5))
    assert worst_of_pairs([near, far, found[1]]) == [far, found[1]]
    assert worst_of_pairs([far, near]) == [far]


def test_selections_that_differ_are_apart_by_score_mass() -> None:
    solution = solve(SELECTION)
    (ids,) = solution.eager
    changed = ids.clone()
    row = (ids >= 0).all(-1).nonzero()[-1]  # a row with something to choose
    free = sorted(set(range(int(ids[tuple(row)].max()))) - set(ids[tuple(row)].tolist()))
    assert free, "the case has a block that is not selected"
    one = changed[tuple(row)].tolist()
    one[1] = free[0]
    changed[tuple(row)] = torch.tensor(sorted(one), dtype=ids.dtype)
    (same,) = compare(SELECTION, solution, {"a": (ids,), "b": (ids,)})
    (apart,) = compare(SELECTION, solution, {"a": (changed,), "b": (ids,)})
    assert same.difference == 0 and apart.share > 1


def small(*targets: str) -> conformance.Report:
    return conformance.run(targets, ops=["gated_sum"], tags=["smoke"], dtypes=[torch.float32])


def test_a_run_over_two_targets_says_how_far_they_are_apart() -> None:
    report = small("reference", "cpu:torch")
    assert report.ok and report.between
    (worst,) = worst_of_pairs(report.between)
    assert {worst.one, worst.other} == {"reference:eager", "cpu:torch"} and worst.share <= 1
    assert "reference:eager" in text.between(report)
    assert report.to_dict()["between"][0]["op"] == "gated_sum"
    assert text.between(small("reference")) == ""


def test_the_page_has_the_history_and_what_changed(tmp_path: Path) -> None:
    now = small("reference", "cpu:torch")
    old = json.loads(now.to_json())
    old["when"], old["environment"]["revision"] = "2026-01-02T03:04:05+00:00", "0ld"
    old["cells"][0]["status"], old["cells"][0]["cases"] = "fail", {"fail": 3}
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    page = html.page(now, history.load([path]))
    assert "History" in page and "0ld 2026-01-02 03:04" in page and "3 fail" in page
    target = old["cells"][0]["target"]
    assert f"gated_sum on {target} in float32: fail → pass" in page
    assert "History" not in html.page(now)


def report_of(when: str, revision: str, **status: str) -> dict[str, Any]:
    """A report with one float32 cell of target `a` for each op, and one in bfloat16 that passed."""
    cells = [
        {"op": op, "target": "a", "dtype": dtype, "status": each, "cases": {each: 3}}
        for op, said in status.items()
        for dtype, each in (("float32", said), ("bfloat16", "pass"))
    ]
    return {"when": when, "environment": {"revision": revision}, "cells": cells}


def test_the_past_is_told_in_order_and_adds_up(tmp_path: Path) -> None:
    reports = [
        report_of("2026-03", "a1", attention="pass", compress="fail"),
        report_of("2026-01", "c3", attention="fail", decode="pass"),
        report_of("2026-02", "b2", attention="fail", compress="pass"),
    ]
    paths = [tmp_path / f"{i}.json" for i in range(3)]
    for path, report in zip(paths, reports, strict=True):
        path.write_text(json.dumps(report))
    first, second, third = history.load(paths)
    assert [past.revision for past in (first, second, third)] == ["c3", "b2", "a1"]
    assert first.counts == {"a": {"fail": 3, "pass": 9}}
    assert history.changes(first, second) == []  # decode and compress are in one of them only
    assert history.changes(second, third) == [
        "attention on a in float32: fail → pass",
        "compress on a in float32: pass → fail",
    ]


def test_what_is_no_report_is_refused(tmp_path: Path, capsys) -> None:
    path = tmp_path / "x.json"
    path.write_text("[1]")
    words = ["conform", "--backend", "reference", "--history", str(path)]
    assert main(words) == 2
    assert f"{path} is no report of `nsa conform --json`" in capsys.readouterr().err


def test_a_case_that_matches_nothing_lists_what_there_is(capsys) -> None:
    assert main(["conform", "--op", "gated_sum", "--case", "nothing"]) == 2
    said = capsys.readouterr().err
    assert "no case 'nothing'; there are " in said and "one_token" in said
