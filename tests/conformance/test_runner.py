"""The suite finds each kind of defect, and tells it from what is refused, known or not run."""

from __future__ import annotations

import itertools

import pytest
import torch
from backends import Distort, Fake, registered

from nsa_neuron import conformance
from nsa_neuron.conformance import (
    Gap,
    Outcome,
    Problem,
    Status,
    find_targets,
    text,
    try_problem,
)
from nsa_neuron.conformance.problems import scatter
from nsa_neuron.conformance.pytest_suite import settle
from nsa_neuron.conformance.runner import poisoned_allocations
from nsa_neuron.errors import BackendUnavailable
from nsa_neuron.numerics import Diff
from nsa_neuron.ops import get

PROBLEM = Problem(get("attention"), "group4_s40", torch.float32)
STRIDED = Problem(get("attention"), "group4_s40", torch.float32, strided=True)
GAP = Gap("attention", "*", "float32", "group4*", "rounds the wrong way", "gaps.json")
_counter = itertools.count()


def slightly_wrong(results, values):
    return (results[0] + 1e-3, *results[1:])


def wrong_everywhere_by_little(results, values):
    return (results[0] + 6e-6, *results[1:])


def never_the_same(results, values):
    return (results[0] + 1e-8 * (1 + next(_counter) % 2), *results[1:])


def returns_unwritten_memory(results, values):
    fresh = torch.empty_like(results[0])
    fresh[:, :-1] = results[0][:, :-1]
    return (fresh, *results[1:])


def changes_an_argument(results, values):
    values["k"].add_(1)
    return results


def returns_an_argument(results, values):
    values["q"].copy_(results[0])
    return (values["q"], *results[1:])


def raises(results, values):
    raise ZeroDivisionError("a tile of no rows")


def wrong_in_the_last_result(results, values):
    return (*results[:-1], results[-1] + 1e-3)


def wrong_in_one_element(results, values):
    out = results[0].clone()
    out.view(-1)[-1] += 1e-3
    return (out, *results[1:])


def wrong_when_memory_is_clean(results, values):
    """Right with poisoned memory, wrong without: the second run is judged as well."""
    clean = not torch.are_deterministic_algorithms_enabled()
    return (results[0] + 1e-3 * clean, *results[1:])


def too_wide(results, values):
    return (results[0].double(), *results[1:])


def too_short(results, values):
    return (results[0][:, :-1], *results[1:])


DEFECTS = [
    (wrong_in_the_last_result, "lse: largest error"),
    (wrong_in_one_element, "o: largest error"),
    (wrong_when_memory_is_clean, "o: largest error"),
    (too_wide, "float64"),
    (too_short, "39"),
    (slightly_wrong, "o: largest error"),
    (wrong_everywhere_by_little, "o: rms error"),
    (never_the_same, "rule 13"),
    (returns_unwritten_memory, "NaN"),
    (changes_an_argument, "changed its argument 'k'"),
    (returns_an_argument, "argument 'q'"),
    (raises, "ZeroDivisionError: a tile of no rows"),
]


@pytest.mark.parametrize(("distort", "said"), DEFECTS, ids=lambda x: getattr(x, "__name__", ""))
def test_each_defect_is_a_failure_that_says_what_is_wrong(distort: Distort, said: str) -> None:
    with registered(Fake(distort)) as place:
        outcome = try_problem(PROBLEM, place)
    assert outcome.status is Status.FAIL
    assert said in outcome.detail


def test_results_are_checked_at_every_call_not_at_the_first_alone() -> None:
    """The router remembers what it has checked; strides may change from call to call."""
    calls = itertools.count()

    def strided_later(results, values):
        if next(calls) == 0:
            return results
        return (results[0].mT.contiguous().mT, *results[1:])

    with registered(Fake(strided_later)) as place:
        outcome = try_problem(PROBLEM, place)
    assert outcome.status is Status.FAIL and "results must be contiguous" in outcome.detail


def test_a_right_backend_passes_with_its_error_and_budget() -> None:
    with registered(Fake()) as place:
        outcome = try_problem(PROBLEM, place)
    assert outcome.status is Status.PASS, outcome.detail
    assert outcome.error is not None and outcome.budget is not None
    assert 0 <= outcome.error <= outcome.budget
    assert (outcome.op, outcome.target, outcome.dtype) == ("attention", "fake:hw", "float32")


@pytest.mark.parametrize(("share", "status"), [(0.99, Status.PASS), (1.01, Status.FAIL)])
def test_the_suite_fails_what_exceeds_the_comparators_budget(monkeypatch, share, status) -> None:
    """The budget of the result that decides is the one reported."""
    spent = {"o": 0.5, "lse": share}

    def comparing(name):
        def compare(got, oracle, eager, inputs):
            return Diff(spent[name] <= 1, spent[name], 1.0, "too much" if spent[name] > 1 else "")

        return compare

    for name in spent:
        monkeypatch.setitem(get("attention").compare, name, comparing(name))
    with registered(Fake()) as place:
        outcome = try_problem(PROBLEM, place)
    assert outcome.status is status
    assert (outcome.result, outcome.error, outcome.budget) == ("lse", share, 1.0)
    assert outcome.share == share


