"""What is known of the bytes of each tensor: who wrote them last, and who read them since."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..memory.allocation import access_at
from .overlap import may_overlap

if TYPE_CHECKING:
    from ..memory.allocation import Access
    from ..memory.layout import Place

_NARROW_ENOUGH = 64  # stretches a region may span before it is kept aside
FEW = 8  # regions that are sooner looked through than looked up
_MEETS, _COVERS, _COVERED = 1, 2, 4
_NONE: list[Region] = []  # never appended to
NOBODY: list[int] = []  # likewise


class Region:
    """An access pattern of a storage, its last writer and the readers since.

    Attributes:
        access: the pattern.
        place: what the regions of one tensor are told apart by.
        writer: what a reader depends on: the last instruction that wrote it, as `producer << SHIFT
            | Cause.RAW`; -1 before.
        reader, readers: who read it since, at most the latest per lane: the first of them, -1
            before any, and the others, `NOBODY` where there are none.
        near: other patterns that may touch the same bytes, of which one of the two was written.
        inside: those of them that a write here overwrites as a whole.
        storage: what the patterns of its bytes are in, once there are several.
        written: True once an instruction wrote it, or wrote what it was before (see `Spares`).
    """

    __slots__ = (
        "access",
        "inside",
        "near",
        "place",
        "reader",
        "readers",
        "storage",
        "writer",
        "written",
    )

    def __init__(self, access: Access, place: Place) -> None:
        self.access = access
        self.place = place
        self.writer = self.reader = -1
        self.readers = NOBODY
        self.near = self.inside = _NONE
        self.storage: Storage | None = None
        self.written = False

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

    __slots__ = ("_everywhere", "_known", "_starts")

    def __init__(self) -> None:
        self._known: dict[tuple[Place, Place], int] = {}
        self._starts: dict[tuple[Place, bool], Stage] = {}
        self._everywhere: dict[Place, Place] = {}

    def region(self, access: Access) -> Region:
        """A region of its own; known at run time only, it may be all of the tensor's bytes."""
        place = access.place
        region = Region(access, place)
        if place.dynamic:
            allocation = access.allocation
            whole = self._everywhere.get(place)
            if whole is None:
                whole = self._everywhere[place] = place.anywhere(allocation.form)
            region.access = access_at(allocation, whole)
        return region

    def start(self, first: Region) -> Stage:
        """The stage of tensors of which one pattern was used, this one."""
        key = (first.place, first.written)
        found = self._starts.get(key)
        if found is None:
            found = self._starts[key] = Stage()
        return found

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


class Stage:
    """What was done with a tensor so far: which patterns appeared, and which of them were written.

    A loop uses tensor after tensor in the same way, so what a new pattern meets is looked up by the
    stage of the tensor instead of being found again among its patterns.

    Attributes:
        added, wrote: by place, the stage that comes next and the patterns, by number, that a new
            one meets or that one written for the first time does.
    """

    __slots__ = ("added", "wrote")

    def __init__(self) -> None:
        self.added: dict[Place, Step] = {}
        self.wrote: dict[Place, Step] = {}


# The next stage; patterns that are met, those of them covered, those of them that cover.
Step = tuple[Stage, tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class Storage:
    """The patterns used in one allocation, or in all addressed tensors of one memory.

    Args:
        relations: of patterns.

    Attributes:
        regions: by what stands for pattern and place.
        patterns, stage: the same in order, and what was done with them, while a tensor has few.
        all, written: regions by their bytes, once there are many.
    """

    __slots__ = ("all", "patterns", "regions", "relations", "stage", "written")

    def __init__(self, relations: Relations) -> None:
        self.regions: dict[Any, Region] = {}
        self.patterns: list[Region] = []
        self.stage: Stage | None = None
        self.relations = relations
        self.all: Index | None = None
        self.written: Index | None = None

    @classmethod
    def of_tensor(cls, regions: dict[Any, Region], first: Region, relations: Relations) -> Storage:
        """The storage of a tensor of which a second pattern is about to appear."""
        new = cls(relations)
        new.regions = regions
        new.patterns.append(first)
        new.stage = relations.start(first)
        first.storage = new
        return new

    def add(self, key: Any, region: Region) -> Region:
        """Take in the region of a new pattern; find the written regions it meets."""
        stage = self.stage
        if stage is not None and len(self.patterns) < FEW:
            step = stage.added.get(key)
            if step is None:
                step = stage.added[key] = self._step(region, True)
            self._follow(region, step)
            self.patterns.append(region)
        else:
            self._look_around(region)
        self.regions[key] = region
        region.storage = self
        return region

    def write(self, region: Region) -> None:
        """Note that a region is written for the first time; find those only read that it meets."""
        stage = self.stage
        if stage is not None:
            step = stage.wrote.get(region.place)
            if step is None:
                step = stage.wrote[region.place] = self._step(region, False)
            self._follow(region, step)
            return
        others = self.regions.values() if self.all is None else self.all.around(region)
        for other in others:
            if not other.written:
                relation = self.relations.of(region.access, other.access)
                if relation:
                    region.meets(other, relation)
        if self.written is not None:
            self.written.insert(region)

    def _step(self, region: Region, written: bool) -> Step:
        """What a region meets among those that were written, or among those that were not."""
        relation_of = self.relations.of
        met = {
            k: relation_of(region.access, other.access)
            for k, other in enumerate(self.patterns)
            if other is not region and other.written is written
        }
        near, covered, covers = (
            tuple([k for k, relation in met.items() if relation & bit])
            for bit in (_MEETS, _COVERS, _COVERED)
        )
        return Stage(), near, covered, covers

    def _follow(self, region: Region, step: Step) -> None:
        """Make neighbours of a region and those that it meets."""
        self.stage, near, covered, covers = step
        if near:
            patterns = self.patterns
            met = [patterns[k] for k in near]
            for other in met:
                if other.near:
                    other.near.append(region)
                else:
                    other.near = [region]
            region.near = region.near + met if region.near else met
            if covered:
                region.inside = region.inside + [patterns[k] for k in covered]
            for k in covers:
                patterns[k].inside = [*patterns[k].inside, region]

    def _look_around(self, region: Region) -> None:
        """Find the written regions that one meets among many, or among those of other tensors."""
        self.stage = None
        regions = self.regions
        if self.all is None and len(regions) >= FEW:
            self._make_indices()
        if self.all is not None and self.written is not None:
            others = self.written.around(region)
            self.all.insert(region)
        else:
            others = [r for r in regions.values() if r.written]
        relation_of = self.relations.of
        for other in others:
            relation = relation_of(region.access, other.access)
            if relation:
                region.meets(other, relation)

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
