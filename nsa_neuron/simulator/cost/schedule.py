"""When each instruction runs: in-order engines in parallel, DMA queues over 16 shared engines.

Lanes are the in-order queues of a core: five engines and six DMA queues. Always the lane head that
can issue first goes next, so shared resources (DMA engines, PSUM banks, the engine that triggers a
transfer) are handed out in time order, ties in program order. A schedule is a function of the
record and the constants.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heappop, heappush
from typing import TYPE_CHECKING

import numpy as np

from . import tables
from .dependencies import MEETINGS, SHIFT, Tracker
from .dma import ENGINES, Transfer
from .instructions import COMPUTE, Cost, cost_of
from .parameters import Parameters, load
from .timeline import Cause, Timeline

if TYPE_CHECKING:
    from ..machine import Machine
    from ..record import Instruction, Run

LANES = (*COMPUTE, "dma-load", "dma-store", "dma-copy", "dma-sync", "dma-scalar", "dma-gpsimd")
_LANE = {name: k for k, name in enumerate(LANES)}
_VECTOR, _SCALAR = _LANE["vector"], _LANE["scalar"]
_IN_ORDER = len(COMPUTE)
_CAUSE = (1 << SHIFT) - 1


@dataclass
class Program:
    """What a schedule needs of a run and no constant changes.

    Attributes:
        run: the record.
        instructions: of all cores.
        kind: number of the signature of each.
        examples: one instruction of each signature.
        lane: lane of each, core after core.
        deps: `producer << SHIFT | cause` of each, by global index.
        partner: the instruction of the other core it meets.
    """

    run: Run
    instructions: list[Instruction]
    kind: list[int]
    examples: list[Instruction]
    lane: list[int]
    deps: list[list[int]]
    partner: dict[int, int]

    @cached_property
    def order(self) -> list[list[int]]:
        """The instructions of each lane."""
        order: list[list[int]] = [[] for _ in range(len(LANES) * self.run.lnc)]
        for index, lane in enumerate(self.lane):
            order[lane].append(index)
        return order


def analyse(run: Run, machine: Machine) -> Program:
    """Find lanes, dependencies and meetings of a run."""
    instructions = run.instructions
    kind, examples = _kinds(instructions)
    lane_of_kind = [_lane(cost_of(i, load())) for i in examples]
    lane: list[int] = []
    deps: list[list[int]] = []
    for number, core in enumerate(run.cores):
        offset = len(lane)
        own = [lane_of_kind[k] for k in kind[offset : offset + len(core.instructions)]]
        found = Tracker(core, machine, own, _IN_ORDER, run.lnc > 1).run()
        if number:
            found = [[d + (offset << SHIFT) for d in ds] for ds in found]
        lane += [k + number * len(LANES) for k in own] if number else own
        deps += found
    return Program(run, instructions, kind, examples, lane, deps, _partners(run))


def _kinds(instructions: list[Instruction]) -> tuple[list[int], list[Instruction]]:
    """Number of the signature of each instruction, and an instruction of each signature."""
    known: dict[object, int] = {}
    kind: list[int] = []
    examples: list[Instruction] = []
    for i in instructions:
        plan = i.plan
        number = known.get(plan)
        if number is None or plan is None:
            number = known[plan] = len(examples)
            examples.append(i)
        kind.append(number)
    return kind, examples


def costs_of(program: Program, p: Parameters) -> list[Cost]:
    """The cost of each instruction; one object per signature.

    Cores of a launch share an HBM stack, so each counts on its part of the bandwidth.
    """
    cores = program.run.lnc
    if cores > 1:
        p = replace(p, hbm_stack=p.hbm_stack / cores)
    costs = [cost_of(i, p) for i in program.examples]
    return [costs[k] for k in program.kind]


def _lane(cost: Cost) -> int:
    return _LANE[cost.transfer.queue if cost.transfer else cost.engine]


def _partners(run: Run) -> dict[int, int]:
    """Pairs of instructions at which the cores meet: the k-th of a kind and pipe on both."""
    if run.lnc < 2:
        return {}
    keyed: list[dict[object, int]] = []
    offset = 0
    for core in run.cores:
        count: Counter[object] = Counter()
        found: dict[object, int] = {}
        for i in core.instructions:
            if i.opcode in MEETINGS:
                kind = (i.opcode, i.params.pipe_id if i.opcode == "sendrecv" else None)
                found[(kind, count[kind])] = i.index + offset
                count[kind] += 1
        keyed.append(found)
        offset += len(core.instructions)
    first, second = keyed
    pairs = {first[k]: second[k] for k in first.keys() & second.keys()}
    return pairs | {b: a for a, b in pairs.items()}


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
    def __init__(self, program: Program, p: Parameters, costs: list[Cost] | None = None) -> None:
        self.program = program
        self.p = p
        cores = program.run.lnc
        self.costs = costs or costs_of(program, p)
        n, lanes = len(self.costs), len(LANES) * cores
        self.start, self.issue, self.begin = [0.0] * n, [0.0] * n, [0.0] * n
        self.free, self.end, self.done = [0.0] * n, [-1.0] * n, [-1.0] * n
        self.why = [-1] * n  # producer << SHIFT | cause
        self.lane_free = [0.0] * lanes
        self.lane_last = [-1] * lanes
        self.notes: dict[int, dict[str, float]] = {}
        self.resident = [""] * cores
        self.pe_last_free = [-1e18] * cores
        self.pe_full_at = [0.0] * cores
        self.dma_free = [[0.0] * ENGINES for _ in range(cores)]
        self.dma_level = [0.0] * cores  # when all engines are free together, else -1
        self.dma_cold = [p.dma_warm_up] * cores
        self.bank: dict[tuple[object, int], tuple[int, float]] = {}

    def run(self) -> Timeline:
        """Pop lane heads in order of their issue time until all lanes are empty."""
        program, p = self.program, self.p
        deps, order, partner = program.deps, program.order, program.partner
        end, done, why, costs = self.end, self.done, self.why, self.costs
        start, lane_free = self.start, self.lane_free
        lanes = len(order)
        position = [0] * lanes
        length = [len(o) for o in order]
        compute = [k % len(LANES) < _IN_ORDER for k in range(lanes)]
        signal = [p.semaphore if c else p.dma_semaphore for c in compute]
        lane_of = program.lane
        waiters: dict[int, list[int]] = {}
        arrived: dict[int, float] = {}
        heap: list[tuple[float, int]] = []
        todo = list(range(lanes - 1, -1, -1))
        table = p.scalar_table_load / p.scalar_clock
        left = len(costs)
        while True:
            while todo:
                lane = todo.pop()
                if position[lane] == length[lane]:
                    continue
                i = order[lane][position[lane]]
                ready = lane_free[lane]
                cost = costs[i]
                if cost.function and tables.needs_load(
                    self.resident[lane // len(LANES)], cost.function
                ):
                    ready += table
                start[i] = ready
                reason = -1
                own = lane if compute[lane] else -1
                for code in deps[i]:
                    d = code >> SHIFT
                    t = done[d]
                    if t < 0:
                        waiters.setdefault(d, []).append(lane)
                        break
                    if lane_of[d] == own:
                        t = end[d]
                    if t > ready:
                        ready = t
                        reason = code
                else:
                    why[i] = reason
                    other = partner.get(i) if cost.opcode == "core_barrier" else None
                    if other is None:
                        heappush(heap, (ready, i))
                        continue
                    arrived[i] = ready
                    if other in arrived:
                        both = max(ready, arrived[other])
                        late = i if ready == both else other
                        early = other if late == i else i
                        why[early] = late << SHIFT | Cause.EDGE
                        heappush(heap, (both, i))
                        heappush(heap, (both, other))
            if not heap:
                break
            t, i = heappop(heap)
            lane = lane_of[i]
            position[lane] += 1
            left -= 1
            if compute[lane]:
                self._compute(i, lane, t)
            else:
                self._transfer(i, lane, t)
            ended = self._exchange(i, partner) if costs[i].meeting else (i,)
            for k in ended:
                done[k] = end[k] + signal[lane_of[k]]
                woken = waiters.pop(k, None)
                if woken:
                    todo += woken
            todo.append(lane)
        if left:
            raise self._stuck(position)
        return self._timeline()

    def _stuck(self, position: list[int]) -> ValueError:
        """The error of lanes whose heads wait for one another."""
        order = self.program.order
        left = sum(len(o) - n for o, n in zip(order, position, strict=True))
        heads = [o[n] for o, n in zip(order, position, strict=True) if n < len(o)]
        shown = ", ".join(str(self.program.instructions[i]) for i in heads[:4])
        return ValueError(f"{left} instructions wait for one another, first: {shown}")

    def _compute(self, i: int, lane: int, t: float) -> None:
        """Issue on a compute engine at `t` or when the lane is free."""
        cost, p = self.costs[i], self.p
        core, kind = divmod(lane, len(LANES))
        if self.lane_free[lane] > t:  # a DMA trigger took the lane in between
            t = self.lane_free[lane]
        interval, latency = cost.interval, cost.latency
        if kind == 0:
            if t - self.pe_last_free[core] > p.pe_cool_down or self.pe_last_free[core] < 0:
                self.pe_full_at[core] = t + p.pe_warm_up
            if t < self.pe_full_at[core]:
                self.notes[i] = {"pe-half-rate": interval}
                latency += interval
                interval += interval
            self.pe_last_free[core] = t + interval
        elif cost.psum and p.psum_bank_share:
            t = self._bank(i, lane, t, interval)
        if cost.function and tables.needs_load(self.resident[core], cost.function):
            self.resident[core] = tables.holding(cost.function)
            self.notes[i] = {"activation-table-load": p.scalar_table_load / p.scalar_clock}
        self.issue[i] = self.begin[i] = t
        self.free[i] = self.lane_free[lane] = t + interval
        self.end[i] = t + latency
        self.lane_last[lane] = i

    def _bank(self, i: int, lane: int, t: float, interval: float) -> float:
        """Delay an access to a PSUM bank that another of VectorE and ScalarE is using."""
        instruction = self.program.instructions[i]
        keys = []
        for a in (*instruction.writes, *instruction.reads):
            allocation = a.allocation
            if allocation.buffer != "psum":
                continue
            placed = allocation.address
            base = placed[1] if placed else 0
            first, last = (base + a.lo) // 2048, (base + a.hi - 1) // 2048
            owner = lane // len(LANES) if placed else allocation
            keys += [(owner, b) for b in range(first, last + 1)]
        for key in keys:
            user, until = self.bank.get(key, (-1, 0.0))
            if until > t and user >= 0 and self.program.lane[user] != lane:
                self.notes.setdefault(i, {})["psum-bank"] = self.p.psum_bank_share * (until - t)
                t += self.p.psum_bank_share * (until - t)
                self.why[i] = user << SHIFT | Cause.BANK
        for key in keys:
            self.bank[key] = (i, t + interval)
        return t

    def _transfer(self, i: int, lane: int, t: float) -> None:
        """Trigger a transfer and run its parts on their DMA engines, first come first served."""
        cost = self.costs[i]
        transfer = cost.transfer
        assert transfer is not None
        core = lane // len(LANES)
        trigger = core * len(LANES) + _LANE[transfer.trigger]
        if self.lane_free[trigger] > t:
            t = self.lane_free[trigger]
            if self.lane_last[trigger] >= 0:
                self.why[i] = self.lane_last[trigger] << SHIFT | Cause.TRIGGER
        self.lane_free[trigger] = self.lane_free[lane] = self.free[i] = t + transfer.trigger_time
        self.lane_last[trigger] = i
        self.issue[i] = t
        first = t + transfer.start
        if self.dma_cold[core]:
            first += self.dma_cold[core]
            self.notes[i] = {"dma-warm-up": self.dma_cold[core]}
            self.dma_cold[core] = 0.0
        begin, last = self._engines(core, transfer, first)
        self.begin[i] = begin
        if begin > first:
            self.notes.setdefault(i, {})["dma-engines-busy"] = begin - first
        self.end[i] = last

    def _exchange(self, i: int, partner: dict[int, int]) -> tuple[int, ...]:
        """A message ends when both sides have sent theirs; returns what has ended now."""
        other = partner.get(i)
        if other is None or self.costs[i].opcode == "core_barrier":
            return (i,)
        if self.end[other] < 0:
            return ()
        self.end[i] = self.end[other] = max(self.end[i], self.end[other])
        return (i, other)

    def _engines(self, core: int, transfer: Transfer, first: float) -> tuple[float, float]:
        """Begin and end of a transfer on its DMA engines, which are free from `first` on."""
        engines, level = self.dma_free[core], self.dma_level[core]
        if level >= 0:  # all engines are free at the same time
            if transfer.uniform:
                begin = level if level > first else first
                last = begin + transfer.uniform + transfer.completion
                self.dma_level[core] = last
                return begin, last
            engines[:] = [level] * ENGINES
            self.dma_level[core] = -1.0
        begin, last, completion = 1e300, first, transfer.completion
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
        why = np.array(self.why, np.int64)
        cores = program.run.lnc
        busy = np.zeros((cores, ENGINES))
        offset = 0
        for number, core in enumerate(program.run.cores):
            own = self.costs[offset : offset + len(core.instructions)]
            offset += len(own)
            for cost, count in Counter(own).items():
                if cost.transfer:
                    for e, time in cost.transfer.parts:
                        busy[number, e] += count * time
        times = (self.start, self.issue, self.begin, self.free, self.end)
        start, issue, begin, free, end = (np.array(x, np.float64) for x in times)
        return Timeline(
            program.run,
            self.p,
            program.instructions,
            LANES * cores,
            tuple(c for c in range(cores) for _ in LANES),
            np.array(program.lane, np.int16),
            start,
            issue,
            begin,
            free,
            end,
            np.where(why < 0, int(Cause.LANE), why & _CAUSE).astype(np.int8),
            np.where(why < 0, -1, why >> SHIFT),
            self.costs,
            self.notes,
            busy,
        )
