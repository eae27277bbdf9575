"""How far two targets' results of one problem are apart from each other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from nsa_neuron.conformance.problems import Problem, Solution


@dataclass(frozen=True)
class Apart:
    """Two targets' results of one problem: the result that is furthest apart for its budget.

    Attributes:
        op, dtype, case: the problem.
        one, other: the targets.
        result: the op's result.
        difference: in the unit of the result's comparator (for a selection: share of score mass).
        budget: twice what one target may be off by: two that are right are no further apart.
    """

    op: str
    dtype: str
    case: str
    one: str
    other: str
    result: str
    difference: float
    budget: float

    @property
    def share(self) -> float:
        """The share of the budget that was used."""
        if not self.budget:
            return 0.0 if not self.difference else float("inf")
        return self.difference / self.budget

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    problem: Problem, solution: Solution, results: Mapping[str, tuple[Tensor, ...]]
) -> list[Apart]:
    """Every pair of targets that gave results.

    Args:
        problem: what was tried.
        solution: its inputs, and the truth, which gives the budget.
        results: by target, on the CPU.
    """
    return [
        _pair(problem, solution, pair, (results[pair[0]], results[pair[1]]))
        for pair in itertools.combinations(results, 2)
    ]


def _pair(
    problem: Problem,
    solution: Solution,
    names: tuple[str, str],
    results: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],
) -> Apart:
    spec, worst = problem.spec, None
    for item, one, other, oracle, eager in zip(
        spec.returns, *results, solution.oracle, solution.eager, strict=True
    ):
        judge = spec.compare[item.name]
        budget = 2 * judge(one, oracle, eager, solution.inputs).budget
        # Judged as if the other were the truth, so that ties of a selection count as equal.
        truth = other.double() if other.is_floating_point() else other
        apart = judge(one, truth, one, solution.inputs).error
        found = Apart(
            problem.op, problem.dtype_name, problem.label, *names, item.name, apart, budget
        )
        if worst is None or found.share > worst.share:
            worst = found
    assert worst is not None, "every op returns something"
    return worst


def worst_of_pairs(found: list[Apart]) -> list[Apart]:
    """The worst of every pair of targets, in the order of the run."""
    worst: dict[tuple[str, str], Apart] = {}
    for apart in found:
        key = (apart.one, apart.other)
        if key not in worst or apart.share > worst[key].share:
            worst[key] = apart
    return list(worst.values())
