"""The suite as a pytest function, for this project's tests and for third parties' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from nsa_neuron.conformance.gaps import Gap, known_gaps, load_gaps
from nsa_neuron.conformance.outcome import Outcome, Status
from nsa_neuron.conformance.problems import DTYPES, TAGS, Problem, problems
from nsa_neuron.conformance.runner import try_problem
from nsa_neuron.conformance.targets import Place, find_targets
from nsa_neuron.errors import UnknownBackend

if TYPE_CHECKING:
    from pathlib import Path

    import torch


def conformance_tests(
    target: str,
    *,
    known_gaps: str | Path | Sequence[Gap] | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
    tags: Sequence[str] = TAGS,
    ops: Sequence[str] = (),
    device: str | None = None,
) -> Callable[..., None]:
    """Makes the test of a backend, parametrised over ops, cases and dtypes.

    A backend that lives in another distribution needs an entry point in the group
    `nsa_neuron.backends` (`mybackend = "my_package.backend:BACKEND"`) and this file:

        from nsa_neuron.conformance import conformance_tests

        test_mybackend = conformance_tests("mybackend")

    One test runs one op on one case in one dtype through `torch.ops.nsa`, with poisoned
    allocations, twice, and judges the results against the float64 reference. What the backend
    refuses is skipped with its reason. What it is known to get wrong stands in a file of
    `{"gaps": [{"op", "mode", "dtype", "case", "reason"}]}` (globs, but for the reason) and is an
    expected failure; when it passes, the test fails and says so. Tests do not depend on each
    other, so they run under `pytest -n`.

    Args:
        target: `backend`, in the first of its modes that can run, or `backend:mode`.
        known_gaps: file or list; default: what this package lists for the backend.
        dtypes: default float32, float16, bfloat16.
        tags: of `smoke`, `edge`, `conform`.
        ops: names; empty: all.
        device: where tensors must lie; default: where the automatic choice would use the target,
            else the CPU.

    Returns:
        A test function; assign it to a name that pytest collects.
    """
    import pytest

    found = problems(ops, dtypes, tags)

    @pytest.mark.parametrize("problem", found, ids=map(str, found))
    def test_conformance(problem: Problem) -> None:
        place = _place(target, device)
        settle(try_problem(problem, place, _gaps(place, known_gaps)))

    return test_conformance


def settle(outcome: Outcome) -> None:
    """Ends a test the way that an outcome asks for."""
    import pytest

    where = f"{outcome.op} on {outcome.target}, {outcome.dtype}, case {outcome.case}"
    if outcome.status is Status.FAIL:
        pytest.fail(f"{where}: {outcome.detail}", pytrace=False)
    if outcome.status is Status.GAP:
        pytest.xfail(outcome.detail)
    if outcome.status in (Status.UNSUPPORTED, Status.NOT_RUN):
        pytest.skip(f"{outcome.status.value}: {outcome.detail}")


@lru_cache
def _place(target: str, device: str | None) -> Place:
    """The place of a target; without a mode, its first that can run, else its first."""
    places = find_targets([target], device)
    if not places:
        raise UnknownBackend(f"backend '{target}' has no modes")
    return next((place for place in places if not place.hindrance), places[0])


def _gaps(place: Place, given: str | Path | Sequence[Gap] | None) -> tuple[Gap, ...]:
    return known_gaps(place.target.backend) if given is None else load_gaps(given)
