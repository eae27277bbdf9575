"""How much of a call the kernels of selected attention hold at once, so that it fits SBUF.

A partition has 212,984 bytes (trainium2.md, part 2.1). What grows with a call: tensors of a body's
queries, lists and ids, gathered keys in all their forms, and running sums. Each has its share here;
which it is per query or key is counted from the kernels' tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

PARTITIONS = 128
QUADRANT = 32
"""Partitions: where an instruction on few of them may start."""

MIN_QUERIES = 32
"""Of a tile; fewer gather more blocks per query, more see more of what they did not choose."""

MOST_ROWS = 1024
"""Queries x heads of a tile of more than one query."""

BODY_BYTES = 40_000
LIST_BYTES = 24_000
KEY_BYTES = 150_000


@dataclass(frozen=True)
class Sizes:
    """Attributes:
    page: tokens of a page. queries: of a tile, before the call's own number. body: tiles of a
        body of the kernel's loop. blocks: gathered at a time.
    """

    page: int
    queries: int
    body: int
    blocks: int


def page_of(select_block: int) -> int:
    """The largest divisor of a block's length that fits the partitions."""
    return next(size for size in range(PARTITIONS, 0, -1) if select_block % size == 0)


def queries_of(group: int) -> int:
    """Queries of a tile where G heads share a kv head."""
    return max(1, min(max(MIN_QUERIES, PARTITIONS // group), MOST_ROWS // group))


def choose(
    constants: Mapping[str, Any], select_block: int, group: int, dims: tuple[int, int],
    per_query: int, item: int, *, backward: bool,
) -> Sizes:  # fmt: skip
    """Sizes of a call.

    Args:
        constants: `tiles_per_body` and `blocks_per_trip`, upper limits.
        dims: Dk, Dv. per_query: n. item: bytes of an element.
    """
    page, queries = page_of(select_block), queries_of(group)
    rows = queries * group
    parts = -(-rows // PARTITIONS)
    dk, dv = dims
    chunks = -(-(dk + QUADRANT) // PARTITIONS), -(-dv // PARTITIONS)
    # Gathered tiles of two steps; K^T of two; the mask.
    per_key = item * 2 * ((dk + dv) / PARTITIONS + chunks[0]) + 4
    per_tile = item * rows * chunks[0]
    if backward:
        # V^T, p and ds of two tiles; dO^T, and q, dO and o as they are.
        per_key += item * (2 * chunks[1] + 4 * parts)
        per_tile += item * (rows * chunks[1] + parts * (dk + 2 * dv))
    step = PARTITIONS // page
    body = max(1, min(BODY_BYTES // per_tile, constants["tiles_per_body"]))
    keys = KEY_BYTES + max(0, BODY_BYTES - body * per_tile)  # and what a body leaves
    blocks = max(1, min(int(keys / per_key) // page, constants["blocks_per_trip"]))
    blocks = max(step, blocks // step * step)
    ids = per_query * (select_block // page)
    return Sizes(page, queries, max(1, min(body, LIST_BYTES // (8 * (ids + blocks)))), blocks)
