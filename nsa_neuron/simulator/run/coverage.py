"""Room on chip: the quarters of the partitions that a tensor takes, and bytes in use there."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..machine.trn2 import Machine
    from ..memory.allocation import Allocation
    from ..memory.layout import Form

QUARTERS = 4


def quarters(a: Allocation | Form, machine: Machine) -> int:
    """Quarters of the partitions that a tensor takes: 1, 2 or 4; all of a PSUM bank."""
    if a.buffer != "sbuf" or a.partitions > 2 * machine.quadrant:
        return QUARTERS
    return 1 if a.partitions <= machine.quadrant else 2


def quarters_of(a: Allocation, machine: Machine) -> range:
    """Which quarters a tensor with an address lies on; all of a PSUM bank."""
    if a.buffer != "sbuf":
        return range(QUARTERS)
    last = a.partition + a.partitions - 1
    return range(a.partition // machine.quadrant, last // machine.quadrant + 1)


class Coverage:
    """The union of byte ranges, which are known beforehand and come and go: log n per change.

    Args:
        spans: every [first, last) that will be added.
    """

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        self._edges = sorted({edge for span in spans for edge in span})
        pieces = max(len(self._edges) - 1, 1)
        self._leaves = 1 << (pieces - 1).bit_length()
        self._count = [0] * (2 * self._leaves)  # ranges that cover all of a node
        self._covered = [0] * (2 * self._leaves)
        self._size = [0] * (2 * self._leaves)
        for k in range(len(self._edges) - 1):
            self._size[self._leaves + k] = self._edges[k + 1] - self._edges[k]
        for node in range(self._leaves - 1, 0, -1):
            self._size[node] = self._size[2 * node] + self._size[2 * node + 1]

    @property
    def covered(self) -> int:
        """Bytes covered now."""
        return self._covered[1]

    def change(self, first: int, last: int, step: int) -> None:
        """Add (1) or take away (-1) a range."""
        low = self._leaves + bisect_left(self._edges, first)
        high = self._leaves + bisect_left(self._edges, last)
        left, right = low, high - 1
        while low < high:
            if low & 1:
                self._count[low] += step
                self._update(low)
                low += 1
            if high & 1:
                high -= 1
                self._count[high] += step
                self._update(high)
            low >>= 1
            high >>= 1
        for node in (left, right):
            while node > 1:
                node >>= 1
                self._update(node)

    def _update(self, node: int) -> None:
        if self._count[node]:
            self._covered[node] = self._size[node]
        elif node >= self._leaves:
            self._covered[node] = 0
        else:
            self._covered[node] = self._covered[2 * node] + self._covered[2 * node + 1]
