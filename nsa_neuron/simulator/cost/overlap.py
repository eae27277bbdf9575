"""Whether two access patterns of one allocation can touch the same byte.

Patterns with holes (a column block of a row-major matrix) meet in their hulls although they share
nothing. Here a pattern is cut at a stride into rows and columns, again and again, until two of the
parts are apart. "May overlap" is safe: it costs a dependency that is not there, never loses one.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..memory.allocation import Access
    from ..memory.layout import Layout

# A pattern: first byte (or row), and (step, count) pairs with positive steps, largest first.
Dims = tuple[tuple[int, int], ...]


def may_overlap(a: Access, b: Access) -> bool:
    """Tell whether two accesses can meet; exact for blocks of a tensor, else on the safe side.

    Args:
        a, b: accesses of one allocation, or of addressed tensors of one memory.
    """
    if not a.overlaps(b):
        return False
    p, q = a.place, b.place
    if (p.layout.dense and q.layout.dense) or p.dynamic or q.dynamic:
        return True
    if a.allocation is not b.allocation:
        return True
    return _patterns_meet(p.lo, p.layout, q.lo, q.layout)


# Loops over fresh tensors compare the same patterns at the same places again and again.
@lru_cache(maxsize=1 << 16)
def _patterns_meet(lo_a: int, a: Layout, lo_b: int, b: Layout) -> bool:
    return _meet(lo_a, _dims(a), lo_b, _dims(b))


@cache
def _dims(layout: Layout) -> Dims:
    """(step, count) in bytes of the free pattern, largest step first, merged, bytes last."""
    size = layout.dtype.itemsize
    first = 1 if layout.pitch else 0
    dims = sorted(
        (
            (abs(step) * size, count)
            for step, count in zip(layout.strides[first:], layout.shape[first:], strict=True)
            if count > 1 and step
        ),
        reverse=True,
    )
    merged: list[tuple[int, int]] = [(1, size)]
    for step, count in reversed(dims):
        inner_step, inner_count = merged[-1]
        if step == inner_step * inner_count:
            merged[-1] = (inner_step, inner_count * count)
        else:
            merged.append((step, count))
    return tuple(reversed(merged))


def _extent(dims: Dims) -> int:
    """Length of the hull."""
    return sum(step * (count - 1) for step, count in dims) + 1


def _meet(start_a: int, a: Dims, start_b: int, b: Dims) -> bool:
    """Whether two patterns of positive steps share a position."""
    if start_a + _extent(a) <= start_b or start_b + _extent(b) <= start_a:
        return False
    pitch = max(a[0][0] if a else 1, b[0][0] if b else 1)
    if pitch <= 1:
        return True
    cut_a, cut_b = _cut(start_a, a, pitch), _cut(start_b, b, pitch)
    if cut_a is None or cut_b is None:
        return True
    (row_a, rows_a, column_a, columns_a), (row_b, rows_b, column_b, columns_b) = cut_a, cut_b
    return _meet(column_a, columns_a, column_b, columns_b) and _meet(row_a, rows_a, row_b, rows_b)


def _cut(start: int, dims: Dims, pitch: int) -> tuple[int, Dims, int, Dims] | None:
    """Rows and columns of a pattern at a pitch; None where a row wraps around."""
    rows = tuple((step // pitch, count) for step, count in dims if step % pitch == 0)
    columns = tuple((step, count) for step, count in dims if step % pitch)
    row, column = divmod(start, pitch)
    if any(step > pitch for step, _ in columns) or column + _extent(columns) > pitch:
        return None
    return row, rows, column, columns
