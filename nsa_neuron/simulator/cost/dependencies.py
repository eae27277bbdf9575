"""Who waits for whom: RAW, WAR and WAW on the bytes each instruction touches, and reuse of space.

This depends on the program alone, not on the constants, so it is computed once per run. Engines
execute in order, so an instruction never waits for an older one of its own engine except to read
its result; TensorE accumulates in PSUM without waiting for itself.

Tensors that the compiler places share the bytes of SBUF and PSUM: a tensor's first use waits until
tensors that were used last before it have left enough room, oldest first (a perfect allocator that
reuses space as late as it can).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ..run.coverage import Coverage
from .loops import allocated_once, gates
from .patterns import Addressed, Patterns, Spares, users_of
from .space import Space
from .storage import NOBODY, Region, Relations, Storage
from .timeline import SHIFT, Cause

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..issue.record import CoreTrace, Instruction
    from ..machine.trn2 import Machine
    from ..memory.allocation import Access, Allocation
    from ..memory.layout import Form

RAW, WAR, WAW = int(Cause.RAW), int(Cause.WAR), int(Cause.WAW)
SPACE, EDGE = int(Cause.SPACE), int(Cause.EDGE)
LOAD = "register_load"
_RAW_TO_WAW = WAW - RAW
_MANY = 4  # dependencies worth thinning out


class Tracker:
    """Finds the dependencies of one core's instructions, in program order.

    Args:
        trace: what the core did.
        machine: sizes of SBUF and PSUM.
        lanes: lane of every instruction.
        in_order: lanes below this number are compute engines; lane 0 is TensorE.
        pair: True where two cores share HBM, ordered only where they meet.
    """

    def __init__(
        self, trace: CoreTrace, machine: Machine, lanes: Sequence[int], in_order: int, pair: bool
    ) -> None:
        self.trace = trace
        self.lanes = lanes
        self.in_order = in_order
        self.pair = pair
        self.relations = Relations()
        self.spares = Spares()
        self.used: dict[Allocation, Patterns] = {}  # of tensors that an instruction writes
        self.arenas = {buffer: Storage(self.relations) for buffer in ("sbuf", "psum")}
        used = {a.form for a in trace.allocations if a.last_use >= 0}
        self.spaces = {
            "sbuf": Space(_shared_out(used, "sbuf", machine), 1, machine),
            "psum": Space(_shared_out(used, "psum", machine), machine.psum_bank_bytes, machine),
        }
        self.indexed = trace.indexed
        self._gates = gates(trace, lanes)
        self._loads: dict[int, list[int]] = {}  # what waits for a register waits for its source
        self._fences: list[int] = []
        self._shared_users: dict[int, int] = {}

    def run(self) -> list[list[int]]:
        """Dependencies of each instruction, as `producer << SHIFT | cause`."""
        used, lanes, in_order, gated = self.used, self.lanes, self.in_order, self._gates
        accesses, self.indexed = allocated_once(self.trace) or (None, self.trace.indexed)
        sync, pair = in_order - 1, self.pair
        dead: list[Allocation] = []  # in the instruction looked at
        result: list[list[int]] = []
        for me, i in enumerate(self.trace.instructions):
            lane = lanes[me]
            deps: list[int] = []
            if accesses is None:
                writes, reads = i.writes, i.reads
            else:
                writes, reads = accesses[me]
            if lane == sync and i.opcode == LOAD:
                self._loads[me] = self._load(reads[0], me)
                result.append(deps)
                continue
            for access in reads:
                allocation = access.allocation
                try:
                    region = used[allocation][access.place]
                except KeyError:
                    if not allocation.written and allocation.address is None:
                        continue  # an input nobody writes
                    region = self._first_use(access, me, lane, deps)
                if region.writer >= 0:
                    deps.append(region.writer)
                if region.near:  # few have neighbours, and a loop over none has its price
                    for other in region.near:
                        if other.writer >= 0:
                            deps.append(other.writer)
                reader = region.reader
                if reader < 0 or (lane < in_order and lanes[reader] == lane):
                    region.reader = me
                else:
                    self._note(region, me, lane)
                if allocation.last_use == me:
                    dead.append(allocation)
            for access in writes:
                allocation = access.allocation
                if allocation in used:
                    region = used[allocation][access.place]
                else:
                    region = self._first_use(access, me, lane, deps)
                if region.writer >= 0 or region.reader >= 0 or region.near or not region.written:
                    self._overwrite(region, me, lane, deps)
                region.writer = me << SHIFT | RAW
                if allocation.last_use == me:
                    dead.append(allocation)
            if dead:
                self._release(dead)
                dead.clear()
            if i.after or pair or (gated and me in gated):
                self._wait_in_order(i, me, lane, deps)
            result.append(deps if len(deps) <= _MANY else self._latest(deps))
        return result

    def _load(self, access: Access, me: int) -> list[int]:
        """What a register load waits for; it takes no time, what uses the register does."""
        allocation = access.allocation
        patterns = self.used.get(allocation)
        if patterns is None:
            if allocation.address is None:
                return []  # an input nobody writes
            patterns = self.used[allocation] = self._patterns(access)
        region = patterns[access.place]
        deps = [r.writer for r in (region, *region.near) if r.writer >= 0]
        if allocation.last_use == me:
            self._release([allocation])
        return deps

    def _latest(self, deps: list[int]) -> list[int]:
        """Drop what an in-order lane's later instruction implies; the latest first."""
        lanes, in_order = self.lanes, self.in_order
        deps.sort(reverse=True)
        latest: dict[int, int] = {}
        for code in deps:
            lane = lanes[code >> SHIFT]
            key = lane if lane < in_order else ~code
            if key not in latest:
                latest[key] = code
        return list(latest.values())

    def _overwrite(self, region: Region, me: int, lane: int, deps: list[int]) -> None:
        """WAW and WAR of a write, on its own pattern and on those that it meets."""
        if not region.written:
            region.written = True
            if region.storage is not None:
                region.storage.write(region)
        lanes = self.lanes
        # A queue runs its transfers in order: where a run-time address only may be that of an
        # earlier one, it does not wait for that to be complete.
        own = lane if lane < self.in_order or region.place.dynamic else -1
        if region.writer >= 0 and lanes[region.writer >> SHIFT] != own:
            deps.append(region.writer + _RAW_TO_WAW)
        if region.reader >= 0:
            if region.reader != me and lanes[region.reader] != own:
                deps.append(region.reader << SHIFT | WAR)
            region.reader = -1
            if region.readers:
                for reader in region.readers:
                    if reader != me and lanes[reader] != own:
                        deps.append(reader << SHIFT | WAR)
                region.readers = NOBODY
        if region.near:
            self._overwrite_near(region, me, own, deps)

    def _overwrite_near(self, region: Region, me: int, own: int, deps: list[int]) -> None:
        """WAW and WAR of a write on the neighbours; `own` is its lane if it needs none on that."""
        lanes = self.lanes
        for r in region.near:
            if r.writer >= 0 and lanes[r.writer >> SHIFT] != own:
                deps.append(r.writer + _RAW_TO_WAW)
            if r.reader >= 0:
                for reader in (r.reader, *r.readers):
                    if reader != me and lanes[reader] != own:
                        deps.append(reader << SHIFT | WAR)
        for r in region.inside:
            r.writer = r.reader = -1
            r.readers = NOBODY

    def _first_use(self, access: Access, me: int, lane: int, deps: list[int]) -> Region:
        """Begin to follow a tensor, which takes its room; return the region of the access."""
        allocation = access.allocation
        kept = self.spares.get(access.place)
        patterns = self.used[allocation] = kept.pop() if kept else self._patterns(access)
        space = patterns.space
        if space is not None:
            space.free -= patterns.size
            if space.free < 0:
                lanes, own = self.lanes, lane if lane < self.in_order else -1
                for user in space.reclaim():
                    if user != me and lanes[user] != own:  # it may read an address from there
                        deps.append(user << SHIFT | SPACE)
        return patterns.first

    def _patterns(self, access: Access) -> Patterns:
        """The patterns of a tensor of a kind that was not used before."""
        form = access.allocation.form
        if form.address is not None:
            return Addressed(access, self.relations, self.arenas[form.buffer])
        patterns = Patterns(access, self.relations)
        if form.on_chip:
            patterns.space = space = self.spaces[form.buffer]
            patterns.size = space.size[form]
            patterns.alike = self.spares.setdefault(access.place, [])
        return patterns

    def _release(self, dead: Iterable[Allocation]) -> None:
        """Tensors were used for the last time: others may have their room.

        What is known of them is dropped, so that memory stays small, but for those that addresses
        are still read from.
        """
        for allocation in dead:
            patterns = self.used.get(allocation)
            if patterns is None or patterns.space is None:
                continue  # twice an operand of its last instruction; not placed by the compiler
            released = patterns.space.released
            if allocation not in self.indexed:
                # Who used it is found now: when its room is taken, they have long left the cache.
                del self.used[allocation]
                released.append((patterns.size, self.spares.keep(patterns), None))
            elif not patterns.lent:
                patterns.lent = True
                regions = (patterns.first,) if len(patterns) == 1 else patterns.regions
                released.append((patterns.size, (), partial(users_of, regions)))

    def _note(self, region: Region, me: int, lane: int) -> None:
        """Add a reader beside the first; in-order lanes need only their latest."""
        readers = region.readers
        if not readers:
            region.readers = [me]
            return
        if lane < self.in_order:
            for k, reader in enumerate(readers):
                if self.lanes[reader] == lane:
                    readers[k] = me
                    return
        readers.append(me)

    def _wait_in_order(self, i: Instruction, me: int, lane: int, deps: list[int]) -> None:
        """What orders instructions beside the bytes: loops, `depends_on`, the other core."""
        loads = self._loads
        for load in self._gates.get(me, ()):
            deps += loads.get(load, ())
        for e in i.after:
            if e.opcode == LOAD:
                deps += loads.get(e.index, ())
            else:
                deps.append(e.index << SHIFT | EDGE)
        if self.pair:
            self._order_cores(i, me, lane, deps)
        if not lane:  # TensorE never waits for itself
            deps[:] = [d for d in deps if self.lanes[d >> SHIFT]]

    def _order_cores(self, i: Instruction, me: int, lane: int, deps: list[int]) -> None:
        """Meetings wait for all earlier use of shared HBM; later use waits for them.

        Messages through different pipes are independent, so they never wait for one another.
        """
        users = self._shared_users
        if i.opcode in MEETINGS:
            deps += [u << SHIFT | EDGE for u in users.values()]
            if i.opcode == "core_barrier":
                deps += [f << SHIFT | EDGE for f in self._fences]
                users.clear()
                self._fences.clear()
            self._fences.append(me)
        elif any(a.allocation.buffer == "shared_hbm" for a in (*i.writes, *i.reads)):
            deps += [f << SHIFT | EDGE for f in self._fences]
            users[me if lane >= self.in_order else -1 - lane] = me


def _shared_out(used: Iterable[Form], buffer: str, machine: Machine) -> int:
    """Bytes per partition beside the tensors with addresses; at least the largest tile's."""
    limit = machine.sbuf_bytes if buffer == "sbuf" else machine.psum_bytes
    used = [a for a in used if a.buffer == buffer]
    spans = {(a.address[1], a.address[1] + a.pitch_bytes) for a in used if a.address}
    if not spans:
        return limit
    covered = Coverage(spans)
    for span in spans:
        covered.change(*span, 1)
    largest = max((a.pitch_bytes for a in used if not a.address), default=0)
    return max(limit - covered.covered, min(largest, limit))


MEETINGS = ("core_barrier", "sendrecv")
