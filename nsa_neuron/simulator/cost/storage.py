"""What is known of the bytes of each tensor: who wrote them last, who read them since; and room."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from .overlap import may_overlap

if TYPE_CHECKING:
    from ..access import Access
    from ..memory import Allocation

_NARROW_ENOUGH = 64  # stretches a region may span before it is kept aside
_FEW = 8  # regions that are sooner looked through than looked up
_NONE: list[Region] = []
_NOBODY: list[int] = []


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
        self.near: list[Region] = _NONE  # shared until the first neighbour
        self.written = False

    def meets(self, other: Region) -> None:
        """Make neighbours of two regions."""
        for a, b in ((self, other), (other, self)):
            if a.near is _NONE:
                a.near = []
            a.near.append(b)

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


class Index:
    """Regions by the stretch of bytes they lie in."""

    __slots__ = ("buckets", "wide", "width")

    def __init__(self, width: int) -> None:
        self.buckets: dict[int, list[Region]] = {}
        self.wide: list[Region] = []
        self.width = width

    def insert(self, region: Region) -> None:
        """Add a region."""
        lo, hi = _bytes(region.access)
        first, last = lo // self.width, (hi - 1) // self.width
        if last - first >= _NARROW_ENOUGH:
            self.wide.append(region)
            return
        for b in range(first, last + 1):
            self.buckets.setdefault(b, []).append(region)

    def around(self, region: Region) -> list[Region]:
        """Regions whose hulls may meet that of `region`, each once."""
        lo, hi = _bytes(region.access)
        first, last = lo // self.width, (hi - 1) // self.width
        if first == last:
            return self.wide + self.buckets.get(first, [])
        if last - first >= _NARROW_ENOUGH:
            lists = list(self.buckets.values())
        else:
            lists = [self.buckets[b] for b in range(first, last + 1) if b in self.buckets]
        return self.wide + list(dict.fromkeys(r for found in lists for r in found))


class Storage:
    """The patterns used in one allocation, or in all addressed tensors of one memory.

    Attributes:
        regions: by pattern and place.
        all, written: the same by place; made once there are several, as most tensors have few.
    """

    __slots__ = ("all", "regions", "written")

    def __init__(self) -> None:
        self.regions: dict[object, Region] = {}
        self.all: Index | None = None
        self.written: Index | None = None

    def add(self, key: object, access: Access) -> Region:
        """Make the region of a new pattern; find the written regions it meets."""
        region = Region(access)
        regions = self.regions
        if regions:
            if self.all is None and len(regions) >= _FEW:
                self._make_indices()
            if self.all is not None and self.written is not None:
                others = self.written.around(region)
                self.all.insert(region)
            else:
                others = [r for r in regions.values() if r.written]
            for other in others:
                if may_overlap(access, other.access):
                    region.meets(other)
        regions[key] = region
        return region

    def write(self, region: Region) -> None:
        """Note that a region is written for the first time; find those only read that it meets."""
        region.written = True
        if self.all is None and len(self.regions) == 1:
            return
        others = self.regions.values() if self.all is None else self.all.around(region)
        for other in others:
            if not other.written and may_overlap(region.access, other.access):
                region.meets(other)
        if self.written is not None:
            self.written.insert(region)

    def _make_indices(self) -> None:
        lo, hi = _bytes(next(iter(self.regions.values())).access)
        self.all, self.written = Index(max(hi - lo, 1)), Index(max(hi - lo, 1))
        for region in self.regions.values():
            self.all.insert(region)
            if region.written:
                self.written.insert(region)

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
        if self.free >= 0:
            return _NOBODY
        users: list[int] = []
        while self.free < 0 and self.released:
            size, storage = self.released.popleft()
            self.free += size
            users += storage.last_users()
        return users

    def release(self, a: Allocation, storage: Storage) -> None:
        """Note that a tensor was used for the last time."""
        self.released.append((self.size(a), storage))
