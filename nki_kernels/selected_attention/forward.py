"""Selected attention, forward: the union of the blocks of a query tile, gathered and masked.

Dimensions: TILES query tiles of TQ queries x G heads = ROWS rows; PAGES blocks of m <= 128 tokens
(of all batches and kv heads); lists of unions cut in trips of U blocks.
Layout: scores have 128 rows on partitions and keys along the free axis, so the exact row maximum is
one VectorE reduction; K blocks come transposed [DK, m], V blocks as they are [m, DV].

    per tile:                                                   hardware loop
        load q^T; max = -1e30; sum = 0; acc = 0
        per trip of U blocks:                                   hardware loop, run-time count
            gather U blocks of K^T and V                        run-time addresses on DMA only
            hidden[query, key] = key >= what the query sees     VectorE, on TQ partitions
            per 128 rows, per 512 keys:
                S = q^T.T @ K^T + E.T @ hidden                  PE; E = HIDDEN where row is query's
                new = max(max, rowmax S); p = exp(scale (S - new))   VectorE, ScalarE
                acc = acc exp(scale (max - new)) + p V          PE (p transposed there), VectorE
        o = acc / sum; lse = scale max + ln sum

Any union is right: a longer one takes more trips. Both cores of lnc 2 take the same number.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import columns, psum, sbuf
from nki_kernels.common.cores import share
from nki_kernels.common.spans import spans
from nki_kernels.selected_attention import tile as parts

FLOOR = -1.0e30
"""Where a running maximum starts: below every logit, above every hidden one."""


@nki.jit
def forward(q_t, k_t, v, ids, place, lists, starts, trips, heads, scale: float):
    """o [TILES, ROWS, DV] in q's dtype and lse [TILES, ROWS] float32; see the module's docstring.

    Args:
        q_t: [TILES, DK, ROWS]; row = query * G + head.
        k_t: [PAGES, DK, m]. v: [PAGES, m, DV].
        ids: [TILES, TQ, n] int32, pages chosen by each query, -1 for none.
        place: [TILES, TQ, 2] float32, see `tile.Queries`.
        lists: [LISTS, U] int32, pages of each trip; a page nobody chose fills them up.
        starts: [TILES, 1, 1] int32, first row of `lists` of a tile.
        trips: [TILES, 1] int32, rows of `lists` of a tile.
        heads: [TQ, ROWS] bfloat16, HIDDEN where a row belongs to a query.
    """
    tiles, _, rows = q_t.shape
    o = nl.ndarray((tiles, rows, v.shape[2]), dtype=q_t.dtype, buffer=nl.shared_hbm)
    lse = nl.ndarray((tiles, rows), dtype=nl.float32, buffer=nl.shared_hbm)
    owners = sbuf(heads.shape, heads.dtype)
    nisa.dma_copy(owners, heads)
    numbers = parts.counted(ids.shape[1], v.shape[1])
    first, count = share(tiles)

    def one_tile(i):
        q = parts.load_transposed(q_t, i, q_t.dtype)
        queries = parts.Queries(ids, place, i)
        rows_of = []
        for start, length in spans(rows, nl.tile_size.pmax):
            rows_of.append(Rows(start, length, v.shape[2]))
        pointer = sbuf((1, 1), nl.int32)
        nisa.dma_copy(pointer, starts.select(0, i))
        times = nisa.register_alloc()
        nisa.register_load(times, trips.select(0, i))

        def one_trip(_):
            trip = parts.Trip(lists, pointer, queries.count)
            keys = parts.gather_columns(k_t, trip.numbers)
            values = parts.gather_rows(v, trip.numbers)
            seen = queries.visible(trip.blocks, v.shape[1])
            hidden = parts.hidden_keys(numbers, seen)
            for part in rows_of:
                part.attend(q, keys, values, owners, hidden, scale)

        nl.fori_loop(0, times, one_trip)
        for part in rows_of:
            part.store(o.select(0, i), lse.select(0, i), scale)

    nl.fori_loop(first, first + count, one_tile)
    return o, lse


class Rows(nl.NKIObject):
    """The running softmax of up to 128 rows of a tile.

    Attributes:
        top, total: [rows, 1] float32, running maximum of the logits before scaling; sum of
            exponentials.
        acc: [rows, DV] float32, sum of exponentials times values.
    """

    def __init__(self, start, length, dv):
        self.start, self.length = start, length
        self.top = sbuf((length, 1), nl.float32)
        self.total = sbuf((length, 1), nl.float32)
        self.acc = sbuf((length, dv), nl.float32)
        nisa.memset(self.top, FLOOR)
        nisa.memset(self.total, 0.0)
        nisa.memset(self.acc, 0.0)

    def attend(self, q, keys, values, owners, hidden, scale):
        """Takes the keys of a trip into account, as many at a time as a PSUM bank holds."""
        tokens = hidden.shape[2]
        per_tile = nl.tile_size.pmax // tokens
        group = max(1, parts.BANK // (per_tile * tokens)) * per_tile
        rows = slice(self.start, self.start + self.length)
        for first, slots in spans(hidden.shape[1], group):
            width = slots * tokens
            scores = psum((self.length, width))
            some = slice(first, first + slots)
            mask = (owners[:, rows], hidden[:, some, :])
            parts.product(scores, q, keys, rows, some, mask)
            p, fade = self._probabilities(scores, values[0].dtype, scale)
            out = psum(self.acc.shape)
            for start, length in spans(width, per_tile * tokens):
                p_t = parts.transposed(p[:, start : start + length])
                value = values[first // per_tile + start // (per_tile * tokens)]
                nisa.nc_matmul(out, p_t, value, accumulate=start > 0)
            nisa.scalar_tensor_tensor(self.acc, self.acc, nl.multiply, fade, nl.add, out)

    def _probabilities(self, scores, dtype, scale):
        """exp(scale (scores - new maximum)), and what the old sums must be multiplied by."""
        top, fade, shift, total = columns(4, self.length)
        p = sbuf(scores.shape, dtype)
        nisa.tensor_reduce(top, nl.maximum, scores, axis=1)
        nisa.tensor_tensor(top, top, self.top, nl.maximum)
        nisa.tensor_scalar(shift, top, nl.multiply, -scale)
        nisa.activation(fade, nl.exp, self.top, bias=shift, scale=scale)
        nisa.activation(
            p, nl.exp, scores, bias=shift, scale=scale, reduce_op=nl.add, reduce_res=total,
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )  # fmt: skip
        nisa.scalar_tensor_tensor(self.total, self.total, nl.multiply, fade, nl.add, total)
        nisa.tensor_copy(self.top, top)
        return p, fade

    def store(self, o, lse, scale):
        """Writes o and lse; of rows that saw nothing 0 and -inf."""
        dead = sbuf((self.length, 1), nl.uint8)
        safe, inverse, log = columns(3, self.length)
        out = sbuf(self.acc.shape, o.dtype)
        rows = slice(self.start, self.start + self.length)
        nisa.tensor_scalar(dead, self.total, nl.equal, 0.0)
        # The largest exponential is 1: only an empty sum is smaller.
        nisa.tensor_scalar(safe, self.total, nl.maximum, 0.5)
        nisa.reciprocal(inverse, safe)
        nisa.tensor_scalar(out, self.acc, nl.multiply, inverse)
        nisa.dma_copy(o[rows, :], out)
        nisa.activation(log, nl.log, safe)
        nisa.scalar_tensor_tensor(log, self.top, nl.multiply, scale, nl.add, log)
        nisa.tensor_copy_predicated(log, -float("inf"), dead)
        nisa.dma_copy(lse[rows], log)
