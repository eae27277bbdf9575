"""Runs problems on targets, through `torch.ops.nsa`, and judges what comes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nsa_neuron.conformance import between
from nsa_neuron.conformance.gaps import Gap, known_gaps
from nsa_neuron.conformance.outcome import Outcome, Status
from nsa_neuron.conformance.problems import Problem, Solution, place_inputs, problems, solve
from nsa_neuron.conformance.report import Report
from nsa_neuron.conformance.targets import Place, find_targets
from nsa_neuron.errors import NoLowering
from nsa_neuron.library import check_results  # its import registers torch.ops.nsa
from nsa_neuron.registry import use_backend
from nsa_neuron.terminal import progress

Gaps = Mapping[str, Sequence[Gap]]
Results = dict[str, tuple[Tensor, ...]]


def run(
    targets: Sequence[str] = (),
    *,
    ops: Sequence[str] = (),
    dtypes: Sequence[torch.dtype] | None = None,
    tags: Sequence[str] | None = None,
    case: str | None = None,
    gaps: Gaps | None = None,
    device: str | None = None,
) -> Report:
    """Tries ops on backends.

    Args:
        targets: `backend` or `backend:mode`; empty: all there are.
        ops: names; empty: all.
        dtypes: default float32, float16, bfloat16, and float64 on the reference.
        tags: of `smoke`, `edge`, `conform`; default all three.
        case: this case only.
        gaps: known gaps by backend name; default: those in this package.
        device: where tensors must lie; default: where the target is used by itself.

    Raises:
        NsaError: an unknown backend, mode, op or tag.
    """
    places = find_targets(targets, device)
    plan = _plan(places, ops, dtypes, tags, case)
    listed = {p.target.backend: known_gaps(p.target.backend) for p in places} | dict(gaps or {})
    report = Report(tuple(places))
    with progress("conformance", sum(len(where) for _, where in plan)) as advance:
        for problem, where in plan:
            results: Results = {}
            for place in where:
                advance(f"{place.target} {problem}")
                gaps_of = listed[place.target.backend]
                report.add(try_problem(problem, place, gaps_of, results))
            if len(results) > 1:
                report.between += between.compare(problem, solve(problem), results)
    return report


def _plan(
    places: Sequence[Place],
    ops: Sequence[str],
    dtypes: Sequence[torch.dtype] | None,
    tags: Sequence[str] | None,
    case: str | None,
) -> list[tuple[Problem, list[Place]]]:
    """Problems and where each is tried; the targets of one problem share its solution."""
    options: dict[str, Any] = {"ops": ops, "case": case}
    if tags is not None:
        options["tags"] = tags
    if dtypes is not None:
        return [(problem, list(places)) for problem in problems(**options, dtypes=dtypes)]
    plan = [(problem, list(places)) for problem in problems(**options)]
    exact = [place for place in places if place.target.backend == "reference"]
    if exact:
        plan += [(problem, exact) for problem in problems(**options, dtypes=(torch.float64,))]
    return plan


def try_problem(
    problem: Problem, place: Place, gaps: Sequence[Gap] = (), results: Results | None = None
) -> Outcome:
    """One problem on one target. Whatever a backend raises is its failure, not the suite's.

    Args:
        problem: op, case, dtype.
        place: the target.
        gaps: known ones of its backend.
        results: gets what the op returned, by target, on the CPU.
    """
    status, facts = _attempt(problem, place, {} if results is None else results)
    gap = _gap(problem, place, gaps)
    if gap and status is Status.FAIL:
        status, facts["detail"] = Status.GAP, f"{gap.reason} ({facts['detail']})"
    elif gap and status is Status.PASS:
        where = f" in {gap.source}" if gap.source else ""
        status, facts["detail"] = Status.FAIL, f"a known gap passes now: remove it{where}"
    return Outcome(
        problem.op, str(place.target), problem.dtype_name, problem.label, status, **facts
    )


def _gap(problem: Problem, place: Place, gaps: Sequence[Gap]) -> Gap | None:
    key = (problem.op, place.target.mode, problem.dtype_name, problem.label)
    return next((gap for gap in gaps if gap.covers(*key)), None)


def _attempt(problem: Problem, place: Place, results: Results) -> tuple[Status, dict[str, Any]]:
    if place.hindrance:
        return Status.NOT_RUN, {"detail": place.hindrance}
    solution = solve(problem)
    start = time.perf_counter()
    try:
        facts = _compare(problem, place, solution, results)
    except NoLowering as refused:
        _, _, rule, reason = refused.reasons[-1]
        return Status.UNSUPPORTED, {"detail": f"{rule}: {reason}"}
    except Exception as error:
        facts = {"detail": f"{type(error).__name__}: {error}"}
    facts["seconds"] = time.perf_counter() - start
    return (Status.FAIL if facts.get("detail") else Status.PASS), facts


def _compare(
    problem: Problem, place: Place, solution: Solution, results: Results
) -> dict[str, Any]:
    """Two runs, the first with poisoned allocations; both right, bit-equal, inputs untouched.

    Poisoning switches torch to deterministic algorithms, which may round differently. So if the
    two runs differ, the second is judged on its own and a third decides about determinism.
    """
    inputs = place_inputs(solution.inputs, place.device, problem.strided)
    op = getattr(torch.ops.nsa, problem.op).default

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad(), use_backend(str(place.target)):
            out = op(**inputs)
        # The router checks the first call of each size only; strides may differ between calls.
        check_results(problem.spec.bind(inputs), out, place.target)
        return out if isinstance(out, tuple) else (out,)

    with poisoned_allocations():
        first = call()
    results[str(place.target)] = tuple(x.cpu() for x in first)
    facts = _judge(problem, solution, first)
    if facts["detail"]:
        return facts
    second = call()
    facts["detail"] = _side_effects(inputs, solution.inputs, (*first, *second))
    if not facts["detail"] and not _bit_equal(first, second):
        facts = _judge_unpoisoned(problem, solution, second, call)
    return facts


def _judge_unpoisoned(
    problem: Problem,
    solution: Solution,
    second: tuple[Tensor, ...],
    call: Callable[[], tuple[Tensor, ...]],
) -> dict[str, Any]:
    facts = _judge(problem, solution, second)
    if not facts["detail"] and not _bit_equal(second, call()):
        facts["detail"] = "two runs on the same inputs differ (rule 13 of docs/contract.md)"
    return facts


def _judge(problem: Problem, solution: Solution, got: tuple[Tensor, ...]) -> dict[str, Any]:
    """The first result over its budget, else the one closest to it."""
    worst: dict[str, Any] = {"detail": ""}
    share = -1.0
    spec = problem.spec
    for item, mine, oracle, eager in zip(
        spec.returns, got, solution.oracle, solution.eager, strict=True
    ):
        diff = spec.compare[item.name](mine, oracle, eager, solution.inputs)
        facts = {"result": item.name, "error": diff.error, "budget": diff.budget}
        if not diff.ok:
            return {**facts, "detail": f"{item.name}: {diff.detail}"}
        used = diff.error / diff.budget if diff.budget else 0.0
        if used > share:
            share, worst = used, {**facts, "detail": ""}
    return worst


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors hold the same values; NaN, which poisons unused memory, equals NaN."""
    return torch.equal(x, y) or torch.allclose(x, y, rtol=0.0, atol=0.0, equal_nan=True)


def _side_effects(
    inputs: Mapping[str, Any], given: Mapping[str, Any], results: tuple[Tensor, ...]
) -> str:
    """What a functional op must not do: change its arguments, or return their memory."""
    owners = {}
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.numel():
            if not _same(x.cpu(), given[name]):
                return f"the call changed its argument '{name}'"
            owners[x.untyped_storage().data_ptr()] = name
    for result in results:
        if result.numel() and result.untyped_storage().data_ptr() in owners:
            name = owners[result.untyped_storage().data_ptr()]
            return f"a result shares the memory of argument '{name}'"
    return ""


def _bit_equal(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(first, second, strict=True)
    )


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fills what `torch.empty` and its kin return with NaN (integers: their largest value).

    Torch does so in deterministic mode; operations that have no deterministic version only warn.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
