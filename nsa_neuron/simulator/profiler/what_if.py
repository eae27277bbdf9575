"""What-if questions: the same program scheduled again with some costs or dependencies changed."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..cost import program_of
from ..cost import schedule as schedule_program
from ..cost.program import LANES, costs_of
from ..cost.timeline import SHIFT
from .flow import Flow
from .lines import Key, Lines
from .sketch import Sketch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from ..cost import Parameters, Timeline
    from ..cost.dma import Transfer
    from ..cost.instructions import Cost
    from ..cost.program import Program
    from ..issue.record import Run

CAUSE = (1 << SHIFT) - 1  # bits of a dependency that hold its cause


@dataclass(frozen=True)
class Change:
    """What is different.

    Attributes:
        costs: new cost of some instructions.
        parameters: new values of some constants; costs not named above follow.
        without: causes of waiting that some instructions no longer have.
        lanes: new lane of some instructions.
        edits: what rewrites instructions, in order; `costs` and `lanes` come after them.
        unrolled: hardware loops, (core, loop), that are none any more.
    """

    costs: dict[int, Cost] | None = None
    parameters: dict[str, float] | None = None
    without: tuple[Collection[int], Collection[int]] | None = None
    lanes: dict[int, str] | None = None
    edits: tuple[Callable[[Sketch], None], ...] = ()
    unrolled: frozenset[tuple[int, int]] = frozenset()

    def __add__(self, other: Change) -> Change:
        """Both changes; of an instruction's two new costs the smaller one."""
        mine, theirs = self.costs or {}, other.costs or {}
        costs = {**mine, **theirs}
        for k in mine.keys() & theirs.keys():
            costs[k] = min(mine[k], theirs[k], key=_time)
        without = self.without or other.without
        if self.without and other.without:
            kept = {*self.without[0], *other.without[0]}
            without = (kept, {*self.without[1], *other.without[1]})
        return Change(
            costs or None,
            {**(self.parameters or {}), **(other.parameters or {})} or None,
            without,
            {**(self.lanes or {}), **(other.lanes or {})} or None,
            self.edits + other.edits,
            self.unrolled | other.unrolled,
        )


def _time(cost: Cost) -> float:
    return cost.transfer.duration if cost.transfer else cost.interval


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
    def flow(self) -> Flow:
        """Who reads whose results."""
        return Flow(self.t.run)

    @property
    def parameters(self) -> Parameters:
        """The constants by which one core's instructions are priced."""
        p, cores = self.t.parameters, self.t.run.lnc
        return replace(p, hbm_stack=p.hbm_stack / cores) if cores > 1 else p

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
        if change.unrolled:
            program, costs = program_of(_unrolled(self.t.run, change.unrolled)), None
        new, lanes = self._edited(change)
        if new:
            costs = list(costs_of(program, p) if costs is None else costs)
            for k, cost in new.items():
                costs[k] = cost
        if change.without:
            program = _without(program, *change.without)
        if lanes:
            program = _moved(program, lanes)
        return schedule_program(program, p, costs)

    def _edited(self, change: Change) -> tuple[dict[int, Cost], dict[int, str]]:
        """New costs and lanes."""
        costs, lanes = dict(change.costs or {}), dict(change.lanes or {})
        if change.edits:
            sketch = Sketch(self.t, self.flow, self.parameters, self.program.machine)
            for edit in change.edits:
                edit(sketch)
            rewritten = sketch.costs()
            lanes = {**sketch.lanes(rewritten), **lanes}
            costs = {**costs, **rewritten}
        return costs, lanes


def _unrolled(run: Run, loops: Collection[tuple[int, int]]) -> Run:
    """The run as if some of its hardware loops had been unrolled."""
    cores = [
        replace(c, loops=[m for m in c.loops if (number, m.loop) not in loops])
        for number, c in enumerate(run.cores)
    ]
    return replace(run, cores=cores)


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
