"""Tiles of queries, and which keys they visit: plain integers, the same on every core."""

import nki.language as nl

from nki_kernels.common.cores import this_core

UNLIMITED = -(2**30)  # of `reach`: no query begins behind the first key


class Tile(nl.NKIObject):
    """Queries t0 .. t0 + count of one batch row, with the heads h0 .. h0 + heads of a kv head.

    Their `count * heads` rows (query-major) are split into parts of whole queries with at most
    128 rows each. Keys `first` .. `last` may be seen by some of them, `inner_first` ..
    `inner_last` are seen by all. `pair` numbers the pairs of `query_tiles`;
    `overlaps`: one query is in both. `from_start`: every query sees the first key.
    """

    def __init__(self, batch, kv_head, h0, heads, t0, count, keys, reach, pair=0, overlaps=False):
        self.batch = batch
        self.kv_head = kv_head
        self.h0 = h0
        self.heads = heads
        self.t0 = t0
        self.count = count
        self.pair = pair
        self.overlaps = overlaps
        self.reach = reach
        self.from_start = reach[1] <= UNLIMITED and reach[3]
        self.first = keys[0]
        self.last = keys[1]
        self.inner_first = keys[2]
        self.inner_last = keys[3]
        self.all_alive = keys[4]
        self.columns = count * heads
        self.per_part = queries_per_part(heads)
        self.parts = (count + self.per_part - 1) // self.per_part

    def part(self, p):
        """(first column, columns) of part p."""
        first = p * self.per_part * self.heads
        return first, min(self.per_part * self.heads, self.columns - first)

    def distance(self, position):
        """How far key `position` lies before what the first query sees; masks hang on it alone."""
        return self.t0 + self.reach[0] - position * self.reach[2]

    def sees_all(self, first, last):
        """Whether every query sees every key first .. last."""
        return self.inner_first <= first and last <= self.inner_last


def queries_per_part(heads):
    """Whole queries whose heads fill at most 128 rows."""
    return max(1, nl.tile_size.pmax // heads)


def head_groups(group):
    """(first head, heads) of equal groups of at most 128 of a kv head's `group` heads."""
    groups = (group + nl.tile_size.pmax - 1) // nl.tile_size.pmax
    size = (group + groups - 1) // groups
    found = []
    for g in range(groups):
        first = min(g * size, group)
        if first < group:
            found.append((first, min(size, group - first)))
    return found


def key_range(t0, t1, keys, reach):
    """(first, last, inner_first, inner_last, all_alive) of queries t0 .. t1.

    first is a multiple of 128; all_alive: every query is known to see some key.
    """
    hi_add, lo_add, step, exact = reach
    last = max(0, min(keys, (t1 - 1 + hi_add) // step))
    first = min(max(0, (t0 + lo_add) // step) // 128 * 128, last)
    inner_last = max(0, min(keys, (t0 + hi_add) // step))
    inner_first = max(0, (t1 - 1 + lo_add) // step)
    if not exact:
        return first, last, 0, 0, False
    return first, last, inner_first, inner_last, (t0 + hi_add) // step > 0


def query_tiles(batch, kv_heads, group, queries, keys, reach, parts):
    """This core's tiles of queries, of at most `parts` parts.

    Queries are cut into pairs of tiles that visit the same keys: one core does both, two cores one
    each. So two cores run equal programs, and both ways give the same bits. The second tile of a
    pair starts earlier if the count is odd; the query in the middle is done twice.
    """
    core, cores = this_core()
    found = []
    pair = 0
    for b in range(batch):
        for h in range(kv_heads):
            for g0, heads in head_groups(group):
                limit = parts * queries_per_part(heads)
                for t0 in range(0, queries, 2 * limit):
                    count = min(2 * limit, queries - t0)
                    half = (count + 1) // 2
                    odd = count % 2 == 1
                    span = key_range(t0, t0 + count, keys, reach)
                    h0 = h * group + g0
                    if core == 0:
                        found.append(Tile(b, h, h0, heads, t0, half, span, reach, pair, odd))
                    if core == 1 or (cores == 1 and count > 1):
                        found.append(
                            Tile(b, h, h0, heads, t0 + count - half, half, span, reach, pair, odd)
                        )
                    pair += 1
    return found


def cut(length, size):
    """(first, count) of pieces of at most `size`."""
    pieces = []
    for first in range(0, length, size):
        pieces.append((first, min(size, length - first)))
    return pieces
