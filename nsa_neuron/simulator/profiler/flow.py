"""Whose results an instruction reads, and which instructions compute the same values.

The dependencies of `cost` are thinned out to what a schedule needs; here every reader counts. The
finest thing that is told apart is an access pattern of a tensor: a read that fits the last write
exactly has that one source, any other depends on everything written to the tensor before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..issue.record import Instruction, Run
    from ..memory.allocation import Access, Allocation
    from ..memory.layout import Place

MIXED = -1  # the source of a read that fits no single write


class _Contents:
    """What is in a tensor at one point of the program."""

    __slots__ = ("history", "place", "value", "writer", "writers")

    def __init__(self, identity: int) -> None:
        self.history = identity
        self.value = identity
        self.writer = MIXED
        self.place: Place | None = None
        self.writers: list[int] = []


class Flow:
    """Sources, readers and values of all instructions of a run, by their global index.

    Attributes:
        sources: per read of each instruction, who wrote exactly what it reads, or `MIXED`.
        origins: everyone whose results an instruction may read.
        readers: who reads what an instruction wrote first of its results.
        shared: instructions whose first result is also read in part, or with others' results.
        values: a number per instruction, equal for instructions that compute the same from the
            same: same operation, same patterns, same sources. Constants that the program holds
            (`operand0=2.0`) are no part of a record, so work that differs only in them counts as
            the same.
    """

    def __init__(self, run: Run) -> None:
        count = sum(len(core.instructions) for core in run.cores)
        self.sources: list[tuple[int, ...]] = []
        self.origins: list[list[int]] = []
        self.readers: list[list[int]] = [[] for _ in range(count)]
        self.shared: set[int] = set()
        self.values: list[int] = []
        offset = 0
        hbm: dict[Allocation, _Contents] = {}
        for core in run.cores:
            tensors: dict[Allocation, _Contents] = {}
            for k, i in enumerate(core.instructions, offset):
                self._add(k, i, tensors, hbm)
            offset += len(core.instructions)

    def _add(
        self,
        k: int,
        i: Instruction,
        tensors: dict[Allocation, _Contents],
        hbm: dict[Allocation, _Contents],
    ) -> None:
        sources: list[int] = []
        origins: list[int] = []
        values: list[int] = []
        for a in i.reads:
            held = _held(a, tensors, hbm)
            values.append(self._read(k, a, held, sources, origins))
        number = hash((i.opcode, i.params, tuple(values), *(a.layout for a in i.writes)))
        self.sources.append(tuple(sources))
        self.origins.append(origins)
        self.values.append(number)
        for position, a in enumerate(i.writes):
            held = _held(a, tensors, hbm)
            if _whole(a):
                held.writers = []
            elif held.writer != MIXED and held.place is not a.place:
                self.shared.add(held.writer)
            held.writers.append(k)
            before = held.value if i.engine == "tensor" else 0  # products add up
            held.value = hash((number, position, before))
            held.history = hash((held.history, held.value, a.layout, a.start))
            held.writer, held.place = (k, a.place) if not a.dynamic else (MIXED, None)

    def _read(
        self, k: int, a: Access, held: _Contents, sources: list[int], origins: list[int]
    ) -> int:
        origins.extend(held.writers)
        if held.place is a.place and held.writer != MIXED:
            sources.append(held.writer)
            self.readers[held.writer].append(k)
            return held.value
        sources.append(MIXED)
        self.shared.update(held.writers)
        return hash((held.history, a.layout, a.start))


def _held(
    a: Access, tensors: dict[Allocation, _Contents], hbm: dict[Allocation, _Contents]
) -> _Contents:
    """Contents of the tensor of an access; those of HBM are the same to both cores."""
    allocation = a.allocation
    known = tensors if allocation.on_chip else hbm
    held = known.get(allocation)
    if held is None:
        held = known[allocation] = _Contents(0 if allocation.on_chip else id(allocation))
    return held


def _whole(a: Access) -> bool:
    """True where a write replaces all of its tensor."""
    place, allocation = a.place, a.allocation
    return (
        a.layout.dense
        and not a.dynamic
        and place.p0 == 0
        and place.p1 == allocation.partitions
        and place.lo == 0
        and place.hi == allocation.pitch_bytes
    )


def first_of_each(values: Sequence[int]) -> set[int]:
    """Indices of the first instruction of each value: the work without its repetitions."""
    first: dict[int, int] = {}
    for k, value in enumerate(values):
        first.setdefault(value, k)
    return set(first.values())
