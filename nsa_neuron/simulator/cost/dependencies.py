"""Who waits for whom: RAW, WAR and WAW on the bytes each instruction touches, and reuse of space.

This depends on the program alone, not on the constants, so it is computed once per run. Engines
execute in order, so an instruction never waits for an older one of its own engine except to read
its result; TensorE accumulates in PSUM without waiting for itself.

Tensors that the compiler places share the bytes of SBUF and PSUM: a tensor's first use waits until
tensors that were used last before it have left enough room, oldest first (a perfect allocator that
reuses space as late as it can).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from .overlap import may_overlap
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
_NARROW_ENOUGH = 64  # buckets a region may span before it is kept aside


class Region:
    """An access pattern of a storage, its last writer and the readers since.

    Attributes:
        access: the pattern.
        writer: index of the last instruction that wrote it, -1 before.
        readers: who read it since, at most the latest per lane.
        near: other patterns that may touch the same bytes, of which one of the two was written.
        written: True once an instruction wrote it.
    """

    __slots__ = ("access", "near", "readers", "writer", "written")

    def __init__(self, access: Access) -> None:
        self.access = access
        self.writer = -1
        self.readers: list[int] = []
        self.near: list[Region] = []
        self.written = False

    def covers(self, other: Region) -> bool:
        """True when a write here overwrites all of another pattern."""
        a, b = self.access, other.access
        return (
            a.layout.dense
            and not a.dynamic
            and a.allocation is b.allocation
            and a.p0 <= b.p0
            and a.p1 >= b.p1
            and a.lo <= b.lo
            and a.hi >= b.hi
        )


class Storage:
    """The patterns used in one allocation, or in all addressed tensors of one memory."""

    __slots__ = ("buckets", "regions", "wide", "width")

    def __init__(self) -> None:
        self.regions: dict[object, Region] = {}
        self.buckets: dict[int, list[Region]] | None = None  # made for the second region
        self.wide: list[Region] = []
        self.width = 1

    def add(self, key: object, access: Access) -> Region:
        """Make the region of a new pattern and find its neighbours."""
        region = Region(access)
        if not self.regions:
            self.regions[key] = region
            return region
        if self.buckets is None:
            (first,) = self.regions.values()
            lo, hi = _bytes(first.access)
            self.width = max(hi - lo, 1)
            self.buckets = {}
            self._file(first, self.buckets)
        for other in self._file(region, self.buckets):
            if other.written and may_overlap(access, other.access):
                region.near.append(other)
                other.near.append(region)
        self.regions[key] = region
        return region

    def write(self, region: Region) -> None:
        """Note that a region is written for the first time, which makes its neighbours matter."""
        region.written = True
        if self.buckets is None:
            return
        for other in self._candidates(region):
            if (
                other is not region
                and not other.written
                and may_overlap(region.access, other.access)
            ):
                region.near.append(other)
                other.near.append(region)

    def _candidates(self, region: Region) -> list[Region]:
        """Regions of the same buckets."""
        assert self.buckets is not None
        lo, hi = _bytes(region.access)
        first, last = lo // self.width, (hi - 1) // self.width
        if last - first >= _NARROW_ENOUGH:
            return list(self.regions.values())
        found = {id(r): r for r in self.wide}
        for b in range(first, last + 1):
            for r in self.buckets.get(b, ()):
                found[id(r)] = r
        return list(found.values())

    def _file(self, region: Region, buckets: dict[int, list[Region]]) -> list[Region]:
        """Put a region in its buckets; return those that were there."""
        found = self._candidates(region)
        lo, hi = _bytes(region.access)
        first, last = lo // self.width, (hi - 1) // self.width
        if last - first >= _NARROW_ENOUGH:
            self.wide.append(region)
        else:
            for b in range(first, last + 1):
                buckets.setdefault(b, []).append(region)
        return found

    def last_users(self) -> list[int]:
        """Instructions that must end before the bytes are anybody else's."""
        users: list[int] = []
        for region in self.regions.values():
            if region.readers:
                users += region.readers
            elif region.writer >= 0:
                users.append(region.writer)
        return users


def _bytes(access: Access) -> tuple[int, int]:
    """Hull in bytes of a partition of the memory, or of the tensor."""
    address = access.allocation.address
    base = address[1] if address else 0
    return access.lo + base, access.hi + base


class Space:
    """Bytes per partition of one memory that the compiler shares out."""

    def __init__(self, limit: int, granule: int) -> None:
        self.free = limit
        self.granule = granule
        self.released: deque[tuple[int, Storage]] = deque()

    def size(self, a: Allocation) -> int:
        """Bytes per partition, in whole granules (PSUM banks)."""
        return -(-a.pitch_bytes // self.granule) * self.granule

    def take(self, a: Allocation) -> list[int]:
        """Place a tensor; return the instructions that must have ended."""
        self.free -= self.size(a)
        users: list[int] = []
        while self.free < 0 and self.released:
            size, storage = self.released.popleft()
            self.free += size
            users += storage.last_users()
        return users

    def release(self, a: Allocation, storage: Storage) -> None:
        """Note that a tensor was used for the last time."""
        self.released.append((self.size(a), storage))


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
        self._fence = -1
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
                region = (
                    storage.regions.get((access.start, access.layout, access.dynamic))
                    if storage is not None
                    else None
                ) or self._region(access, lane, deps)
                if region.writer >= 0:
                    deps.append(region.writer << SHIFT | RAW)
                for other in region.near:
                    if other.writer >= 0:
                        deps.append(other.writer << SHIFT | RAW)
                readers = region.readers
                if lane < in_order and readers and lanes[readers[-1]] == lane:
                    readers[-1] = me
                else:
                    self._note(readers, me, lane)
                if allocation.last_use == me:
                    self._release(allocation)
            for access in i.writes:
                allocation = access.allocation
                storage = storages.get(allocation)
                region = (
                    storage.regions.get((access.start, access.layout, access.dynamic))
                    if storage is not None
                    else None
                ) or self._region(access, lane, deps)
                if not region.written:
                    storages[allocation].write(region)
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

    def _region(self, access: Access, lane: int, deps: list[int]) -> Region:
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
        key: object = (access.start, access.layout, access.dynamic)
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
        """Meetings wait for all earlier use of shared HBM; later use waits for them."""
        if i.opcode in MEETINGS:
            deps += [u << SHIFT | EDGE for u in self._shared_users.values()]
            self._shared_users = {lane: me}
            self._fence = me
            return
        if any(a.allocation.buffer == "shared_hbm" for a in (*i.writes, *i.reads)):
            if self._fence >= 0:
                deps.append(self._fence << SHIFT | EDGE)
            self._shared_users[me if lane >= self.in_order else -1 - lane] = me


MEETINGS = ("core_barrier", "sendrecv")


def _anywhere(access: Access) -> Access:
    """A run-time index may touch all of the tensor: the compiler must assume it does."""
    allocation = access.allocation
    whole = type(access)(allocation, access.layout, access.start, True)
    whole.p0, whole.p1 = 0, allocation.partitions
    whole.lo, whole.hi = 0, allocation.pitch_bytes
    return whole
