"""A modelled timeline: when each instruction of a run waited, began and ended, and why.

Everything here is modelled, in nanoseconds from the start of the kernel, never measured. Arrays
have one element per instruction of `run.instructions` (core after core), so index `i` is the same
instruction everywhere. How an instruction moves through time:

    start    it is at the head of its lane: the one before it left the lane
    issue    its operands are ready and it begins (a DMA: the trigger was executed)
    begin    data flow; differs from issue for DMA (start latency, busy DMA engines)
    free     its lane takes the next instruction (compute engines: one initiation interval later)
    end      its results can be read on the same lane

`issue - start` is a stall of the lane; `cause` says what it waited for and `blocker` for whom.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..issue.record import Instruction, Run
    from .instructions import Cost
    from .parameters import Parameters


class Cause(IntEnum):
    """What decided when an instruction issued."""

    LANE = 0  # nothing but its turn: it followed the one before, or began the program
    RAW = 1  # reads what the blocker writes
    WAR = 2  # overwrites what the blocker reads
    WAW = 3  # overwrites what the blocker writes
    SPACE = 4  # its tensor takes the bytes of tensors the blocker used last
    EDGE = 5  # `depends_on`, a schedule, or the barrier that orders the two cores
    BANK = 6  # the blocker, on another engine, was using the same PSUM bank
    TRIGGER = 7  # the engine that triggers DMA was busy


SHIFT = 3  # a dependency is (producer << SHIFT) | cause


@dataclass(frozen=True)
class Step:
    """One instruction on the critical path.

    Attributes:
        index: the instruction.
        since, until: its share of the total time, [since, until) ns; shares of all steps tile
            the timeline from 0 to its end.
        cause: why it came when it did.
    """

    index: int
    since: float
    until: float
    cause: Cause


@dataclass(frozen=True)
class Timeline:
    """The modelled run of one launch, at one level of the constants.

    Attributes:
        run: the record it was made from.
        parameters: the constants used; `parameters.set` and `.level` name them.
        instructions: `run.instructions`.
        lanes: names of the in-order queues, such as "tensor", "vector", "dma-load"; with two
            cores those of core 1 follow those of core 0.
        lane_core: core of each lane.
        lane: lane of each instruction.
        start, issue, begin, free, end: ns, see the module's docstring.
        cause: `Cause` values.
        blocker: index of the instruction waited for, -1 where none.
        costs: what each instruction costs; one shared object per signature.
        notes: ns by reason for instructions that took longer than their cost says:
            "activation-table-load", "pe-half-rate", "dma-warm-up", "dma-engines-busy".
        dma_busy: ns of packet time, [core, DMA engine].
        assumptions: sentences that the report must repeat (trip counts, extrapolation, ...).
    """

    run: Run
    parameters: Parameters
    instructions: list[Instruction]
    lanes: tuple[str, ...]
    lane_core: tuple[int, ...]
    lane: NDArray[np.int16]
    start: NDArray[np.float64]
    issue: NDArray[np.float64]
    begin: NDArray[np.float64]
    free: NDArray[np.float64]
    end: NDArray[np.float64]
    cause: NDArray[np.int8]
    blocker: NDArray[np.int64]
    costs: list[Cost]
    notes: dict[int, dict[str, float]]
    dma_busy: NDArray[np.float64]
    assumptions: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Ns from the start to the last end."""
        return float(self.end.max()) if len(self.end) else 0.0

    @property
    def stall(self) -> NDArray[np.float64]:
        """Ns each instruction kept its lane waiting."""
        return self.issue - self.start

    def members(self, lane: str, core: int = 0) -> NDArray[np.int64]:
        """Indices of a lane's instructions, in order.

        Args:
            lane: name without core; "dma" means all DMA lanes, ordered by begin.
            core: which core.
        """
        wanted = [
            k
            for k, name in enumerate(self.lanes)
            if self.lane_core[k] == core and (name == lane or (lane == "dma" and "dma" in name))
        ]
        found = np.flatnonzero(np.isin(self.lane, wanted))
        return found[np.argsort(self.begin[found], kind="stable")]

    def busy(self, lane: str, core: int = 0) -> float:
        """Ns in which a lane executes at least one instruction.

        A compute engine executes from issue until its pipeline is empty, DMA from the first byte
        until the last (the profiler's "active time").
        """
        index = self.members(lane, core)
        if not len(index):
            return 0.0
        since, until = self.begin[index], np.maximum.accumulate(self.end[index])
        later = np.maximum(until[1:] - np.maximum(since[1:], until[:-1]), 0.0)
        return float(until[0] - since[0] + later.sum())

    def stalls(self, lane: str, core: int = 0) -> dict[Cause, float]:
        """Ns a lane stood still, by cause, largest first."""
        index = self.members(lane, core)
        waits = self.stall[index]
        causes = self.cause[index]
        sums = {c: float(waits[causes == c].sum()) for c in Cause if c is not Cause.LANE}
        return dict(sorted(((c, t) for c, t in sums.items() if t > 0), key=lambda x: -x[1]))

    def critical_path(self) -> list[Step]:
        """The chain of instructions that decides the total time, first to last.

        From the instruction that ends last, each step goes to whoever decided its issue: the
        blocker, or the predecessor on its lane.
        """
        if not len(self.end):
            return []
        previous = self._predecessors()
        steps: list[Step] = []
        index, until = int(self.end.argmax()), self.total
        while True:
            cause = Cause(int(self.cause[index]))
            before = int(previous[index]) if cause is Cause.LANE else int(self.blocker[index])
            since = float(self.issue[index])
            if before >= 0:
                handover = self.free if cause in (Cause.LANE, Cause.BANK) else self.end
                since = min(since, float(handover[before]))
            else:
                since = 0.0
            since = min(since, until)
            steps.append(Step(index, since, until, cause))
            if before < 0:
                return steps[::-1]
            index, until = before, since

    def _predecessors(self) -> NDArray[np.int64]:
        """The instruction before each on its lane, -1 for the first."""
        previous = np.full(len(self.lane), -1, np.int64)
        for k in range(len(self.lanes)):
            index = np.flatnonzero(self.lane == k)
            previous[index[1:]] = index[:-1]
        return previous


@dataclass(frozen=True)
class Band:
    """A modelled quantity with its uncertainty: all constants at their low, central, high end."""

    low: float
    central: float
    high: float

    def __str__(self) -> str:
        return f"{self.central:.4g} ({self.low:.4g} .. {self.high:.4g})"
