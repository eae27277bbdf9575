"""What the suite tries, where, with what, and what a report and its page say of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backends import Fake, registered

from nsa_neuron.conformance import (
    Gap,
    Outcome,
    Place,
    Report,
    Status,
    html,
    pytest_suite,
    runner,
    targets,
    text,
    try_problem,
)
from nsa_neuron.conformance.problems import (
    DTYPES,
    TAGS,
    Problem,
    _telling,
    place_inputs,
    problems,
    solve,
)  # fmt: skip
from nsa_neuron.errors import NsaError, UnknownBackend
from nsa_neuron.numerics import Budget, Exact
from nsa_neuron.ops import OPS, get
from nsa_neuron.registry import AUTOMATIC, REGISTRY, Target

FINE = Place(Target("fine", "hw"), "", "cpu")


def row(status: Status, op: str = "attention", case: str = "a", **facts: Any) -> Outcome:
    return Outcome(op, "fine:hw", "float32", case, status, **facts)


# ---- problems


def test_every_case_is_tried_in_every_dtype_and_the_telling_ones_once_more_strided() -> None:
    for spec in OPS:
        found = problems([spec.name])
        plain = [p for p in found if not p.strided]
        cases = [c for c in spec.cases if set(c.tags) & set(TAGS)]
        assert [(p.case, p.dtype) for p in plain] == [(c.name, d) for c in cases for d in DTYPES]
        assert not any("bench" in c.tags for c in spec.cases if c.name in {p.case for p in found})
        by_name = {c.name: c for c in cases}
        strided = [by_name[p.case] for p in found if p.strided]
        kinds = {c.lengths is None for c in cases}
        assert {c.lengths is None for c in strided} == kinds
        for dense in kinds:
            several = any(c.size("Hkv") > 1 for c in cases if (c.lengths is None) == dense)
            assert several <= all(
                c.size("Hkv") > 1 for c in strided if (c.lengths is None) == dense
            ), spec.name


def test_the_telling_case_has_several_heads_then_batches_then_about_40_tokens() -> None:
    def case(name: str, hkv: int, b: int, s: int) -> Any:
        sizes = {"Hkv": hkv, "B": b, "S": s}
        return SimpleNamespace(name=name, size=sizes.__getitem__)

    one, two = case("one", 1, 9, 40), case("two", 2, 1, 300)
    batched, short, near = (
        case("batched", 2, 2, 300),
        case("short", 2, 2, 1),
        case("near", 2, 2, 50),
    )
    for given, wanted in (
        ([one, two], "two"), ([two, batched], "batched"), ([batched, short], "short"),
        ([batched, short, near], "near"),
    ):  # fmt: skip
        assert _telling(given).name == _telling(given[::-1]).name == wanted


def test_tags_and_names_choose_and_unknown_ones_are_refused() -> None:
    smoke = problems(["gated_sum"], (torch.float32,), ("smoke",))
    assert {p.case for p in smoke} == {"one_token", "group4_s40"}
    assert {p.case for p in problems(case="l_minus_1")} == {"l_minus_1"}
    assert problems(["gated_sum"], case="nothing") == []
    with pytest.raises(NsaError, match="no tag bench, x; there are smoke, edge, conform"):
        problems(tags=("x", "bench", "smoke"))


@pytest.mark.parametrize("strided", [False, True])
def test_inputs_are_copies(strided: bool) -> None:
    """A backend that changes them must not change what it is compared with."""
    x = torch.arange(12.0).view(1, 3, 4, 1)
    placed = place_inputs({"x": x, "n": 3, "none": None}, "cpu", strided)
    assert torch.equal(placed["x"], x) and placed["n"] == 3 and placed["none"] is None
    placed["x"].zero_()
    assert x.sum() == 66
    assert placed["x"].is_contiguous() is not strided


def test_the_truth_is_float64_and_the_plain_run_the_problem_s_dtype() -> None:
    found = solve(Problem(get("attention"), "group4_s40", torch.bfloat16))
    assert [x.dtype for x in found.oracle] == [torch.float64] * 2
    assert [x.dtype for x in found.eager] == [torch.bfloat16, torch.float32]
    assert torch.equal(found.inputs["q"].double().bfloat16(), found.inputs["q"])
    exact = solve(Problem(get("attention"), "group4_s40", torch.float64))
    assert exact.eager is exact.oracle and torch.equal(exact.oracle[0], found.oracle[0])


# ---- the runner

PROBLEM = Problem(get("gated_sum"), "one_token", torch.float32)


def test_seconds_are_seconds_of_both_runs(monkeypatch) -> None:
    clock = SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(runner, "time", clock)

    def slow(results: Any, values: Any) -> Any:
        clock.now += 1.5
        return results

    with registered(Fake(slow)) as place:
        found = try_problem(PROBLEM, place)
    assert found.status is Status.PASS and found.seconds == 3.0


def test_a_gap_of_a_case_does_not_cover_its_strided_form() -> None:
    def wrong(results: Any, values: Any) -> Any:
        return (results[0] + 1,)

    gaps = [Gap("gated_sum", "hw", "float32", "batch2_kv2", "known", "gaps.json")]
    both = [Problem(get("gated_sum"), "batch2_kv2", torch.float32, s) for s in (False, True)]
    with registered(Fake(wrong)) as place:
        assert [try_problem(p, place, gaps).status for p in both] == [Status.GAP, Status.FAIL]
        wide = [Gap("gated_sum", "hw", "float32", "batch2*", "known")]
        assert [try_problem(p, place, wide).status for p in both] == [Status.GAP] * 2
    with registered(Fake()) as place:
        closed = try_problem(both[0], place, gaps)
    assert closed.detail == "a known gap passes now: remove it in gaps.json"


@pytest.mark.parametrize(("errors", "worst"), [((0.5, 0.25), "o"), ((0.25, 0.5), "lse")])
def test_the_result_nearest_its_budget_is_reported(monkeypatch, errors, worst: str) -> None:
    class Says:
        def __init__(self, error: float) -> None:
            self.error = error

        def __call__(self, *given: Any) -> Any:
            return SimpleNamespace(ok=True, error=self.error, budget=1.0, detail="")

    spec = get("attention")
    compare = dict(zip(("o", "lse"), map(Says, errors), strict=True))
    monkeypatch.setitem(spec.__dict__, "compare", compare)
    problem = Problem(spec, "one_token", torch.float32)
    found = runner._judge(problem, solve(problem), solve(problem).eager)
    assert found == {"result": worst, "error": 0.5, "budget": 1.0, "detail": ""}


def test_float64_is_tried_on_the_reference_only_unless_asked_for() -> None:
    places = targets.find_targets(["reference", "cpu:torch"])
    plan = runner._plan(places, ["gated_sum"], None, ["smoke"], "one_token")
    tried = {(str(p.dtype)[6:], p.strided): [str(x.target) for x in where] for p, where in plan}
    both, one = ["reference:eager", "cpu:torch"], ["reference:eager"]
    assert {kind: tried[kind, False] for kind, _ in tried} == {
        "float32": both, "float16": both, "bfloat16": both, "float64": one
    }  # fmt: skip
    asked = runner._plan(places, ["gated_sum"], [torch.float64], None, "one_token")
    assert {str(p.dtype)[6:] for p, _ in asked} == {"float64"}
    assert all(len(where) == 2 for _, where in asked)


# ---- targets and the suite of third parties


class Modes:
    """A backend of some modes and what hinders each."""

    name = "modes"

    def __init__(self, **modes: str) -> None:
        self._modes = modes

    def modes(self) -> dict[str, str]:
        return self._modes

    def supports(self, bound: Any, mode: str) -> Any: ...

    def lower(self, bound: Any, plan: Any) -> Any: ...


@pytest.mark.parametrize(
    ("modes", "asked", "chosen"),
    [
        ({"hw": "", "sim": ""}, "modes", "hw"), ({"hw": "no GPU", "sim": ""}, "modes", "sim"),
        ({"hw": "no GPU", "sim": "no Triton"}, "modes", "hw"),
        ({"hw": "no GPU", "sim": ""}, "modes:hw", "hw"),
    ],
    ids=str,
)  # fmt: skip
def test_a_suite_runs_the_first_mode_that_can(modes, asked: str, chosen: str) -> None:
    pytest_suite._place.cache_clear()
    REGISTRY.register(Modes(**modes))
    try:
        assert pytest_suite._place(asked, None).target == Target("modes", chosen)
    finally:
        REGISTRY.unregister("modes")
        pytest_suite._place.cache_clear()


def test_gaps_are_the_package_s_own_unless_given() -> None:
    gap = Gap("*", "*", "*", "*", "why")
    assert pytest_suite._gaps(FINE, [gap]) == (gap,) and pytest_suite._gaps(FINE, None) == ()


def test_a_backend_that_cannot_be_imported_says_so_and_ends_nothing(monkeypatch) -> None:
    monkeypatch.setitem(REGISTRY._sources, "gone", "nowhere.at_all:BACKEND")
    (place,) = [p for p in targets.find_targets() if p.target.backend == "gone"]
    assert place.target.mode == "?" and "cannot be imported: No module named" in place.hindrance
    with pytest.raises(UnknownBackend, match="'gone' cannot be imported"):
        targets.find_targets(["gone"])


@pytest.mark.parametrize(
    ("there", "hindrance", "device"),
    [(["xla"], "", "xla"), (["neuron", "xla"], "", "neuron"), ([], "", "neuron"),
     (["xla"], "no device", "neuron")],
    ids=str,
)  # fmt: skip
def test_tensors_lie_on_the_first_device_that_is_there(
    monkeypatch, there, hindrance, device
) -> None:
    """`neuron:hw` is preferred by three types of device."""
    monkeypatch.setattr(targets, "_exists", there.__contains__)
    assert next(k for k, order in AUTOMATIC.items() if order[0] == "neuron:hw") == "neuron"
    assert targets._device(Target("neuron", "hw"), hindrance) == device
    assert targets._device(Target("neuron", "sim"), hindrance) == "cpu"


# ---- reports

REFUSED = Report((FINE,))
for op, case, why in (("attention", "a", "x"), ("attention", "b", "x"), ("attention", "c", "y"),
                      ("compress", "a", "x")):  # fmt: skip
    REFUSED.add(row(Status.UNSUPPORTED, op, case, detail=why))


def test_refusals_are_counted_by_op_and_reason() -> None:
    lines = [line.split() for line in text.refusals(REFUSED).splitlines()[3:]]
    assert lines == [
        ["fine:hw", "attention", "2", "x"], ["fine:hw", "attention", "1", "y"],
        ["fine:hw", "compress", "1", "x"],
    ]  # fmt: skip


def test_the_page_says_what_a_bar_a_badge_and_a_verdict_mean() -> None:
    made = Report((FINE,))
    made.add(row(Status.PASS, result="o", error=1.0, budget=4.0, seconds=1.25))
    assert made.ok and made.ran == 1
    good = html.page(made)
    assert '<p class="verdict pass">1 cases, no fail</p>' in good and "<h2>Failures" not in good
    assert 'width:25%"></i></span>1 of 4' in good and "1.25 s" in good
    assert "Every case of every op" in good and "<details open>" not in good
    made.add(row(Status.FAIL, "compress", "b", error=9.0, budget=3.0, detail="o: off"))
    bad = html.page(made, tried="dtype bf16")
    assert '<p class="verdict fail">1 of 2 cases fail</p>' in bad
    assert 'width:100%"></i></span>9 of 3' in bad and "A selection: dtype bf16" in bad
    assert "<h2>Failures</h2>" in bad and bad.count("<details open>") == 1
    assert "<td>b</td><td>o: off</td>" in bad


def test_cases_of_a_cell_are_counted_by_how_they_ended() -> None:
    made = Report((FINE,))
    for status, count in ((Status.PASS, 3), (Status.GAP, 1), (Status.UNSUPPORTED, 2)):
        for _ in range(count):
            made.add(row(status))
    (cell,) = made.cells
    assert text._cases(cell) == "3 pass, 1 known gap, 2 unsupported"
    data = cell.to_dict()
    assert data["cases"] == {"known gap": 1, "pass": 3, "unsupported": 2}
    (only,) = REFUSED.cells[1:]
    assert text._cases(only) == "1 unsupported" and only.to_dict()["unsupported"] == ["x"]


# ---- comparators


def test_exact_results_have_one_shape_and_every_element() -> None:
    x = torch.arange(6).view(2, 3)
    assert Exact()(x, x, x, {}).ok
    for other in (x[:1], x.view(3, 2), x.clone().index_fill_(1, torch.tensor([2]), 0)):
        assert not Exact()(other, x, x, {}).ok
    found = Exact()(x.clone().index_fill_(1, torch.tensor([1]), 9), x, x, {})
    assert (found.error, found.budget, found.detail) == (2.0, 0.0, "2 elements differ")


@pytest.mark.parametrize("roundings", [1, 3])
def test_a_band_is_of_units_in_the_last_place(roundings: int) -> None:
    budget = Budget(roundings=roundings)
    half, double = (torch.float16, torch.bfloat16), (torch.float32, torch.float64)
    for dtype, ulps in (*((x, 1) for x in half), *((x, 16) for x in double)):
        eps = torch.finfo(dtype).eps
        assert budget.band(dtype, 3.0) == pytest.approx(roundings * ulps * eps * 3.0)
        assert budget.band(dtype, 0.01) == pytest.approx(roundings * ulps * eps * 0.05)
