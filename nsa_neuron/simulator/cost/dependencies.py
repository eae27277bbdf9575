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

from .storage import Region, Space, Storage
from .timeline import Cause

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..access import Access
    from ..machine import Machine
    from ..memory import Allocation
    from ..record import CoreTrace, Instruction

RAW, WAR, WAW = int(Cause.RAW), int(Cause.WAR), int(Cause.WAW)
SPACE, EDGE = int(Cause.SPACE), int(Cause.EDGE)
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
        self.storages: dict[Allocation, Storage] = {}
        self.arenas = {"sbuf": Storage(), "psum": Storage()}
        self.spaces = {
            "sbuf": Space(machine.sbuf_bytes, 1),
            "psum": Space(machine.psum_bytes, machine.psum_bank_bytes),
        }
        self._released: set[Allocation] = set()
        self._fences: list[int] = []
        self._shared_users: dict[int, int] = {}

    def run(self) -> list[list[int]]:
        """Dependencies of each instruction, as `producer << SHIFT | cause`."""
        instructions = self.trace.instructions
        written = {a.allocation for i in instructions for a in i.writes}
        storages, lanes, in_order = self.storages, self.lanes, self.in_order
        result: list[list[int]] = []
        for me, i in enumerate(instructions):
            lane = lanes[me]
            deps: list[int] = []
            for access in i.reads:
                allocation = access.allocation
                if allocation not in written:
                    continue  # an input nobody writes
                storage = storages.get(allocation)
                key = (access.start, access.layout, access.dynamic)
                region = storage.regions.get(key) if storage is not None else None
                if region is None:
                    region = self._region(access, key, lane, deps)
                if region.writer >= 0:
                    deps.append(region.writer << SHIFT | RAW)
                for other in region.near:
                    if other.writer >= 0:
                        deps.append(other.writer << SHIFT | RAW)
                readers = region.readers
                if not readers:
                    readers.append(me)
                elif lane < in_order and lanes[readers[-1]] == lane:
                    readers[-1] = me
                else:
                    self._note(readers, me, lane)
                if allocation.last_use == me:
                    self._release(allocation)
            for access in i.writes:
                allocation = access.allocation
                storage = storages.get(allocation)
                key = (access.start, access.layout, access.dynamic)
                region = storage.regions.get(key) if storage is not None else None
                if region is None:
                    region = self._region(access, key, lane, deps)
                if not region.written:
                    (storage or storages[allocation]).write(region)
                self._write(region, me, lane if lane < in_order else -1, deps)
                if allocation.last_use == me:
                    self._release(allocation)
            if i.after:
                deps += [e.index << SHIFT | EDGE for e in i.after]
            if self.pair:
                self._order_cores(i, me, lane, deps)
            if lane == 0 and deps:
                deps = [d for d in deps if lanes[d >> SHIFT]]
            if len(deps) > _MANY:
                deps = self._latest(deps)
            result.append(deps)
        return result

    def _latest(self, deps: list[int]) -> list[int]:
        """Drop what an in-order lane's later instruction implies; the latest first."""
        lanes, in_order = self.lanes, self.in_order
        latest: dict[int, int] = {}
        for code in deps:
            lane = lanes[code >> SHIFT]
            key = lane if lane < in_order else code + in_order
            if code > latest.get(key, -1):
                latest[key] = code
        return sorted(latest.values(), reverse=True)

    def _write(self, region: Region, me: int, own: int, deps: list[int]) -> None:
        """WAW and WAR of a write; `own` is its lane where that needs none on itself."""
        lanes = self.lanes
        if region.writer >= 0 and lanes[region.writer] != own:
            deps.append(region.writer << SHIFT | WAW)
        region.writer = me
        if region.readers:
            for reader in region.readers:
                if reader != me and lanes[reader] != own:
                    deps.append(reader << SHIFT | WAR)
            region.readers = []
        for r in region.near:
            if r.writer >= 0 and lanes[r.writer] != own:
                deps.append(r.writer << SHIFT | WAW)
            for reader in r.readers:
                if reader != me and lanes[reader] != own:
                    deps.append(reader << SHIFT | WAR)
            if region.covers(r):
                r.writer = -1
                r.readers = []

    def _region(self, access: Access, key: object, lane: int, deps: list[int]) -> Region:
        """The region of an access that was not found at once; places new tensors."""
        allocation = access.allocation
        storage = self.storages.get(allocation)
        if storage is None:
            if allocation.address is not None and allocation.on_chip:
                storage = self.arenas[allocation.buffer]
            else:
                storage = Storage()
                if allocation.buffer in self.spaces:
                    own = lane if lane < self.in_order else -1
                    users = self.spaces[allocation.buffer].take(allocation)
                    deps += [u << SHIFT | SPACE for u in users if self.lanes[u] != own]
            self.storages[allocation] = storage
        if access.dynamic:
            access = _anywhere(access)
        if allocation.address is not None:
            key = (allocation.address, allocation.shape, key)
        return storage.regions.get(key) or storage.add(key, access)

    def _release(self, allocation: Allocation) -> None:
        space = self.spaces.get(allocation.buffer)
        if space is None or allocation.address is not None or allocation in self._released:
            return
        self._released.add(allocation)
        space.release(allocation, self.storages[allocation])

    def _note(self, readers: list[int], me: int, lane: int) -> None:
        """Add a reader; in-order lanes need only their latest."""
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


MEETINGS = ("core_barrier", "sendrecv")


def _anywhere(access: Access) -> Access:
    """A run-time index may touch all of the tensor: the compiler must assume it does."""
    allocation = access.allocation
    whole = type(access)(allocation, access.layout, access.start, True)
    whole.p0, whole.p1 = 0, allocation.partitions
    whole.lo, whole.hi = 0, allocation.pitch_bytes
    return whole