ENDS = [
    (Status.PASS, None),
    (Status.FAIL, pytest.fail.Exception),
    (Status.GAP, pytest.xfail.Exception),
    (Status.UNSUPPORTED, pytest.skip.Exception),
    (Status.NOT_RUN, pytest.skip.Exception),
]


@pytest.mark.parametrize(("status", "end"), ENDS)
def test_a_pytest_of_the_suite_ends_as_its_outcome_says(status, end) -> None:
    ended = None
    try:
        settle(Outcome("attention", "fake:hw", "float32", "a", status, "why"))
    except (pytest.fail.Exception, pytest.xfail.Exception, pytest.skip.Exception) as error:
        ended = type(error)
        assert "why" in str(error)
    assert ended is end


def test_a_backend_that_ignores_strides_fails_on_strided_inputs_only() -> None:
    def ignores_strides(results, values):
        q = values["q"].as_strided(values["q"].shape, torch.empty(values["q"].shape).stride())
        return torch.ops.nsa.attention(q, values["k"], values["v"])

    with registered(Fake(ignores_strides)) as place:
        assert try_problem(PROBLEM, place).status is Status.FAIL  # it calls itself for ever

    def reads_memory_in_order(results, values):
        q = values["q"].as_strided(values["q"].shape, torch.empty(values["q"].shape).stride())
        return (results[0] + 0 * q, *results[1:])

    with registered(Fake(reads_memory_in_order)) as place:
        assert try_problem(PROBLEM, place).status is Status.PASS
        outcome = try_problem(STRIDED, place)
    assert outcome.status is Status.FAIL and "NaN" in outcome.detail
    assert outcome.case == "group4_s40+strided"


def test_a_refusal_is_unsupported_with_rule_and_reason() -> None:
    with registered(Fake(only=("gated_sum",))) as place:
        outcome = try_problem(PROBLEM, place)
    assert outcome.status is Status.UNSUPPORTED
    assert outcome.detail == "kernel: no kernel for attention"


def test_what_cannot_run_here_is_not_run_and_never_a_pass() -> None:
    with registered(Fake(hindrance="no such device")):
        report = conformance.run(["fake"], ops=["gated_sum"], tags=["smoke"])
    assert {row.status for row in report.rows} == {Status.NOT_RUN}
    assert report.ran == 0 and report.ok
    assert "fake:hw was not run: no such device" in text.matrix(report)
    assert "✓" not in text.matrix(report).splitlines()[3]


@pytest.mark.parametrize(
    ("target", "device", "found"),
    [
        ("cuda:hw", None, "cuda"),  # also where torch sees none: it is not run then
        ("cuda:sim", None, "cpu"), ("reference", None, "cpu"), ("cpu:torch", None, "cpu"),
        ("cuda:hw", "cpu", "cpu"),  # as told
    ],
)  # fmt: skip
def test_tensors_lie_where_the_automatic_choice_would_use_a_target(target, device, found) -> None:
    (place,) = find_targets([target], device)
    assert (str(place.target).partition(":")[0], place.device) == (target.partition(":")[0], found)


@pytest.mark.parametrize("device", ["meta", "nowhere"])
def test_a_device_without_numbers_or_that_is_none_is_refused(device) -> None:
    with pytest.raises(BackendUnavailable, match=f"no device '{device}' here"):
        find_targets(["reference"], device)


def test_a_known_gap_excuses_a_failure_and_keeps_its_reason() -> None:
    with registered(Fake(slightly_wrong)) as place:
        outcome = try_problem(PROBLEM, place, [GAP])
        other = try_problem(Problem(get("attention"), "one_token", torch.float32), place, [GAP])
    assert outcome.status is Status.GAP
    assert outcome.detail.startswith("rounds the wrong way")
    assert other.status is Status.FAIL


def test_a_known_gap_that_passes_is_a_failure() -> None:
    with registered(Fake()) as place:
        outcome = try_problem(PROBLEM, place, [GAP])
    assert outcome.status is Status.FAIL
    assert "remove it in gaps.json" in outcome.detail


def test_poison_reaches_every_kind_of_fresh_memory_and_is_taken_back() -> None:
    like = torch.zeros(2, 3)
    with poisoned_allocations():
        made = [torch.empty(4), like.new_empty(4), torch.empty_like(like)]
        made.append(torch.empty(4, dtype=torch.bfloat16))
        ids = torch.empty(4, dtype=torch.int32)
    assert all(bool(x.isnan().all()) for x in made)
    assert bool((ids == torch.iinfo(torch.int32).max).all())
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (2, 3, 4, 5)])
def test_scattered_tensors_hold_the_same_numbers_between_poison(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    spread = scatter(x)
    assert torch.equal(spread, x)
    assert not spread.is_contiguous()
    storage = torch.empty(0).set_(spread.untyped_storage())
    assert int(storage.isnan().sum()) == x.numel()
