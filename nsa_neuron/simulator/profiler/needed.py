"""HBM bytes that a kernel cannot do without: each byte of an argument or result counted once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..issue.record import Run
    from ..memory.allocation import Access, Allocation
    from ..memory.layout import Layout

MARKED = 1 << 26  # elements of a tensor up to which each is marked


def needed_bytes(run: Run) -> int:
    """Distinct bytes of arguments that are read, and of arguments and results that are written.

    What is read twice, written twice, or moved by both cores counts once; what a kernel keeps in
    HBM for itself counts not at all.
    """
    reads: dict[Allocation, dict[tuple[Layout, int], Access]] = {}
    writes: dict[Allocation, dict[tuple[Layout, int], Access]] = {}
    for core in run.cores:
        for i in core.instructions:
            for a in i.reads:
                if not a.allocation.on_chip and a.allocation.role == "input":
                    reads.setdefault(a.allocation, {})[a.layout, a.start] = a
            for a in i.writes:
                if not a.allocation.on_chip and a.allocation.role != "scratch":
                    writes.setdefault(a.allocation, {})[a.layout, a.start] = a
    return sum(
        _distinct(allocation, found.values())
        for kind in (reads, writes)
        for allocation, found in kind.items()
    )


def _distinct(allocation: Allocation, accesses: Iterable[Access]) -> int:
    """Bytes of a tensor that some patterns touch; of run-time places as many as they move."""
    accesses = list(accesses)
    if all(a.layout.dense and not a.dynamic for a in accesses):
        return _union([(a.place.lo, a.place.hi) for a in accesses])
    size, item = allocation.nbytes, allocation.dtype.itemsize
    fixed = all(not a.dynamic and a.inside and a.layout.dtype.itemsize == item for a in accesses)
    if not fixed or size // item > MARKED:
        return min(size, sum(a.nbytes for a in accesses))
    touched = np.zeros(size // item, np.bool_)
    for a in accesses:
        layout = a.layout
        if layout.low < 0:
            touched[a.start + layout.low : a.start + layout.high + 1] = True
        else:
            view = np.lib.stride_tricks.as_strided(touched[a.start :], layout.shape, layout.strides)
            view[...] = True
    return int(np.count_nonzero(touched)) * item


def _union(spans: list[tuple[int, int]]) -> int:
    total = until = 0
    for first, last in sorted(spans):
        total += max(0, last - max(first, until))
        until = max(until, last)
    return total
