"""What a schedule needs of a run and no constant changes: lanes, dependencies, meetings.

Lanes are the in-order queues of a core: five engines and six DMA queues.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from .dependencies import MEETINGS, Tracker
from .instructions import COMPUTE, Cost, cost_of
from .loops import iteration_ends
from .parameters import Parameters, load
from .timeline import SHIFT

if TYPE_CHECKING:
    from ..issue.record import Instruction, Run
    from ..issue.spec import Plan
    from ..machine.trn2 import Machine

LANES = (*COMPUTE, "dma-load", "dma-store", "dma-copy", "dma-sync", "dma-scalar", "dma-gpsimd")
LANE = {name: k for k, name in enumerate(LANES)}
IN_ORDER = len(COMPUTE)  # lanes below this number, of each core, are compute engines


@dataclass
class Program:
    """What a schedule needs of a run and no constant changes.

    Attributes:
        run: the record.
        instructions: of all cores.
        plans: the signature of each.
        examples: one instruction of each signature.
        lane: lane of each, core after core.
        deps: `producer << SHIFT | cause` of each, by global index.
        partner: the instruction of the other core it meets.
        machine: sizes.
    """

    run: Run
    instructions: list[Instruction]
    plans: list[Plan]
    examples: dict[Plan, Instruction]
    lane: list[int]
    deps: list[list[int]]
    partner: dict[int, int]
    machine: Machine

    @cached_property
    def order(self) -> list[list[int]]:
        """The instructions of each lane."""
        lanes = np.array(self.lane, np.int16)
        return [np.flatnonzero(lanes == k).tolist() for k in range(len(LANES) * self.run.lnc)]

    @cached_property
    def banks(self) -> dict[int, list[object]]:
        """PSUM banks that an instruction has touched in a schedule; see `banks_of`."""
        return {}

    def banks_of(self, index: int) -> list[object]:
        """The PSUM banks an instruction touches: what stands for each, equal for equal banks."""
        found = self.banks.get(index)
        if found is None:
            found = self.banks[index] = []
            width = self.machine.psum_bank_bytes
            instruction = self.instructions[index]
            for a in (*instruction.writes, *instruction.reads):
                allocation = a.allocation
                if allocation.buffer != "psum":
                    continue
                placed = allocation.address
                base = placed[1] if placed else 0
                first, last = (base + a.lo) // width, (base + a.hi - 1) // width
                owner = self.lane[index] // len(LANES) if placed else allocation
                found += [(owner, bank) for bank in range(first, last + 1)]
        return found


def analyse(run: Run, machine: Machine) -> Program:
    """Find lanes, dependencies and meetings of a run."""
    instructions = run.instructions
    plans = [i.plan for i in instructions]
    examples = dict(zip(reversed(plans), reversed(instructions), strict=True))
    lane_of = {plan: _lane(cost) for plan, cost in _costs(examples, load(), machine).items()}
    lane: list[int] = []
    deps: list[list[int]] = []
    for number, core in enumerate(run.cores):
        offset = len(lane)
        own = [lane_of[plan] for plan in plans[offset : offset + len(core.instructions)]]
        found = Tracker(core, machine, own, IN_ORDER, run.lnc > 1).run()
        if number:
            found = [[d + (offset << SHIFT) for d in ds] for ds in found]
        lane += [k + number * len(LANES) for k in own] if number else own
        deps += found
    return Program(run, instructions, plans, examples, lane, deps, _partners(run), machine)


def costs_of(program: Program, p: Parameters) -> list[Cost]:
    """The cost of each instruction; one object per signature.

    Cores of a launch share an HBM stack, so each counts on its part of the bandwidth.
    """
    cores = program.run.lnc
    if cores > 1:
        p = replace(p, hbm_stack=p.hbm_stack / cores)
    costs = _costs(program.examples, p, program.machine)
    found = [costs[plan] for plan in program.plans]
    _add_iterations(program, found, p)
    return found


def _add_iterations(program: Program, costs: list[Cost], p: Parameters) -> None:
    """What each engine spends on an iteration of a hardware loop, after its last instruction."""
    known: dict[tuple[Plan, int], Cost] = {}
    offset = 0
    for core in program.run.cores:
        if core.loops:
            part = costs[offset : offset + len(core.instructions)]
            engine = [c.transfer.trigger if c.transfer else c.engine for c in part]
            for index, count in iteration_ends(core, engine).items():
                key = (program.plans[offset + index], count)
                if key not in known:
                    known[key] = part[index].followed_by(count * p.loop_iteration)
                costs[offset + index] = known[key]
        offset += len(core.instructions)


@lru_cache(maxsize=8)
def _known_costs(p: Parameters, machine: Machine) -> dict[object, Cost]:
    """The costs that were worked out with these constants, by signature."""
    return {}


def _costs(examples: dict[Plan, Instruction], p: Parameters, machine: Machine) -> dict[Plan, Cost]:
    """The cost of each signature; looked up where another run had it."""
    known = _known_costs(p, machine)
    costs = {}
    for plan, example in examples.items():
        cost = known.get(plan)
        if cost is None:
            cost = known[plan] = cost_of(example, p, machine)
        costs[plan] = cost
    return costs


def _lane(cost: Cost) -> int:
    return LANE[cost.transfer.queue if cost.transfer else cost.engine]


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
