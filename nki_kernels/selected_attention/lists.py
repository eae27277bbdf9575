"""Union lists: which blocks the queries of a tile have chosen between them, each once, descending.

Dimensions: TILES query tiles, IDS ids of a tile (queries x n), lists cut in trips of SLOTS entries.
Layout: one tile per partition, its ids along the free axis as float32 (exact below 2**24).

    fill all lists with null
    per 128 tiles:
        x = 1 + ids (0 for none)                            VectorE
        while any x > 0, once per trip:                     hardware loop
            SLOTS times:
                entry = max(x) - 1;  x = x * (x < max(x))   VectorE: every copy of the id goes
            store the entries, null where nothing was left  one DMA with a run-time address

Bound by VectorE: two passes over IDS per entry, 1.1 us for 512 ids of 128 tiles; at 40 entries
that is 11 ns per query of a 32-query tile. `max8` finds eight at a time, but not distinct ones.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import columns, psum, sbuf
from nki_kernels.common.queues import fetch
from nki_kernels.common.spans import spans

SOME_IDS = 2048
"""Ids that are loaded at a time: as float32 all of a tile's ids stay on its partition."""


@nki.jit
def union_lists(ids, trips: int, slots: int, null: int, per_tile: int):
    """Lists [CORES, TILES, trips, slots] int32 filled up with `null`, and the trips of each
    [CORES, TILES, 1].

    Each core makes all of them, for itself: the loops of two cores must go round equally often,
    and how often hangs on the data.

    Args:
        ids: [TILES, IDS] int32, -1 for none.
        trips: of a list; trips * slots is no less than the distinct ids of a tile.
        slots: blocks that one trip of the attention kernels takes.
        null: the first of per_tile blocks that no query chose.
        per_tile: blocks of 128 keys; among these no null block comes twice.
    """
    tiles, count = ids.shape
    cores = nl.num_programs(0)
    shape = (cores, tiles, trips, slots)
    every = nl.ndarray(shape, dtype=nl.int32, buffer=nl.shared_hbm)
    every_amount = nl.ndarray((cores, tiles, 1), dtype=nl.int32, buffer=nl.shared_hbm)
    lists, amounts = every[nl.program_id(0)], every_amount[nl.program_id(0)]
    for start, parts in spans(tiles, nl.tile_size.pmax):
        rows = slice(start, start + parts)
        none = nulls(parts, slots, null, per_tile)
        empty = sbuf((parts, slots), nl.int32)
        nisa.tensor_scalar(empty, none, nl.subtract, 1.0)
        for trip in range(trips):
            nisa.dma_copy(lists[rows, trip, :], empty)
        left = sbuf((parts, count), nl.float32)
        for low, some in spans(count, SOME_IDS):
            raw = sbuf((parts, some), nl.int32)
            nisa.dma_copy(raw, ids[rows, low : low + some])
            nisa.tensor_scalar(left[:, low : low + some], raw, nl.add, 1.0)
        union = Union(left, none)
        nl.while_loop(union.more(), union.trip_into(lists[rows, :, :]))
        whole = sbuf((parts, 1), nl.int32)
        nisa.tensor_copy(whole, union.amount)
        nisa.dma_copy(amounts[rows, :], whole)
    return every, every_amount


def nulls(parts, count, null, per_tile):
    """1 + the null blocks that fill up lists: null, ..., null + per_tile - 1, and again."""
    found = sbuf((parts, count), nl.float32)
    pattern = [[0, count // per_tile], [1, per_tile]]
    nisa.iota(found, pattern, offset=null + 1, channel_multiplier=0)
    return found


class Union(nl.NKIObject):
    """Lists of up to 128 tiles in the making.

    Attributes:
        left: [tiles, IDS] float32, 1 + id where not yet listed, else 0.
        none: [tiles, slots] float32, see `nulls`.
        amount: [tiles, 1] float32, trips so far with an entry in them.
        trip: [1, 1] int32, number of the next trip.
    """

    def __init__(self, left, none):
        self.left, self.none, self.slots = left, none, none.shape[1]
        (self.amount,) = columns(1, left.shape[0])
        self.trip = sbuf((1, 1), nl.int32)
        nisa.memset(self.amount, 0.0)
        nisa.memset(self.trip, 0)

    def more(self):
        """A register: whether any tile has an id left."""
        parts = self.left.shape[0]
        (top,) = columns(1, parts)
        across, one = psum((1, parts)), sbuf((1, 1), nl.float32)
        nisa.tensor_reduce(top, nl.maximum, self.left, axis=1)
        nisa.nc_transpose(across, top, engine=nisa.engine.tensor)
        nisa.tensor_reduce(one, nl.maximum, across, axis=1)
        whole = sbuf((1, 1), nl.int32)
        nisa.tensor_copy(whole, one)
        register = nisa.register_alloc()
        nisa.register_load(register, whole)
        return register

    def trip_into(self, lists):
        """The body of the loop over trips, that writes to lists [tiles, trips, slots]."""

        def body(_):
            parts, slots = self.left.shape[0], self.slots
            found = sbuf((parts, slots), nl.float32)  # 1 + id
            for r in range(slots):
                top = found[:, r : r + 1]
                nisa.tensor_reduce(top, nl.maximum, self.left, axis=1)
                nisa.scalar_tensor_tensor(
                    self.left, self.left, nl.less, top, nl.multiply, self.left
                )
            fill, whole = sbuf((parts, slots), nl.float32), sbuf((parts, slots), nl.int32)
            # 1 + the null block where there is nothing, else nothing.
            nisa.scalar_tensor_tensor(fill, found, nl.equal, 0.0, nl.multiply, self.none)
            nisa.tensor_tensor(fill, fill, found, nl.add)
            nisa.tensor_scalar(whole, fill, nl.subtract, 1.0)
            fetch(lists.select(1, self.trip), whole)
            nisa.tensor_scalar(self.trip, self.trip, nl.add, 1)
            nisa.scalar_tensor_tensor(
                self.amount, found[:, 0:1], nl.greater, 0.0, nl.add, self.amount
            )
            return self.more()

        return body
