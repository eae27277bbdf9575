"""When each instruction runs: in-order engines in parallel, DMA queues over 16 shared engines.

Always the lane head that can issue first goes next, so shared resources (DMA engines, PSUM banks,
the engine that triggers a transfer) are handed out in time order, ties in program order. A schedule
is a function of the record and the constants.

An instruction that shares nothing but its own lane comes when the lane and its operands are ready,
whatever else happens, so a lane runs through such instructions at once (`_advance`); only the
others go through the queue of heads (`run`).
"""

from __future__ import annotations

from collections import Counter
from heapq import heappop, heappush
from typing import TYPE_CHECKING

import numpy as np

from . import tables
from .dma import ENGINES, Transfer
from .program import IN_ORDER, LANE, LANES, Program, costs_of
from .timeline import SHIFT, Cause, Timeline

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from .instructions import Cost
    from .parameters import Parameters

    Lane = Generator[None, float | None, None]  # is sent the time of its head's turn
    Resume = Callable[[float | None], None]

_CAUSE = (1 << SHIFT) - 1


def schedule(program: Program, p: Parameters, costs: list[Cost] | None = None) -> Timeline:
    """Lay the instructions of a run out in time.

    Args:
        program: from `analyse`.
        p: constants.
        costs: of each instruction, for what-if questions; computed from `p` unless given.

    Raises:
        ValueError: the dependencies have a cycle (an edge of `depends_on` against lane order).
    """
    return _Scheduler(program, p, costs).run()


