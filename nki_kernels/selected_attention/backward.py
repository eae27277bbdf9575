"""Selected attention, backward: dq by query tile, dk and dv by block; no atomics, no scatter.

Dimensions and layout as in `forward`. Both kernels recompute p = exp(scale S - lse), times scale by
way of lse, and make ds = scale p (dO v^T - delta), delta = sum(dO o) - grad_lse; a hidden key has
p = 0.

    backward_dq, per tile, per trip of its union list:          as forward
        gather U pages; K^T, V^T                             PE
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
from nki_kernels.common.queues import fetch
from nki_kernels.common.spans import spans
from nki_kernels.selected_attention import tile as parts
from nki_kernels.selected_attention.gather import BANK, Blocks


@nki.jit
def backward_dq(
    q_t, do_t, do, o, stats, pages, ids, place, heads, lists, starts, trips, queues: str,
    scale: float,
):  # fmt: skip
    """dq [TILES, ROWS, DK] in q's dtype and delta [TILES, ROWS, 1] float32.

    Args:
        q_t, do_t: [TILES, D, ROWS]; q_t has `heads` behind it where there is room, see `tile.Mask`.
        do, o: [TILES, ROWS, DV].
        stats: [TILES, ROWS, 2] float32: ln(scale) - lse (0 of rows that see nothing), and grad_lse.
        pages: [PAGES, m, DK + DV].
        ids: [TILES, TQ, n]. place: [TILES, TQ, 2].
        heads, lists, starts, trips, queues: as for `forward`.
    """
    (tiles, _, rows), dv = q_t.shape, do.shape[2]
    dk = pages.shape[2] - dv
    dq = nl.ndarray((tiles, rows, dk), dtype=q_t.dtype, buffer=nl.shared_hbm)
    delta = nl.ndarray((tiles, rows, 1), dtype=nl.float32, buffer=nl.shared_hbm)
    mask = parts.Mask(heads, pages.shape[1], q_t.shape[1] - dk)
    first, count = share(tiles)

    def one_tile(i):
        q = parts.load_columns(q_t.select(0, i))
        grad = parts.load_columns(do_t.select(0, i))
        queries = parts.Queries(ids.select(0, i).expand_dim(0), place.select(0, i).expand_dim(0))
        rows_of = []
        for start, length in spans(rows, nl.tile_size.pmax):
            rows_of.append(_DqRows(start, length, dk))
        for part in rows_of:
            part.load(do.select(0, i), o.select(0, i), stats.select(0, i), delta.select(0, i))
        pointer, amount = sbuf((1, 1), nl.int32), sbuf((1, 1), nl.int32)
        fetch(pointer, starts.select(0, i).expand_dim(0))
        fetch(amount, trips.select(0, i).expand_dim(0))
        times = nisa.register_alloc()
        nisa.register_load(times, amount)

        def one_trip(_):
            row = lists.select(0, pointer).expand_dim(0)
            numbers = sbuf((1, lists.shape[1]), nl.int32)
            fetch(numbers, row)
            listed = queries.listed(row)
            nisa.tensor_scalar(pointer, pointer, nl.add, 1)
            blocks = Blocks(pages, numbers, queues)
            keys = parts.Keys(blocks, queries, 0, listed[:, 0, :], mask, dk)
            values = blocks.turned(dk, dk + dv)
            for part in rows_of:
                part.add(q, grad, keys, values, mask, scale)

        nl.fori_loop(0, times, one_trip)
        for part in rows_of:
            _store(dq.select(0, i)[part.rows, :], part.acc)

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
        nisa.memset(self.acc, 0.0, engine=nisa.engine.gpsimd)

    def load(self, do, o, stats, delta):
        """Loads the rows' statistics and makes their delta."""
        grad, out, own = (
            _load_rows(do, self.rows),
            _load_rows(o, self.rows),
            _load_rows(stats, self.rows),
        )
        product = sbuf(grad.shape, nl.float32)
        nisa.tensor_copy(self.shift, own[:, 0:1])
        nisa.tensor_tensor(product, grad, out, nl.multiply)
        nisa.tensor_reduce(self.delta, nl.add, product, axis=1)
        nisa.tensor_tensor(self.delta, self.delta, own[:, 1:2], nl.subtract)
        fetch(delta[self.rows, :], self.delta)

    def add(self, q, grad, keys, values, mask, scale):
        """Adds what the keys of a trip contribute."""
        size, dk = keys.blocks.size, self.acc.shape[1]
        for first, count in spans(len(keys.blocks.tiles), BANK // size):
            some = slice(first * size, (first + count) * size)
            scores, dp = psum((self.length, count * size)), psum((self.length, count * size))
            mask.scores(scores, q, keys.turned, keys.hidden, self.rows, some)
            parts.product(dp, grad, values, self.rows, some)
            _, ds = _gradients(scores, dp, self.shift, self.delta, q[0].dtype, scale)
            ds_t = parts.turned_tiles(ds, size, nisa.engine.scalar)
            out = psum(self.acc.shape)
            for t in range(count):
                key_rows = keys.blocks.tiles[first + t][:, 0:dk]
                nisa.nc_matmul(out, ds_t[:, t, :], key_rows, accumulate=t > 0)
            nisa.tensor_tensor(self.acc, self.acc, out, nl.add)


def _gradients(scores, dp, shift, delta, dtype, scale):
    """scale p [rows, keys] float32, and ds in `dtype`."""
    p, ds = sbuf(scores.shape, nl.float32), sbuf(scores.shape, dtype)
    nisa.activation(p, nl.exp, scores, bias=shift, scale=scale)
    nisa.scalar_tensor_tensor(ds, dp, nl.subtract, delta, nl.multiply, p)
    return p, ds


@nki.jit
def backward_dkv(
    q_t, do_t, q, do, stats, pages, ids, place, heads, entries, starts, trips, scale: float
):
    """dk [BLOCKS, m, DK] and dv [BLOCKS, m, DV] in k's dtype.

    Args:
        q_t, do_t: [TILES, D, ROWS], as for `backward_dq`. q, do: [TILES, ROWS, D].
        stats: [TILES, ROWS, 2] float32: ln(scale) - lse (0 of rows that see nothing), and delta.
        pages: [PAGES, m, DK + DV], PAGES >= BLOCKS.
        ids, place, heads: as for `backward_dq`.
        entries: [ENTRIES, 2] int32: tiles of each block's list, and the block; -2 fills up.
        starts: [BLOCKS, 1] int32, first row of `entries` of a block.
        trips: [BLOCKS, 1] int32, rows of `entries` of a block.
    """
    blocks, tokens, dk, dv = starts.shape[0], pages.shape[1], q.shape[2], do.shape[2]
    dks = nl.ndarray((blocks, tokens, dk), dtype=pages.dtype, buffer=nl.shared_hbm)
    dvs = nl.ndarray((blocks, tokens, dv), dtype=pages.dtype, buffer=nl.shared_hbm)
    mask = parts.Mask(heads, tokens, q_t.shape[1] - dk)
    first, count = share(blocks)

    def one_block(i):
        page = sbuf((tokens, dk + dv), pages.dtype)
        fetch(page, pages.select(0, i))
        keys, values = _turned_page(page, 0, dk, mask.room), _turned_page(page, dk, dk + dv, 0)
        dk_sum, dv_sum = sbuf((tokens, dk), nl.float32), sbuf((tokens, dv), nl.float32)
        nisa.memset(dk_sum, 0.0)
        nisa.memset(dv_sum, 0.0)
        pointer, amount = sbuf((1, 1), nl.int32), sbuf((1, 1), nl.int32)
        fetch(pointer, starts.select(0, i).expand_dim(0))
        fetch(amount, trips.select(0, i).expand_dim(0))
        times = nisa.register_alloc()
        nisa.register_load(times, amount)

        def one_trip(_):
            row = entries.select(0, pointer).expand_dim(0)
            entry = sbuf((1, 2), nl.int32)
            fetch(entry, row)
            tile = entry[:, 0:1]
            queries = parts.Queries(
                ids.select(0, tile).expand_dim(0), place.select(0, tile).expand_dim(0)
            )
            block = queries.listed(row)[:, 0, 1:2]
            nisa.tensor_scalar(pointer, pointer, nl.add, 1)
            hidden = mask.hide(keys, queries.visible(0, block, tokens))
            q_columns = parts.load_columns(q_t.select(0, tile))
            do_columns = parts.load_columns(do_t.select(0, tile))
            dk_part, dv_part = psum((tokens, dk)), psum((tokens, dv))
            for start, length in spans(q_t.shape[2], nl.tile_size.pmax):
                rows = slice(start, start + length)
                q_rows = _load_rows(q.select(0, tile), rows)
                do_rows = _load_rows(do.select(0, tile), rows)
                own = _load_rows(stats.select(0, tile), rows)
                scores, dp = psum((length, tokens)), psum((length, tokens))
                mask.scores(scores, q_columns, keys, hidden, rows, slice(0, tokens))
                parts.product(dp, do_columns, values, rows, slice(0, tokens))
                p, ds = _gradients(scores, dp, own[:, 0:1], own[:, 1:2], q.dtype, scale)
                rounded = sbuf(p.shape, pages.dtype)
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


def _turned_page(page, first, last, spare):
    """Columns first .. last - 1 of a page [m, W], transposed: [<= 128, m] tiles."""
    found = []
    for start, length in spans(last - first, nl.tile_size.pmax):
        left = first + start
        out = sbuf((length + (spare if left + length == last else 0), page.shape[0]), page.dtype)
        bank = psum((length, page.shape[0]), page.dtype)
        nisa.nc_transpose(bank, page[:, left : left + length], engine=nisa.engine.tensor)
        nisa.tensor_copy(out[0:length, :], bank)
        found.append(out)
    return found


def _load_rows(source, rows):
    """Rows of `source` [ROWS, D] in SBUF."""
    out = sbuf((rows.stop - rows.start, source.shape[1]), source.dtype)
    fetch(out, source[rows, :])
    return out


def _store(target, total):
    """Writes float32 [P, N] in the target's dtype."""
    out = sbuf(total.shape, target.dtype)
    nisa.tensor_copy(out, total)
    fetch(target, out)
