"""Hardware loops over groups of queries, and over the chunks of keys that a group sees.

A group is some tiles of up to 512 rows of one kv head, done by one body. Groups come in pairs whose
trip counts are those of both, one for each of two cores, so that lnc 1 and 2 run the same
arithmetic. Chunks that every query of a pair sees need no mask; they come in two sizes, since large
bodies keep the engines busy and small ones waste little at the edges.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import sbuf
from nki_kernels.common.cores import this_core
from nki_kernels.common.queues import fetch
from nki_kernels.common.range_attention.geometry import (
    Tile,
    head_groups,
    queries_per_part,
)
from nki_kernels.common.range_attention.operands import Chunks

PARTS = 4  # of a tile
PIECE = 1024  # keys of one load


class Loops(nl.NKIObject):
    """Sizes, and which loops there are.

    Attributes:
        tiles: of rows in a group. large, small: keys of a chunk; large is a multiple of small,
            small of 128. from_start: every query sees the first key, so no range has an edge there.
        trips: int32 [groups, 8] in HBM: bounds of the five loops over chunks, see `for_all_chunks`.
        bases: float32 [groups, 2]: first keys of the two loops with masks.
    """

    def __init__(self, trips, bases, looped):
        self.trips = trips
        self.bases = bases
        self.tiles, self.large, self.small, self.from_start = looped

    def queries(self, heads):
        """Queries of a group."""
        return self.tiles * PARTS * queries_per_part(heads)

    def for_all_groups(self, count, work):
        """Calls work(i) in a hardware loop for every one of `count` groups that is this core's;
        `of_group` takes i."""
        nl.fori_loop(0, count // this_core()[1], work)


def lanes(batch, kv_heads, group):
    """(batch row, kv head, first query head, query heads) of what one program serves."""
    found = []
    for b in range(batch):
        for h in range(kv_heads):
            for g0, heads in head_groups(group):
                found.append((b, h, h * group + g0, heads))
    return found


def of_group(tensor, size, i):
    """Rows of this core's i-th group, [size, ...], of an HBM tensor [groups * size, ...]."""
    core, cores = this_core()
    groups = tensor.shape[0] // size
    if cores == 1:
        return tensor.reshape_dim(0, (groups, size)).select(0, i)
    return tensor.reshape_dim(0, (groups // 2, 2, size)).select(1, core).select(0, i)


def tiles_of_group(loops, heads, keys, seen):
    """Tiles of a group against a chunk of `keys` keys, all of which every query sees, or not."""
    found = []
    count = PARTS * queries_per_part(heads)
    inner = keys if seen else 0
    for r in range(loops.tiles):
        span = (0, keys, 0, inner, True)
        tile = Tile(0, 0, 0, heads, r * count, count, span, (0, 0, 1, False))
        tile.from_start = loops.from_start
        found.append(tile)
    return found


def by_part(rows, per_part):
    """[Q, heads, D] in HBM as [queries of a part, heads, parts, D]."""
    parts = rows.shape[0] // per_part
    return rows.reshape_dim(0, (parts, per_part)).permute((1, 2, 0, 3))


def load_group(source, per_part, queue):
    """[Q, heads, D] in HBM as [rows of a part, parts, D] in SBUF."""
    queries, heads, width = source.shape
    loaded = sbuf((per_part * heads, queries // per_part, width), source.dtype)
    fetch(loaded, by_part(source, per_part), queue)
    return loaded


class Edges(nl.NKIObject):
    """Ranges of a group's queries against a chunk at run time: what its loops with masks carry.

    `by_query` [128, Q, 2]: lo and hi on every partition; `base` [128, 1]: the chunk's first key.
    """

    def __init__(self, bounds):
        self.bounds = bounds
        queries = bounds.shape[0]
        self.by_query = sbuf((128, queries, 2), nl.float32)
        fetch(self.by_query, bounds.expand_dim(0).broadcast(0, 128))
        self.base = sbuf((128, 1), nl.float32)

    def load_rows(self, per_part, heads):
        """The same with rows on partitions, [rows of a part, parts, 2]."""
        parts = self.bounds.shape[0] // per_part
        self.by_row = sbuf((per_part * heads, parts, 2), nl.float32)
        rows = self.bounds.reshape_dim(0, (parts, per_part)).permute((1, 0, 2))
        fetch(self.by_row, rows.expand_dim(1).broadcast(1, heads))

    def begin(self, bases, which):
        """Stands at the first chunk of one of the two loops."""
        fetch(self.base, bases[which : which + 1].expand_dim(0).broadcast(0, 128))

    def relative(self):
        """lo and hi counted from the chunk."""
        limits = sbuf(self.by_query.shape, nl.float32)
        nisa.tensor_scalar(limits, self.by_query, nl.subtract, self.base)
        return limits

    def relative_rows(self):
        limits = sbuf(self.by_row.shape, nl.float32)
        nisa.tensor_scalar(limits, self.by_row, nl.subtract, self.base[0 : self.by_row.shape[0], :])
        return limits

    def advance(self, size):
        nisa.tensor_scalar(self.base, self.base, nl.add, float(size))


def for_all_chunks(loops, trips, bases, keys, edges, visit):
    """Calls visit(keys of a chunk, its index, limits) for the chunks that a group's queries see.

    trips [8]: bounds of the loops over small chunks at the edge, small ones that all see, large
    ones (3, 4), small ones (5, 6), and small ones at the edge, which end at 7.
    limits: as of `Edges.relative`, or None where every query sees every key.
    """
    at = []
    for k in range(8):
        bound = nisa.register_alloc()
        if k >= 3 or not loops.from_start:
            nisa.register_load(bound, trips[k : k + 1])
        at.append(bound)

    def seen(j):
        visit(loops.small, j, None)

    def large(j):
        visit(loops.large, j, None)

    def edge(j):
        visit(loops.small, j, edges.relative())
        edges.advance(loops.small)

    if not loops.from_start:
        edges.begin(bases, 0)
        nl.fori_loop(at[0], at[1], edge)
        nl.fori_loop(at[1], at[2], seen)
    if keys >= loops.large:
        nl.fori_loop(at[3], at[4], large)
    nl.fori_loop(at[5], at[6], seen)
    edges.begin(bases, 1)
    nl.fori_loop(at[6], at[7], edge)


def for_every_chunk(loops, trips, bases, edges, visit):
    """Calls visit(index) for all small chunks that a group's queries see, in one loop; `edges`
    stands at the chunk."""
    first, last = nisa.register_alloc(), nisa.register_alloc()
    nisa.register_load(first, trips[0:1])
    nisa.register_load(last, trips[7:8])
    edges.begin(bases, 0)

    def one(j):
        visit(j)
        edges.advance(loops.small)

    nl.fori_loop(first, last, one)


def columns_of_chunk(source, size, j):
    """Chunk j of [D, T] in HBM as [1, 1, D, size]."""
    count = source.shape[1] // size
    whole = source[:, 0 : count * size].reshape_dim(1, (count, size))
    return whole.select(1, j).expand_dim(0).expand_dim(0)


def rows_of_chunk(source, size, j):
    """Chunk j of [T, D] in HBM as [1, size, 1, D]."""
    count = source.shape[0] // size
    whole = source[0 : count * size, :].reshape_dim(0, (count, size))
    return whole.select(0, j).expand_dim(0).expand_dim(2)


def chunks_of(size):
    """Loads of one chunk, in pieces, so that the next one's begin before this one is done with."""
    found = Chunks(min(size, PIECE), size, size, "y")
    found.select(0, 0)
    return found
