"""Selected attention, backward: dq by query tile, dk and dv by block; no atomics, no scatter.

Dimensions and layout as in `forward`. Both kernels recompute p = exp(scale S - lse), times scale by
way of lse, and make ds = scale p (dO v^T - delta), delta = sum(dO o) - grad_lse; a hidden key has
p = 0.

    backward_dq, per tile, per trip of its union list:          as forward
        gather U blocks of K^T, V^T and K
        per 128 rows, per 512 keys:
            S, dP = q^T.T @ K^T + mask, dO^T.T @ V^T            PE
            ds = scale p (dP - delta)                           ScalarE, VectorE
            dq += ds K                                          PE (ds transposed there)

    backward_dkv, per block:                                    hardware loop
        per tile whose union has the block:                     hardware loop, run-time count
            load q, dO and both transposed                      one run-time index for all of them
            per 128 rows: S, dP, p, ds [128, m] as above
                dv += p^T dO; dk += ds^T q                      PE: rows on partitions already
Every gradient has one writer, which adds in the order of its list: two runs give the same bits, and
so do one core and two. The other way, adding blocks' gradients to HBM tile by tile, saves the
second S and dP but writes and reads 8 bytes per gradient and tile, one after the other.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.cores import share
from nki_kernels.common.spans import spans
from nki_kernels.selected_attention import tile as parts


@nki.jit
def backward_dq(q_t, do_t, do, o, stats, k_t, v_t, k, ids, place, lists, starts, trips, heads,
                scale: float):  # fmt: skip
    """dq [TILES, ROWS, DK] in q's dtype and delta [TILES, ROWS, 1] float32.

    Args:
        q_t, do_t: [TILES, D, ROWS]. do, o: [TILES, ROWS, DV].
        stats: [TILES, ROWS, 2] float32: ln(scale) - lse (0 of rows that see nothing), and grad_lse.
        k_t, v_t: [PAGES, D, m]. k: [PAGES, m, DK].
        ids, place, lists, starts, trips, heads: as for `forward`.
    """
    tiles, dk, rows = q_t.shape
    dq = nl.ndarray((tiles, rows, dk), dtype=q_t.dtype, buffer=nl.shared_hbm)
    delta = nl.ndarray((tiles, rows, 1), dtype=nl.float32, buffer=nl.shared_hbm)
    owners = sbuf(heads.shape, heads.dtype)
    nisa.dma_copy(owners, heads)
    numbers = parts.counted(ids.shape[1], k.shape[1])
    first, count = share(tiles)

    def one_tile(i):
        q = parts.load_transposed(q_t, i, q_t.dtype)
        grad = parts.load_transposed(do_t, i, do_t.dtype)
        queries = parts.Queries(ids, place, i)
        rows_of = []
        for start, length in spans(rows, nl.tile_size.pmax):
            rows_of.append(_DqRows(start, length, dk))
        for part in rows_of:
            part.load(do.select(0, i), o.select(0, i), stats.select(0, i), delta.select(0, i))
        pointer = sbuf((1, 1), nl.int32)
        nisa.dma_copy(pointer, starts.select(0, i))
        times = nisa.register_alloc()
        nisa.register_load(times, trips.select(0, i))

        def one_trip(_):
            trip = parts.Trip(lists, pointer, queries.count)
            keys = parts.gather_columns(k_t, trip.numbers)
            values = parts.gather_columns(v_t, trip.numbers)
            key_rows = parts.gather_rows(k, trip.numbers)
            hidden = parts.hidden_keys(numbers, queries.visible(trip.blocks, k.shape[1]))
            for part in rows_of:
                part.add(q, grad, keys, values, key_rows, owners, hidden, scale)

        nl.fori_loop(0, times, one_trip)
        for part in rows_of:
            part.store(dq.select(0, i))

    nl.fori_loop(first, first + count, one_tile)
    return dq, delta


class _DqRows(nl.NKIObject):
    """dq of up to 128 rows of a tile, [rows, DK] float32.

    Attributes:
        shift, delta: [rows, 1] float32; shift is ln(scale) - lse.
    """

    def __init__(self, start, length, dk):
        self.rows = slice(start, start + length)
        self.length = length
        self.acc = sbuf((length, dk), nl.float32)
        self.shift = sbuf((length, 1), nl.float32)
        self.delta = sbuf((length, 1), nl.float32)
        nisa.memset(self.acc, 0.0)

    def load(self, do, o, stats, delta):
        """Loads the rows' statistics and makes their delta."""
        shape = (self.length, do.shape[1])
        grad, out = sbuf(shape, do.dtype), sbuf(shape, o.dtype)
        product, grad_lse = sbuf(shape, nl.float32), sbuf((self.length, 1), nl.float32)
        nisa.dma_copy(grad, do[self.rows, :])
        nisa.dma_copy(out, o[self.rows, :])
        nisa.dma_copy(self.shift, stats[self.rows, 0:1])
        nisa.dma_copy(grad_lse, stats[self.rows, 1:2])
        nisa.tensor_tensor(product, grad, out, nl.multiply)
        nisa.tensor_reduce(self.delta, nl.add, product, axis=1)
        nisa.tensor_tensor(self.delta, self.delta, grad_lse, nl.subtract)
        nisa.dma_copy(delta[self.rows, :], self.delta)

    def add(self, q, grad, keys, values, key_rows, owners, hidden, scale):
        """Adds what the keys of a trip contribute."""
        tokens = hidden.shape[2]
        per_tile = nl.tile_size.pmax // tokens
        group = max(1, parts.BANK // (per_tile * tokens)) * per_tile
        for first, slots in spans(hidden.shape[1], group):
            columns = slice(first, first + slots)
            mask = (owners[:, self.rows], hidden[:, columns, :])
            _, ds = _gradients(
                q, grad, keys, values, self.rows, columns, mask, self.shift, self.delta, scale
            )
            out = psum(self.acc.shape)
            for start, length in spans(slots * tokens, per_tile * tokens):
                ds_t = parts.transposed(ds[:, start : start + length])
                key_tile = key_rows[first // per_tile + start // (per_tile * tokens)]
                nisa.nc_matmul(out, ds_t, key_tile, accumulate=start > 0)
            nisa.tensor_tensor(self.acc, self.acc, out, nl.add)

    def store(self, dq):
        _store(dq[self.rows, :], self.acc)


def _gradients(q, grad, keys, values, rows, columns, mask, shift, delta, scale):
    """scale p [rows, keys] float32, and ds in q's dtype."""
    shape = (mask[0].shape[1], mask[1].shape[1] * mask[1].shape[2])
    scores, dp = psum(shape), psum(shape)
    p, ds = sbuf(shape, nl.float32), sbuf(shape, q[0].dtype)
    parts.product(scores, q, keys, rows, columns, mask)
    parts.product(dp, grad, values, rows, columns)
    nisa.activation(p, nl.exp, scores, bias=shift, scale=scale)
    nisa.scalar_tensor_tensor(ds, dp, nl.subtract, delta, nl.multiply, p)
    return p, ds


@nki.jit
def backward_dkv(q_t, do_t, q, do, stats, k_t, v_t, ids, place, entries, starts, trips, heads,
                 scale: float):  # fmt: skip
    """dk [BLOCKS, m, DK] and dv [BLOCKS, m, DV] in k's dtype.

    Args:
        q_t, do_t: [TILES, D, ROWS]. q, do: [TILES, ROWS, D].
        stats: [TILES, ROWS, 2] float32: ln(scale) - lse (0 of rows that see nothing), and delta.
        k_t, v_t: [PAGES, D, m], PAGES >= BLOCKS.
        ids, place, heads: as for `forward`.
        entries: [ENTRIES, 2] int32: tiles of each block's list, and the block; -2 fills up.
        starts: [BLOCKS, 1, 1] int32, first row of `entries` of a block.
        trips: [BLOCKS, 1] int32, rows of `entries` of a block.
    """
    blocks, (dk, tokens), dv = starts.shape[0], k_t.shape[1:], v_t.shape[1]
    dks = nl.ndarray((blocks, tokens, dk), dtype=k_t.dtype, buffer=nl.shared_hbm)
    dvs = nl.ndarray((blocks, tokens, dv), dtype=v_t.dtype, buffer=nl.shared_hbm)
    owners = sbuf(heads.shape, heads.dtype)
    nisa.dma_copy(owners, heads)
    numbers = parts.counted(ids.shape[1], tokens)
    first, count = share(blocks)

    def one_block(i):
        keys = _as_blocks(parts.load_transposed(k_t, i, k_t.dtype))
        values = _as_blocks(parts.load_transposed(v_t, i, v_t.dtype))
        dk_sum, dv_sum = sbuf((tokens, dk), nl.float32), sbuf((tokens, dv), nl.float32)
        nisa.memset(dk_sum, 0.0)
        nisa.memset(dv_sum, 0.0)
        pointer = sbuf((1, 1), nl.int32)
        nisa.dma_copy(pointer, starts.select(0, i))
        times = nisa.register_alloc()
        nisa.register_load(times, trips.select(0, i))

        def one_trip(_):
            trip = parts.Trip(entries, pointer, ids.shape[1])
            tile = trip.numbers[0:1, 0:1]
            queries = parts.Queries(ids, place, tile)
            hidden = parts.hidden_keys(numbers, queries.visible(trip.blocks[:, 1:2], tokens))
            q_columns = parts.load_transposed(q_t, tile, q_t.dtype)
            do_columns = parts.load_transposed(do_t, tile, do_t.dtype)
            dk_part, dv_part = psum((tokens, dk)), psum((tokens, dv))
            for start, length in spans(q_t.shape[2], nl.tile_size.pmax):
                rows = slice(start, start + length)
                q_rows = _load_rows(q.select(0, tile), rows)
                do_rows = _load_rows(do.select(0, tile), rows)
                own = _load_rows(stats.select(0, tile), rows)
                mask = (owners[:, rows], hidden)
                p, ds = _gradients(
                    q_columns, do_columns, keys, values, rows, slice(0, 1), mask,
                    own[:, 0:1], own[:, 1:2], scale,
                )  # fmt: skip
                rounded = sbuf(p.shape, v_t.dtype)
                nisa.tensor_scalar(rounded, p, nl.multiply, 1.0 / scale)
                nisa.nc_matmul(dk_part, ds, q_rows, accumulate=start > 0)
                nisa.nc_matmul(dv_part, rounded, do_rows, accumulate=start > 0)
            nisa.tensor_tensor(dk_sum, dk_sum, dk_part, nl.add)
            nisa.tensor_tensor(dv_sum, dv_sum, dv_part, nl.add)

        nl.fori_loop(0, times, one_trip)
        _store(dks.select(0, i), dk_sum)
        _store(dvs.select(0, i), dv_sum)

    nl.fori_loop(first, first + count, one_block)
    return dks, dvs


def _load_rows(source, rows):
    """Rows of `source` [ROWS, D] in SBUF."""
    out = sbuf((rows.stop - rows.start, source.shape[1]), source.dtype)
    nisa.dma_copy(out, source[rows, :])
    return out


def _store(target, total):
    """Writes float32 [P, N] in the target's dtype."""
    out = sbuf(total.shape, target.dtype)
    nisa.tensor_copy(out, total)
    nisa.dma_copy(target, out)


def _as_blocks(tiles):
    """[D, m] tiles as [D, 1, m] ones, as `gather_columns` makes them of one block."""
    found = []
    for tile in tiles:
        found.append(tile.expand_dim(1))
    return found
