"""What-if questions: the same program scheduled again with some costs or dependencies changed."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..cost import program_of
from ..cost import schedule as schedule_program
from ..cost.dependencies import SHIFT
from ..cost.program import LANES
from .lines import Key, Lines

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from ..cost import Timeline
    from ..cost.dma import Transfer
    from ..cost.instructions import Cost
    from ..cost.program import Program

CAUSE = (1 << SHIFT) - 1  # bits of a dependency that hold its cause


@dataclass(frozen=True)
class Change:
    """What is different.

    Attributes:
        costs: new cost of some instructions.
        parameters: new values of some constants; costs not named above follow.
        without: causes of waiting that some instructions no longer have.
        lanes: new lane of some instructions.
    """

    costs: dict[int, Cost] | None = None
    parameters: dict[str, float] | None = None
    without: tuple[Collection[int], Collection[int]] | None = None
    lanes: dict[int, str] | None = None


class Baseline:
    """A timeline, its instructions by source line, and how long it would be if."""

    def __init__(self, t: Timeline) -> None:
        self.t = t
        self.lines = Lines()

    @cached_property
    def program(self) -> Program:
        """Dependencies of the run."""
        return program_of(self.t.run)

    @cached_property
    def by_line(self) -> dict[Key, list[int]]:
        """Indices of the instructions that each line issued."""
        found: dict[Key, list[int]] = {}
        for k, i in enumerate(self.t.instructions):
            found.setdefault(self.lines.key(i), []).append(k)
        return found

    def gain(self, change: Change) -> float:
        """Ns that the whole kernel would be shorter; negative where it would be longer."""
        return self.t.total - self._again(change).total

    def _again(self, change: Change) -> Timeline:
        program, p = self.program, self.t.parameters
        costs: list[Cost] | None = self.t.costs
        if change.parameters:
            p, costs = replace(p, **change.parameters), None  # type: ignore[arg-type]
        if change.costs:
            costs = list(self.t.costs)
            for k, cost in change.costs.items():
                costs[k] = cost
        if change.without:
            program = _without(program, *change.without)
        if change.lanes:
            program = _moved(program, change.lanes)
        return schedule_program(program, p, costs)


def _without(program: Program, indices: Collection[int], causes: Collection[int]) -> Program:
    deps = list(program.deps)
    for k in indices:
        deps[k] = [code for code in deps[k] if code & CAUSE not in causes]
    return replace(program, deps=deps)


def _moved(program: Program, lanes: dict[int, str]) -> Program:
    lane = list(program.lane)
    for k, name in lanes.items():
        lane[k] = lane[k] // len(LANES) * len(LANES) + LANES.index(name)
    return replace(program, lane=lane)


def changed(t: Timeline, indices: Iterable[int], make: Callable[[Cost], Cost]) -> dict[int, Cost]:
    """New costs for some instructions, made once per old cost."""
    made: dict[int, Cost] = {}
    result = {}
    for k in indices:
        old = t.costs[k]
        if id(old) not in made:
            made[id(old)] = make(old)
        result[k] = made[id(old)]
    return result


def with_transfer(
    cost: Cost, parts: tuple[tuple[int, float], ...] | None = None, **fields: Any
) -> Cost:
    """A copy of a DMA cost with other parts or fields of its transfer."""
    new = copy.copy(cost)
    transfer: Transfer = copy.copy(cost.transfer)  # type: ignore[assignment]
    if parts is not None:
        transfer.use(parts)
    for name, value in fields.items():
        setattr(transfer, name, value)
    new.transfer = transfer
    return new


def with_times(cost: Cost, interval: float, latency: float) -> Cost:
    """A copy of a compute cost with other times."""
    new = copy.copy(cost)
    new.interval, new.latency = interval, latency
    return new