class _Scheduler:
    """The state of a schedule; each lane is a generator that yields where it has to wait."""

    def __init__(self, program: Program, p: Parameters, costs: list[Cost] | None = None) -> None:
        self.program = program
        self.p = p
        cores = program.run.lnc
        self.costs = costs or costs_of(program, p)
        n, lanes = len(self.costs), len(LANES) * cores
        self.start, self.issue, self.begin = [0.0] * n, [0.0] * n, [0.0] * n
        self.free, self.end, self.done = [0.0] * n, [-1.0] * n, [-1.0] * n
        self.why = [-1] * n  # producer << SHIFT | cause
        self.lane_free = [0.0] * lanes  # kept where a lane is taken in time order
        self.lane_last = [-1] * lanes
        self.heap: list[tuple[float, int]] = []  # heads that wait for their turn
        self.waiters: dict[int, list[Resume]] = {}  # lanes that wait for an instruction's result
        self.awake: list[Resume] = []
        self.arrived: dict[int, float] = {}
        self.notes: dict[int, dict[str, float]] = {}
        self.resident: list[frozenset[str]] = [frozenset()] * cores
        self.table_load = p.scalar_table_load / p.scalar_clock
        self.pe_full_at = [np.inf] * cores  # until the first multiply
        self.dma_free = [[0.0] * ENGINES for _ in range(cores)]
        self.dma_level = [0.0] * cores  # when all engines are free together, else -1
        self.dma_cold = [p.dma_warm_up] * cores
        self.bank: dict[object, tuple[int, float]] = {}
        self.counts = self._count()
        in_turn = self._taken_in_turn()
        self.resume: list[Resume] = [
            (
                self._transfers(lane)
                if lane % len(LANES) >= IN_ORDER
                else self._in_turn(lane)
                if lane in in_turn
                else self._run_ahead(lane)
            ).send
            for lane in range(lanes)
        ]

    def _count(self) -> list[Counter[Cost]]:
        """How many instructions of each core have each cost."""
        counts, offset = [], 0
        for core in self.program.run.cores:
            counts.append(Counter(self.costs[offset : offset + len(core.instructions)]))
            offset += len(core.instructions)
        return counts

    def _taken_in_turn(self) -> set[int]:
        """Compute lanes of which each instruction waits for its turn.

        Those where cores meet, and SyncE. An engine that triggers transfers as well is taken in
        time order, so where it executes instructions too nobody may run ahead.
        """
        order, compute = self.program.order, range(IN_ORDER)
        found = set()
        for core, count in enumerate(self.counts):
            base = core * len(LANES)
            found.add(base + LANE["sync"])
            for cost in count:
                if cost.transfer is None:
                    if cost.meeting:
                        found.add(base + LANE[cost.engine])
                elif order[base + LANE[cost.transfer.trigger]]:
                    return {c * len(LANES) + k for c in range(len(self.counts)) for k in compute}
        return found

    def run(self) -> Timeline:
        """Resume lanes: those that wait for nothing, then the head that can issue first."""
        lane_of, heap, awake, resume = self.program.lane, self.heap, self.awake, self.resume
        awake += resume[::-1]
        while True:
            while awake:
                awake.pop()(None)
            if not heap:
                break
            t, i = heappop(heap)
            resume[lane_of[i]](t)
        if min(self.end, default=0.0) < 0:
            raise self._stuck()
        return self._timeline()

    def _run_ahead(self, lane: int) -> Lane:
        """An engine whose instructions depend on nobody's turn, except for a PSUM bank."""
        program, signal, share = self.program, self.p.semaphore, self.p.psum_bank_share
        deps, lane_of, costs, awake = program.deps, program.lane, self.costs, self.awake
        start, issue, frees, end = self.start, self.issue, self.free, self.end
        done, waiters, why = self.done, self.waiters, self.why
        core, kind = divmod(lane, len(LANES))
        tensor = kind == LANE["tensor"]
        cool, full_at = (self.p.pe_cool_down, np.inf) if tensor else (np.inf, -1.0)
        resident = self.resident[core]
        me = self.resume[lane]
        free = 0.0
        for i in program.order[lane]:
            cost = costs[i]
            loads = cost.function and cost.function not in resident
            start[i] = ready = free + self.table_load if loads else free
            for code in deps[i]:
                d = code >> SHIFT
                t = done[d]
                if t < 0.0:  # as a float: Python compares like with like faster
                    waiters.setdefault(d, []).append(me)
                    yield
                    t = done[d]
                if t > ready:
                    if lane_of[d] == lane:
                        t = end[d]
                        if t <= ready:
                            continue
                    ready = t
                    why[i] = code
            interval, latency = cost.interval, cost.latency
            if ready < full_at or ready - free > cool:
                interval, latency = self._warming(i, core, ready, free)
                full_at = self.pe_full_at[core]
            elif cost.psum and share and not tensor:
                heappush(self.heap, (ready, i))
                yield
                ready = self._bank(i, lane, ready, interval)
            if loads:
                resident = self._load_table(i, core)
            issue[i] = ready
            frees[i] = free = ready + interval
            end[i] = ready = ready + latency
            done[i] = ready + signal
            if i in waiters:
                awake += waiters.pop(i)
        yield

    def _in_turn(self, lane: int) -> Lane:
        """An engine of which each instruction waits for its turn."""
        program, costs, lane_free = self.program, self.costs, self.lane_free
        deps, lane_of, done, end = program.deps, program.lane, self.done, self.end
        core = lane // len(LANES)
        for i in program.order[lane]:
            cost = costs[i]
            waits = True
            while waits:  # what triggers took the lane meanwhile counts too
                waits = False
                ready, reason = lane_free[lane], -1
                if cost.function and cost.function not in self.resident[core]:
                    ready += self.table_load
                self.start[i] = ready
                for code in deps[i]:
                    d = code >> SHIFT
                    t = done[d]
                    if t < 0.0:  # as a float: Python compares like with like faster
                        self.waiters.setdefault(d, []).append(self.resume[lane])
                        waits = True
                        yield
                        break
                    if lane_of[d] == lane:
                        t = end[d]
                    if t > ready:
                        ready, reason = t, code
            self.why[i] = reason
            self._offer(i, ready)
            turn = yield
            assert turn is not None
            self._compute(i, lane, turn)
            if cost.meeting:
                self._exchange(i)
            else:
                self._ended(i)
        yield

    def _transfers(self, lane: int) -> Lane:
        """A DMA queue; what it shares with others, it takes in its turn."""
        deps, done, costs = self.program.deps, self.done, self.costs
        waiters, why, heap = self.waiters, self.why, self.heap
        signal = self.p.dma_semaphore
        me = self.resume[lane]
        free = 0.0
        for i in self.program.order[lane]:
            self.start[i] = ready = free
            for code in deps[i]:
                d = code >> SHIFT
                t = done[d]
                if t < 0.0:  # as a float: Python compares like with like faster
                    waiters.setdefault(d, []).append(me)
                    yield
                    t = done[d]
                if t > ready:
                    ready = t
                    why[i] = code
            heappush(heap, (ready, i))
            yield
            free = self._transfer(i, lane // len(LANES), ready)
            if costs[i].meeting:
                self._exchange(i)
            else:
                done[i] = self.end[i] + signal
                if i in waiters:
                    self.awake += waiters.pop(i)
        yield

    def _ended(self, i: int) -> None:
        """An instruction has ended: wake who waits for it."""
        compute = self.program.lane[i] % len(LANES) < IN_ORDER
        self.done[i] = self.end[i] + (self.p.semaphore if compute else self.p.dma_semaphore)
        if i in self.waiters:
            self.awake += self.waiters.pop(i)

    def _offer(self, i: int, ready: float) -> None:
        """Let an instruction wait for its turn; at a barrier, for the other core first."""
        partner = self.program.partner
        other = partner.get(i) if partner and self.costs[i].opcode == "core_barrier" else None
        if other is None:
            heappush(self.heap, (ready, i))
            return
        arrived = self.arrived
        arrived[i] = ready
        if other in arrived:
            both = max(ready, arrived[other])
            late = i if ready == both else other
            early = other if late == i else i
            self.why[early] = late << SHIFT | Cause.EDGE
            heappush(self.heap, (both, i))
            heappush(self.heap, (both, other))

    def _stuck(self) -> ValueError:
        """The error of lanes whose heads wait for one another."""
        waiting = [[i for i in lane if self.end[i] < 0] for lane in self.program.order]
        left = sum(map(len, waiting))
        heads = [lane[0] for lane in waiting if lane]
        shown = ", ".join(str(self.program.instructions[i]) for i in heads[:4])
        return ValueError(f"{left} instructions wait for one another, first: {shown}")

    def _compute(self, i: int, lane: int, t: float) -> None:
        """Issue on a compute engine at `t` or when the lane is free."""
        cost, p = self.costs[i], self.p
        core, kind = divmod(lane, len(LANES))
        before = self.lane_free[lane]
        if before > t:  # a DMA trigger took the lane in between
            t = before
        interval, latency = cost.interval, cost.latency
        if kind == LANE["tensor"]:
            if t < self.pe_full_at[core] or t - before > p.pe_cool_down:
                interval, latency = self._warming(i, core, t, before)
        elif cost.psum and p.psum_bank_share:
            t = self._bank(i, lane, t, interval)
        if cost.function and cost.function not in self.resident[core]:
            self._load_table(i, core)
        self.issue[i] = t
        self.free[i] = self.lane_free[lane] = t + interval
        self.end[i] = t + latency
        self.lane_last[lane] = i

    def _warming(self, i: int, core: int, t: float, free: float) -> tuple[float, float]:
        """Interval and latency of a multiply that may find TensorE at half rate."""
        cost, p = self.costs[i], self.p
        if t - free > p.pe_cool_down or self.pe_full_at[core] == np.inf:
            self.pe_full_at[core] = t + p.pe_warm_up
        if t >= self.pe_full_at[core]:
            return cost.interval, cost.latency
        self.notes[i] = {"pe-half-rate": cost.interval}
        return cost.interval + cost.interval, cost.latency + cost.interval

    def _load_table(self, i: int, core: int) -> frozenset[str]:
        """Load the activation table of an instruction; return the functions it holds."""
        self.resident[core] = held = tables.SETS[tables.holding(self.costs[i].function)]
        self.notes[i] = {"activation-table-load": self.table_load}
        return held

    def _bank(self, i: int, lane: int, t: float, interval: float) -> float:
        """Delay an access to a PSUM bank that another of VectorE and ScalarE is using."""
        bank, share = self.bank, self.p.psum_bank_share
        keys = self.program.banks_of(i)
        for key in keys:
            user, until = bank.get(key, (-1, 0.0))
            if until > t and user >= 0 and self.program.lane[user] != lane:
                self.notes.setdefault(i, {})["psum-bank"] = share * (until - t)
                t += share * (until - t)
                self.why[i] = user << SHIFT | Cause.BANK
        for key in keys:
            bank[key] = (i, t + interval)
        return t

    def _transfer(self, i: int, core: int, t: float) -> float:
        """Trigger a transfer and run its parts on their DMA engines, first come first served.

        Returns:
            When its queue is free again.
        """
        transfer = self.costs[i].transfer
        assert transfer is not None
        trigger = core * len(LANES) + LANE[transfer.trigger]
        lane_free = self.lane_free
        if lane_free[trigger] > t:
            t = lane_free[trigger]
            if self.lane_last[trigger] >= 0:
                self.why[i] = self.lane_last[trigger] << SHIFT | Cause.TRIGGER
        lane_free[trigger] = self.free[i] = t + transfer.trigger_time
        self.lane_last[trigger] = i
        self.issue[i] = t
        first = t + transfer.start
        cold = self.dma_cold[core]
        begin, self.end[i] = self._engines(core, transfer, first, transfer.completion + cold)
        if cold:
            self.notes[i] = {"dma-warm-up": cold}
            self.dma_cold[core] = 0.0
        self.begin[i] = begin
        if begin > first:
            self.notes.setdefault(i, {})["dma-engines-busy"] = begin - first
        return self.free[i]

    def _exchange(self, i: int) -> None:
        """A message ends when both sides have sent theirs."""
        other = self.program.partner.get(i)
        if other is None or self.costs[i].opcode == "core_barrier":
            self._ended(i)
        elif self.end[other] >= 0:
            self.end[i] = self.end[other] = max(self.end[i], self.end[other])
            self._ended(i)
            self._ended(other)

    def _engines(
        self, core: int, transfer: Transfer, first: float, completion: float
    ) -> tuple[float, float]:
        """Begin and end of a transfer on its DMA engines, which are free from `first` on."""
        engines, level = self.dma_free[core], self.dma_level[core]
        if level >= 0:  # all engines are free at the same time
            if transfer.uniform:
                begin = level if level > first else first
                last = begin + transfer.uniform + completion
                self.dma_level[core] = last
                return begin, last
            engines[:] = [level] * ENGINES
            self.dma_level[core] = -1.0
        begin, last = 1e300, first
        for e, time in transfer.parts:
            since = engines[e]
            if since < first:
                since = first
            if since < begin:
                begin = since
            engines[e] = until = since + time + completion
            if until > last:
                last = until
        if transfer.uniform and min(engines) == last:
            self.dma_level[core] = last
        return begin, last

    def _timeline(self) -> Timeline:
        program = self.program
        n = len(self.why)
        why = np.fromiter(self.why, np.int64, n)
        lane = np.frombuffer(bytes(program.lane), np.uint8).astype(np.int16)
        cores = program.run.lnc
        busy = np.zeros((cores, ENGINES))
        for number, count in enumerate(self.counts):
            for cost, used in count.items():
                if cost.transfer:
                    for e, time in cost.transfer.parts:
                        busy[number, e] += used * time
        times = (self.start, self.issue, self.begin, self.free, self.end)
        start, issue, begin, free, end = (np.fromiter(x, np.float64, n) for x in times)
        return Timeline(
            program.run,
            self.p,
            program.instructions,
            LANES * cores,
            tuple(c for c in range(cores) for _ in LANES),
            lane,
            start,
            issue,
            np.where(lane % len(LANES) < IN_ORDER, issue, begin),
            free,
            end,
            np.where(why < 0, int(Cause.LANE), why & _CAUSE).astype(np.int8),
            np.where(why < 0, -1, why >> SHIFT),
            self.costs,
            self.notes,
            busy,
        )
