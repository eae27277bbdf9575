"""A program as it would be after a rewrite: some instructions done otherwise, some not at all."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

from ..cost.instructions import cost_of
from ..memory.allocation import Access, access_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..cost import Parameters, Timeline
    from ..cost.instructions import Cost
    from ..issue.record import Instruction
    from ..issue.timing import Formula
    from ..machine.dtypes import DType
    from ..machine.trn2 import Machine
    from .flow import Flow


class Sketch:
    """Edits of a run's instructions, by index; what is not edited stays.

    Attributes:
        flow: sources and readers, of the run as it is.
        edited: instructions in their new form.
        gone: instructions that no longer exist, with the one that does their work too, or -1.
    """

    def __init__(self, t: Timeline, flow: Flow, p: Parameters, machine: Machine) -> None:
        self.t = t
        self.flow = flow
        self.parameters = p
        self.machine = machine
        self.edited: dict[int, Instruction] = {}
        self.gone: dict[int, int] = {}

    def __getitem__(self, k: int) -> Instruction:
        """An instruction as it would be."""
        return self.edited.get(k) or self.t.instructions[k]

    def drop(self, k: int, into: int = -1) -> None:
        """Take an instruction out; `into` does its work too."""
        self.gone[k] = into

    def edit(
        self,
        k: int,
        engine: str | None = None,
        formula: Formula | None = None,
        reads: Sequence[Access] | None = None,
        writes: Sequence[Access] | None = None,
        accumulator: bool | None = None,
        params: Any = None,
        static: bool = False,
    ) -> None:
        """Change some of an instruction.

        Args:
            k: which.
            engine, formula: where it runs and how long that takes.
            reads, writes: operands.
            accumulator: whether it also reads out accumulators.
            params: parameters.
            static: no operand is a run-time value any more.
        """
        new = copy(self[k])
        new.plan = copy(new.plan)
        if engine is not None:
            new.engine = engine
            new.plan.formula = formula or new.plan.timing.on(engine)
        elif formula is not None:
            new.plan.formula = formula
        if reads is not None:
            new.reads = tuple(reads)
        if writes is not None:
            new.writes = tuple(writes)
        if accumulator is not None:
            new.plan.accumulator = accumulator
        if params is not None:
            new.params = params
        if static:
            new.plan.registers = 0
        self.edited[k] = new

    def costs(self) -> dict[int, Cost]:
        """The costs that differ."""
        found: dict[int, Cost] = {}
        known: dict[object, Cost] = {}
        for k, i in self.edited.items():
            if k in self.gone:
                continue
            key = _signature(i)
            if key not in known:
                known[key] = cost_of(i, self.parameters, self.machine)
            found[k] = known[key]
        for k in self.gone:
            found[k] = _nothing(self.t.costs[k])
        return found

    def lanes(self, costs: dict[int, Cost]) -> dict[int, str]:
        """The lanes that differ: an instruction that is gone stands where its work is done."""
        found = {}
        for k, cost in costs.items():
            last = k
            while self.gone.get(last, -1) >= 0:
                last = self.gone[last]
            there = costs.get(last, self.t.costs[last]) if last not in self.gone else cost
            found[k] = there.transfer.queue if there.transfer else there.engine
        return found


def _signature(i: Instruction) -> tuple[object, ...]:
    """What the cost of an edited instruction depends on."""
    plan = i.plan
    operands = tuple(
        (a.layout.shape, a.layout.strides, a.layout.dtype, a.allocation.buffer, a.dynamic, a.p0)
        for a in (*i.writes, *i.reads)
    )
    kind = (i.opcode, i.engine, plan.formula, plan.accumulator, plan.registers, i.params)
    return (kind, operands, id(i.extra) if i.extra is not None else None)


def _nothing(cost: Cost) -> Cost:
    """The cost of an instruction that is gone."""
    new = copy(cost)
    new.interval = new.latency = 0.0
    new.psum, new.function = False, ""
    if cost.transfer is not None:
        transfer = copy(cost.transfer)
        transfer.use(())
        transfer.start = transfer.completion = transfer.trigger_time = 0.0
        new.transfer = transfer
    return new


def as_dtype(a: Access, dtype: DType) -> Access:
    """An operand as if its tensor were of another dtype."""
    layout = copy(a.layout)
    layout.dtype = dtype
    place = copy(a.place)
    place.layout = layout
    return access_at(a.allocation, place)


def as_static(a: Access) -> Access:
    """An operand as if its place were known at build time."""
    place = copy(a.place)
    place.dynamic = False
    return access_at(a.allocation, place)
