"""The access patterns of each tensor, made once and lent from one tensor to the next made alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..memory.allocation import access_at
from .storage import FEW, NOBODY, Region, Relations, Storage
from .timeline import SHIFT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..memory.allocation import Access
    from ..memory.layout import Place
    from .space import Space


class Patterns(dict[Any, Region]):
    """The regions of one tensor by place; one that is looked up for the first time is added.

    Args:
        access: the tensor's first.
        relations: of patterns.

    Attributes:
        first: the region of the first access; patterns are compared within its tensor, which lends
            them to others (see `Spares`).
        space, size: where the compiler makes room for the tensor, and bytes; None for all others.
        lent: True once that room was given back although addresses are still read from the tensor.
        regions: all of them, in the order of their first use.
        alike: the spare ones of tensors made and first used alike.
    """

    __slots__ = ("alike", "first", "lent", "regions", "relations", "size", "space")

    def __init__(self, access: Access, relations: Relations) -> None:
        super().__init__()
        self.relations = relations
        self.space: Space | None = None
        self.size = 0
        self.lent = False
        self.alike: list[Patterns] = []
        self.first = self._first(access)
        self.regions = [self.first]

    def _first(self, access: Access) -> Region:
        region = self[access.place] = self.relations.region(access)
        return region

    def __missing__(self, place: Place) -> Region:
        first = self.first
        region = self.relations.region(access_at(first.access.allocation, place))
        storage = first.storage or Storage.of_tensor(self, first, self.relations)
        self.regions.append(region)
        return storage.add(place, region)


def users_of(regions: Iterable[Region]) -> list[int]:
    """Who must have ended before the bytes of a tensor can be another's."""
    users: list[int] = []
    for region in regions:
        if region.reader >= 0:
            users.append(region.reader)
            if region.readers:
                users += region.readers
        elif region.writer >= 0:
            users.append(region.writer >> SHIFT)
    return users


class Addressed(Patterns):
    """The regions of a tensor with an address, whose bytes others may have: found by their bytes.

    Args:
        access: the tensor's first.
        relations: of patterns.
        arena: the memory.
    """

    __slots__ = ("allocation", "arena")

    def __init__(self, access: Access, relations: Relations, arena: Storage) -> None:
        self.allocation = access.allocation
        self.arena = arena
        super().__init__(access, relations)

    def _first(self, access: Access) -> Region:
        return self[access.place]

    def __missing__(self, place: Place) -> Region:
        allocation, known = self.allocation, self.arena.regions
        key = allocation.address, allocation.shape, place.layout, place.start, place.dynamic
        region = known.get(key)
        if region is None:
            region = self.arena.add(key, self.relations.region(access_at(allocation, place)))
        self[place] = region
        return region


class Spares(dict["Place", list[Patterns]]):
    """Patterns of tensors that are no more, for the next tensor made and first used alike.

    A loop's tensors come and go, so their patterns are found and compared once, not in every
    iteration. What the next tensor does not use of them has neither writer nor readers: nobody
    ever waits for it.
    """

    __slots__ = ()

    def keep(self, patterns: Patterns) -> list[int]:
        """Take in the patterns of a tensor; return who used it."""
        users: list[int] = []
        for region in patterns.regions:
            if region.reader >= 0:
                users.append(region.reader)
                region.reader = -1
                if region.readers:
                    users += region.readers
                    region.readers = NOBODY
            elif region.writer >= 0:
                users.append(region.writer >> SHIFT)
            region.writer = -1
        if len(patterns.regions) < FEW:
            patterns.alike.append(patterns)
        return users
