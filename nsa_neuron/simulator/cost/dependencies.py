"""Who waits for whom: RAW, WAR and WAW on the bytes each instruction touches, and reuse of space.

This depends on the program alone, not on the constants, so it is computed once per run. Engines
execute in order, so an instruction never waits for an older one of its own engine except to read
its result; TensorE accumulates in PSUM without waiting for itself.

Tensors that the compiler places share the bytes of SBUF and PSUM: a tensor's first use waits until
tensors that were used last before it have left enough room, oldest first (a perfect allocator that
reuses space as late as it can).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..memory.allocation import access_at
from ..run.coverage import Coverage
from .loops import allocated_once, gates
from .storage import NOBODY, Region, Relations, Space, Spares, Storage
from .timeline import Cause

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..issue.record import CoreTrace, Instruction
    from ..machine.trn2 import Machine
    from ..memory.allocation import Access, Allocation
    from ..memory.layout import Form, Place

RAW, WAR, WAW = int(Cause.RAW), int(Cause.WAR), int(Cause.WAW)
SPACE, EDGE = int(Cause.SPACE), int(Cause.EDGE)
LOAD = "register_load"
SHIFT = 3  # a dependency is (producer << SHIFT) | cause

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
        self.first: dict[Allocation, Region] = {}  # of each tensor that is ever written
        self.arenas = {buffer: Storage(self.relations) for buffer in ("sbuf", "psum")}
        used = {a.form for a in trace.allocations if a.last_use >= 0}
        self.spaces = {
            "sbuf": Space(_shared_out(used, "sbuf", machine), 1, machine),
            "psum": Space(_shared_out(used, "psum", machine), machine.psum_bank_bytes, machine),
        }
        self.indexed = trace.indexed
        self._everywhere: dict[Place, Place] = {}
        self._dead: list[Allocation] = []  # in the instruction looked at
        self._fences: list[int] = []
        self._shared_users: dict[int, int] = {}

    def run(self) -> list[list[int]]:
        """Dependencies of each instruction, as `producer << SHIFT | cause`."""
        first, lanes, in_order = self.first, self.lanes, self.in_order
        dead, sync = self._dead, self.in_order - 1
        once = allocated_once(self.trace)
        accesses, self.indexed = once or (None, self.trace.indexed)
        gated = gates(self.trace, lanes)
        loads: dict[int, list[int]] = {}  # what waits for a register waits for its source
        result: list[list[int]] = []
        for me, i in enumerate(self.trace.instructions):
            lane = lanes[me]
            deps: list[int] = []
            writes, reads = (i.writes, i.reads) if accesses is None else accesses[me]
            if lane == sync and i.opcode == LOAD:
                loads[me] = self._load(reads[0], me, lane)
                result.append(deps)
                continue
            for access in reads:
                allocation = access.allocation
                region = first.get(allocation)
                if region is None:
                    if not allocation.written:
                        continue  # an input nobody writes
                    region = self._new_tensor(access, lane, deps)
                elif region.place is not access.place:
                    others = region.others
                    if others is None or access.place not in others:
                        region = self._pattern(region, access)
                    else:
                        region = others[access.place]
                if region.writer >= 0:
                    deps.append(region.writer << SHIFT | RAW)
                for other in region.near:
                    if other.writer >= 0:
                        deps.append(other.writer << SHIFT | RAW)
                reader = region.reader
                if reader < 0 or (lane < in_order and lanes[reader] == lane):
                    region.reader = me
                else:
                    self._note(region, me, lane)
                if allocation.last_use == me:
                    dead.append(allocation)
            for access in writes:
                allocation = access.allocation
                region = first.get(allocation)
                if region is None:
                    region = self._new_tensor(access, lane, deps)
                elif region.place is not access.place:
                    others = region.others
                    if others is None or access.place not in others:
                        region = self._pattern(region, access)
                    else:
                        region = others[access.place]
                if not region.written:
                    region.written = True
                    if region.storage is not None:
                        region.storage.write(region)
                writer, reader, near = region.writer, region.reader, region.near
                region.writer = me
                if writer >= 0 or reader >= 0 or near:
                    # A queue runs its transfers in order: where a run-time address only may be
                    # that of an earlier one, it does not wait for that to be complete.
                    own = lane if lane < in_order or access.place.dynamic else -1
                    if writer >= 0 and lanes[writer] != own:
                        deps.append(writer << SHIFT | WAW)
                    if reader >= 0:
                        if reader != me and lanes[reader] != own:
                            deps.append(reader << SHIFT | WAR)
                        region.reader = -1
                        if region.readers:
                            for reader in region.readers:
                                if reader != me and lanes[reader] != own:
                                    deps.append(reader << SHIFT | WAR)
                            region.readers = NOBODY
                    if near:
                        self._write_near(region, me, own, deps)
                if allocation.last_use == me:
                    dead.append(allocation)
            if dead:
                self._release()
            if me in gated:
                for load in gated[me]:
                    deps += loads.get(load, ())
            if i.after:
                for e in i.after:
                    if e.opcode == LOAD:
                        deps += loads.get(e.index, ())
                    else:
                        deps.append(e.index << SHIFT | EDGE)
            if self.pair:
                self._order_cores(i, me, lane, deps)
            if lane == 0:
                for d in deps:
                    if not lanes[d >> SHIFT]:
                        deps = [d for d in deps if lanes[d >> SHIFT]]
                        break
            if len(deps) > _MANY:
                deps = self._latest(deps)
            result.append(deps)
        return result

    def _load(self, access: Access, me: int, lane: int) -> list[int]:
        """What a register load waits for; it takes no time, what uses the register does."""
        allocation, deps = access.allocation, list[int]()
        region = self.first.get(allocation)
        if region is None:
            return deps  # an input nobody writes
        if region.place is not access.place:
            region = self._pattern(region, access)
        writers = (region.writer, *(other.writer for other in region.near))
        deps += [writer << SHIFT | RAW for writer in writers if writer >= 0]
        if allocation.last_use == me:
            self._dead.append(allocation)
            self._release()
        return deps

    def _latest(self, deps: list[int]) -> list[int]:
        """Drop what an in-order lane's later instruction implies; the latest first."""
        lanes, in_order = self.lanes, self.in_order
        deps.sort(reverse=True)
        latest: list[int] = []
        seen, last = 0, -1
        for code in deps:
            if code == last:
                continue
            last = code
            lane = lanes[code >> SHIFT]
            if lane < in_order:
                if seen >> lane & 1:
                    continue
                seen |= 1 << lane
            latest.append(code)
        return latest

    def _write_near(self, region: Region, me: int, own: int, deps: list[int]) -> None:
        """WAW and WAR of a write on the neighbours; `own` is its lane if it needs none on that."""
        lanes = self.lanes
        for r in region.near:
            if r.writer >= 0 and lanes[r.writer] != own:
                deps.append(r.writer << SHIFT | WAW)
            if r.reader >= 0:
                for reader in (r.reader, *r.readers):
                    if reader != me and lanes[reader] != own:
                        deps.append(reader << SHIFT | WAR)
        for r in region.inside:
            r.writer = r.reader = -1
            r.readers = NOBODY

    def _new_tensor(self, access: Access, lane: int, deps: list[int]) -> Region:
        """The region of the first access to a tensor, which takes its room."""
        allocation = access.allocation
        form = allocation.form
        if form.address is not None:
            region = self._addressed(self._region(access))
        elif not form.on_chip:
            region = self._region(access)
        else:
            kept = self.spares.get(access.place)
            region = kept.pop() if kept else self._region(access)
            space = self.spaces[form.buffer]
            space.free -= space.size[form]
            if space.free < 0:
                own = lane if lane < self.in_order else -1
                for user in space.reclaim():
                    if self.lanes[user] != own:
                        deps.append(user << SHIFT | SPACE)
        self.first[allocation] = region
        return region

    def _region(self, access: Access) -> Region:
        """A region of its own; where it is known at run time only, as far as bytes go."""
        region = Region(access, access.place)
        if access.place.dynamic:
            region.access = self._anywhere(access)
        return region

    def _pattern(self, first: Region, access: Access) -> Region:
        """The region of an access to a tensor that was first accessed by another pattern."""
        place = access.place
        known = first.others
        if known is not None and place in known:
            return known[place]
        if access.allocation.address is not None:
            if known is None:
                known = first.others = {}
            region = known[place] = self._addressed(self._region(access))
            return region
        owner = first.access.allocation
        if owner is not access.allocation:  # patterns are compared within the one that lent them
            access = access_at(owner, place)
        region = self._region(access)
        storage = first.storage or Storage.of_tensor(first, self.relations)
        return storage.add(place, region)

    def _addressed(self, region: Region) -> Region:
        """The region of these bytes of a memory, whichever tensor's they are."""
        allocation, place = region.access.allocation, region.place
        arena = self.arenas[allocation.buffer]
        key = allocation.address, allocation.shape, place.layout, place.start, place.dynamic
        return arena.regions.get(key) or arena.add(key, region)

    def _anywhere(self, access: Access) -> Access:
        """A run-time index may touch all of the tensor: the compiler must assume it does."""
        allocation, place = access.allocation, access.place
        whole = self._everywhere.get(place)
        if whole is None:
            whole = self._everywhere[place] = place.anywhere(allocation.form)
        return access_at(allocation, whole)

    def _release(self) -> None:
        """Tensors were used for the last time: others may have their room.

        What is known of them is dropped, so that memory stays small, but for those that addresses
        are still read from.
        """
        for allocation in self._dead:
            form = allocation.form
            if not form.on_chip or form.address is not None:
                continue
            first = self.first.pop(allocation, None)
            if first is None:
                continue  # twice an operand of its last instruction
            space = self.spaces[form.buffer]
            if allocation not in self.indexed:
                # Who used it is found now: when its room is taken, they have long left the cache.
                space.released.append((space.size[form], self.spares.keep(first), ()))
                continue
            self.first[allocation] = first
            if not first.released:
                first.released = True
                space.lend(allocation, first)
        self._dead.clear()

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
