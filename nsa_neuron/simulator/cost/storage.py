"""What is known of the bytes of each tensor: who wrote them last, who read them since; and room."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from ..run.coverage import QUARTERS, quarters
from .overlap import may_overlap

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..machine.trn2 import Machine
    from ..memory.allocation import Access, Allocation
    from ..memory.layout import Form, Place

_NARROW_ENOUGH = 64  # stretches a region may span before it is kept aside
_FEW = 8  # regions that are sooner looked through than looked up
_MEETS, _COVERS, _COVERED = 1, 2, 4
_NONE: list[Region] = []  # never appended to
NOBODY: list[int] = []  # likewise


class Region:
    """An access pattern of a storage, its last writer and the readers since.

    Attributes:
        access: the pattern.
        place: what the regions of one tensor are told apart by.
        writer: index of the last instruction that wrote it, -1 before.
        readers: who read it since, at most the latest per lane; `_NOBODY` where none did.
        near: other patterns that may touch the same bytes, of which one of the two was written.
        inside: those of them that a write here overwrites as a whole.
        released: of the first region of a tensor: True once the tensor's room was given back.
        written: True once an instruction wrote it.
    """

    __slots__ = ("access", "inside", "near", "place", "readers", "released", "writer", "written")

    def __init__(self, access: Access, place: Place) -> None:
        self.access = access
        self.place = place
        self.writer = -1
        self.readers = NOBODY
        self.near = self.inside = _NONE
        self.written = self.released = False

    def meets(self, other: Region, relation: int) -> None:
        """Make neighbours of two regions."""
        if self.near:
            self.near.append(other)
        else:
            self.near = [other]
        if other.near:
            other.near.append(self)
        else:
            other.near = [self]
        if relation & _COVERS:
            self.inside = [*self.inside, other]
        if relation & _COVERED:
            other.inside = [*other.inside, self]


class Relations:
    """How access patterns lie to each other: equal ones meet in tensor after tensor."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[tuple[Place, Place], int] = {}

    def of(self, a: Access, b: Access) -> int:
        """0 where two patterns of a storage are apart, else bits: meet, covers, covered."""
        if a.allocation is not b.allocation:  # at addresses of their own
            return _relation(a, b)
        pair = (a.place, b.place)
        known = self._known.get(pair)
        if known is None:
            known = self._known[pair] = _relation(a, b)
        return known


def _relation(a: Access, b: Access) -> int:
    if not may_overlap(a, b):
        return 0
    return _MEETS | (_COVERS if _covers(a, b) else 0) | (_COVERED if _covers(b, a) else 0)


def _covers(one: Access, other: Access) -> bool:
    """True when a write of one pattern overwrites all of another."""
    a, b = one.place, other.place
    return (
        a.layout.dense
        and not a.dynamic
        and one.allocation is other.allocation
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
        buckets = self.buckets
        for b in range(first, last + 1):
            if b in buckets:
                buckets[b].append(region)
            else:
                buckets[b] = [region]

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

    Args:
        regions: by what stands for pattern and place; may be filled further by others.
        relations: of patterns.

    Attributes:
        regions, relations: as above.
        all, written: regions by place; made once there are several, as most tensors have few.
    """

    __slots__ = ("all", "regions", "relations", "written")

    def __init__(self, regions: dict[object, Region], relations: Relations) -> None:
        self.regions = regions
        self.relations = relations
        self.all: Index | None = None
        self.written: Index | None = None

    def add(self, key: object, region: Region) -> Region:
        """Take in the region of a new pattern; find the written regions it meets."""
        access = region.access
        regions = self.regions
        if regions:
            if self.all is None and len(regions) >= _FEW:
                self._make_indices()
            if self.all is not None and self.written is not None:
                others = self.written.around(region)
                self.all.insert(region)
            else:
                others = [r for r in regions.values() if r.written]
            relation_of = self.relations.of
            for other in others:
                relation = relation_of(access, other.access)
                if relation:
                    region.meets(other, relation)
        regions[key] = region
        return region

    def write(self, region: Region) -> None:
        """Note that a region is written for the first time; find those only read that it meets."""
        region.written = True
        others = self.regions.values() if self.all is None else self.all.around(region)
        for other in others:
            if not other.written:
                relation = self.relations.of(region.access, other.access)
                if relation:
                    region.meets(other, relation)
        if self.written is not None:
            self.written.insert(region)

    def _make_indices(self) -> None:
        lo, hi = _bytes(next(iter(self.regions.values())).access)
        self.all, self.written = Index(max(hi - lo, 1)), Index(max(hi - lo, 1))
        for region in self.regions.values():
            self.all.insert(region)
            if region.written:
                self.written.insert(region)


def _bytes(access: Access) -> tuple[int, int]:
    """Hull in bytes of a partition of the memory, or of the tensor."""
    address, place = access.allocation.address, access.place
    base = address[1] if address else 0
    return place.lo + base, place.hi + base


class Space:
    """Bytes per partition of one memory that the compiler shares out, on average over partitions.

    Args:
        limit: what there is.
        granule: a PSUM bank, else 1.
        machine: sizes.
    """

    def __init__(self, limit: int, granule: int, machine: Machine) -> None:
        self.free = limit
        self.granule = granule
        self.machine = machine
        self._sizes: dict[Form, int] = {}
        self.released: deque[tuple[int, Iterable[Region]]] = deque()

    def size(self, a: Allocation) -> int:
        """Bytes in whole granules; less where a tile leaves quarters of the partitions free."""
        size = self._sizes.get(a.form)
        if size is None:
            bytes_ = -(-a.pitch_bytes // self.granule) * self.granule
            size = self._sizes[a.form] = -(-bytes_ * quarters(a, self.machine) // QUARTERS)
        return size

    def reclaim(self) -> list[int]:
        """Make up for taking more than there was; return the instructions that must have ended."""
        users: list[int] = []
        free, released = self.free, self.released
        while free < 0 and released:
            size, regions = released.popleft()
            free += size
            if free > 0:  # the rest can be had once the same instructions have ended
                released.appendleft((free, regions))
                free = 0
            for region in regions:
                if region.readers:
                    users += region.readers
                elif region.writer >= 0:
                    users.append(region.writer)
        self.free = free
        return users

    def release(self, a: Allocation, regions: Iterable[Region]) -> None:
        """Note that a tensor was used for the last time."""
        self.released.append((self.size(a), regions))
