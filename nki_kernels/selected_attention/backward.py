"""Selected attention, backward: by query tile as forward; dk and dv added block by block.

Dimensions and layout as in `forward`. p = exp(scale S - lse) is recomputed;
ds = scale p (dO v^T - delta), delta = sum(dO o) - grad_lse; a hidden key has p = 0.

    per tile, per trip of its union list:                       hardware loops
        gather U pages; K^T, V^T                                DMA; PE
        per 128 rows, per 512 keys:
            S, dP = q^T.T @ K^T + mask, dO^T.T @ V^T            PE
            p, ds                                               ScalarE, VectorE
            dq += ds K                                          PE (ds turned there)
        per 128 keys: dk, dv = sum over rows ds^T q, p^T dO     PE: rows on partitions already
            sums[rows of these keys] += dk, dv                  DMA that adds in float32
    then, per 128 keys: dk, dv = sum of all sums                backward_sum

A core's additions to one tensor come one after another, in the order of its tiles. To keep several
under way there are `CHAINS` tensors, key tile t adding to tensor t % CHAINS, for each half of the
query tiles; which half and which chain an addition belongs to hangs on no core, so one core and two
give the same bits, and two runs do.

Bound at U = 40, G = 16, 192/128, per tile of 32 queries, by GpSimd, which makes the descriptors of
20 additions of 128 rows, 3.9 us each (78 us); PE has 90,000 cycles (38 us). Modelled 158 us, since
tiles do not overlap yet. The other way, per block the list of the tiles that have it, needs no sums
in HBM, but S and dP a second time and 650 KB of q and dO per block and tile: modelled at 1,000 us.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import columns, psum, sbuf
from nki_kernels.common.cores import share
from nki_kernels.common.queues import fetch
from nki_kernels.common.spans import spans
from nki_kernels.selected_attention import tile as parts
from nki_kernels.selected_attention.gather import BANK, Blocks

CHAINS = 2
"""Sums per half of the query tiles that may be under way at once."""


@nki.jit
def backward(
    q_t, do_t, q, do, o, stats, pages, ids, place, heads, lists, starts, trips, queues: str,
    scale: float,
):  # fmt: skip
    """dq [TILES, ROWS, DK] in q's dtype, and 2 * CHAINS sums [PAGES * m, DK + DV] float32.

    Args:
        q_t, do_t: [TILES, D, ROWS], TILES even; q_t has `heads` behind it where there is room, see
            `tile.Mask`. q, do, o: [TILES, ROWS, D].
        stats: [TILES, ROWS, 3] float32: ln(scale) - lse and -lse (both 0 of rows that see nothing),
            and grad_lse.
        pages: [PAGES, m, DK + DV].
        ids: [TILES, TQ, n]. place: [TILES, TQ, 2].
        heads, lists, starts, queues: as for `forward`; null pages that fill a list up differ within
            128 keys.
        trips: [TILES, 1] int32: rows of `lists` of a tile, equal in both halves.
    """
    (tiles, _, rows), dk = q_t.shape, q.shape[2]
    dq = nl.ndarray((tiles, rows, dk), dtype=q_t.dtype, buffer=nl.shared_hbm)
    sums = []
    for _ in range(2 * CHAINS):
        shape = (pages.shape[0] * pages.shape[1], pages.shape[2])
        sums.append(nl.ndarray(shape, dtype=nl.float32, buffer=nl.shared_hbm))
    mask = parts.Mask(heads, pages.shape[1], q_t.shape[1] - dk)

    def tile_of(own_sums):
        def one_tile(i):
            tile = Tile(q_t.select(0, i), do_t.select(0, i), dk)
            tile.load_rows(q.select(0, i), do.select(0, i), o.select(0, i), stats.select(0, i))
            queries = parts.Queries(
                ids.select(0, i).expand_dim(0), place.select(0, i).expand_dim(0)
            )
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
                places = rows_of(row, pages.shape[1])
                nisa.tensor_scalar(pointer, pointer, nl.add, 1)
                blocks = Blocks(pages, numbers, queues)
                keys = parts.Keys(blocks, queries, 0, listed[:, 0, :], mask, dk)
                values = blocks.turned(dk, pages.shape[2])
                tile.add(keys, values, mask, own_sums, places, scale)

            nl.fori_loop(0, times, one_trip)
            tile.store(dq.select(0, i))

        return one_tile

    first, number = share(2)
    for half in range(first, first + number):
        own = sums[half * CHAINS : (half + 1) * CHAINS]
        for total in own:
            clear(total)
        nl.fori_loop(half * tiles // 2, (half + 1) * tiles // 2, tile_of(own))
    return dq, sums[0], sums[1], sums[2], sums[3]


def clear(total):
    """Zeros to an HBM tensor [R, W] of float32."""
    count, width = total.shape
    height = nl.tile_size.pmax
    many = 8 * height
    zeros = sbuf((height, 8 * width), nl.float32)
    nisa.memset(zeros, 0.0)
    whole = count // many
    if whole > 0:
        view = total[0 : whole * many, :].reshape((whole, height, 8 * width))

        def one(i):
            fetch(view.select(0, i), zeros)

        nl.fori_loop(0, whole, one)
    for start, length in spans(count - whole * many, height):
        first = whole * many + start
        fetch(total[first : first + length, :], zeros[0:length, 0:width])


def rows_of(row, tokens):
    """Where the keys of a list [1, U] of pages lie: page * m + key, [keys, tiles] int32."""
    per_tile = nl.tile_size.pmax // tokens
    count = row.shape[1] // per_tile
    size = per_tile * tokens
    raw, at = sbuf((size, count), nl.int32), sbuf((size, count), nl.int32)
    within = sbuf((size, 1), nl.float32)
    for b in range(per_tile):
        own = row.reshape((1, count, per_tile))[:, :, b]
        fetch(raw[b * tokens : (b + 1) * tokens, :], own.broadcast(0, tokens))
    key = sbuf((size, per_tile), nl.float32)
    # The key's number in its page: its partition less the first one of the page.
    nisa.iota(key, [[-tokens, per_tile]], offset=0, channel_multiplier=1)
    low, high = sbuf(key.shape, nl.float32), sbuf(key.shape, nl.float32)
    nisa.tensor_scalar(low, key, nl.greater_equal, 0.0)
    nisa.tensor_scalar(high, key, nl.less, float(tokens))
    nisa.tensor_tensor(low, low, high, nl.multiply)
    nisa.tensor_tensor(key, key, low, nl.multiply)
    nisa.tensor_reduce(within, nl.add, key, axis=1)
    nisa.tensor_scalar(at, raw, nl.multiply, float(tokens), op1=nl.add, operand1=within)
    return at


class Tile(nl.NKIObject):
    """The rows of a query tile, 128 at a time, and their dq."""

    def __init__(self, q_t, do_t, dk):
        self.q, self.grad = parts.load_columns(q_t), parts.load_columns(do_t)
        self.dtype = q_t.dtype
        self.parts = []
        for start, length in spans(q_t.shape[1], nl.tile_size.pmax):
            self.parts.append(Rows(start, length, dk))

    def load_rows(self, q, do, o, stats):
        """[ROWS, N] tensors in HBM."""
        count, height = len(self.parts), self.parts[0].length
        loaded = []
        for source in (q, do, o, stats):
            whole = sbuf((height, count, source.shape[1]), source.dtype)
            if source.shape[0] == count * height:
                # Row = part * height + partition.
                fetch(whole, source.reshape_dim(0, (count, height)).permute((1, 0, 2)))
            else:
                for p in range(count):
                    part = self.parts[p]
                    fetch(whole[0 : part.length, p, :], source[part.rows, :])
            loaded.append(whole)
        for p in range(count):
            part = self.parts[p]
            own = slice(0, part.length)
            part.begin(
                loaded[0][own, p, :], loaded[1][own, p, :], loaded[2][own, p, :],
                loaded[3][own, p, :],
            )  # fmt: skip

    def add(self, keys, values, mask, sums, places, scale):
        """Adds what the keys of a trip contribute to dq, and their dk and dv to `sums`."""
        for part in self.parts:
            part.differentiate(self.q, self.grad, keys, values, mask, self.dtype, scale)
        size, tiles = keys.blocks.size, len(keys.blocks.tiles)
        dk = keys.dk
        for t in range(tiles):
            some = slice(t * size, (t + 1) * size)
            dv = self.parts[0].do.shape[1]
            dk_part, dv_part = psum((size, dk)), psum((size, dv))
            for p in range(len(self.parts)):
                part = self.parts[p]
                nisa.nc_matmul(dk_part, part.ds[:, some], part.q, accumulate=p > 0)
            for p in range(len(self.parts)):
                part = self.parts[p]
                nisa.nc_matmul(dv_part, part.p[:, some], part.do, accumulate=p > 0)
            total = sbuf((size, dk + dv), nl.float32)
            nisa.tensor_copy(total[:, 0:dk], dk_part, engine=nisa.engine.vector)
            nisa.tensor_copy(total[:, dk : dk + dv], dv_part, engine=nisa.engine.vector)
            target = sums[t % len(sums)].vector_select(0, places[:, t : t + 1])
            nisa.dma_compute(target, (target, total), nl.add)

    def store(self, dq):
        """Writes dq [ROWS, DK]."""
        for part in self.parts:
            out = sbuf(part.acc.shape, dq.dtype)
            nisa.tensor_copy(out, part.acc)
            fetch(dq[part.rows, :], out)


class Rows(nl.NKIObject):
    """Up to 128 rows of a tile.

    Attributes:
        acc: [rows, DK] float32, dq so far.
        q, do: [rows, D]. stats: [rows, 3], see `backward`. delta: [rows, 1] float32.
        p, ds: [rows, keys] of a trip, in q's dtype.
    """

    def __init__(self, start, length, dk):
        self.rows = slice(start, start + length)
        self.length = length
        self.acc = sbuf((length, dk), nl.float32)
        nisa.memset(self.acc, 0.0)

    def begin(self, q, do, o, stats):
        self.q, self.do, self.stats = q, do, stats
        (self.delta,) = columns(1, self.length)
        product = sbuf(do.shape, nl.float32)
        nisa.tensor_tensor(product, do, o, nl.multiply)
        nisa.tensor_reduce(self.delta, nl.add, product, axis=1)
        nisa.tensor_tensor(self.delta, self.delta, stats[:, 2:3], nl.subtract)

    def differentiate(self, q, grad, keys, values, mask, dtype, scale):
        """p and ds of the keys of a trip; adds to dq."""
        size, shape = keys.blocks.size, (self.length, keys.blocks.keys)
        self.p, self.ds = sbuf(shape, dtype), sbuf(shape, dtype)
        out = psum(self.acc.shape)
        for first, count in spans(len(keys.blocks.tiles), BANK // size):
            some = slice(first * size, (first + count) * size)
            scores, dp = psum((self.length, count * size)), psum((self.length, count * size))
            scaled = sbuf(scores.shape, nl.float32)
            mask.scores(scores, q, keys.turned, keys.hidden, self.rows, some)
            parts.product(dp, grad, values, self.rows, some)
            nisa.activation(scaled, nl.exp, scores, bias=self.stats[:, 0:1], scale=scale)
            nisa.activation(self.p[:, some], nl.exp, scores, bias=self.stats[:, 1:2], scale=scale)
            nisa.scalar_tensor_tensor(
                self.ds[:, some], dp, nl.subtract, self.delta, nl.multiply, scaled
            )
            ds_t = parts.turned_tiles(self.ds[:, some], size, nisa.engine.scalar)
            for t in range(count):
                key_rows = keys.blocks.tiles[first + t][:, 0 : keys.dk]
                nisa.nc_matmul(out, ds_t[:, t, :], key_rows, accumulate=first + t > 0)
        nisa.tensor_tensor(self.acc, self.acc, out, nl.add)


@nki.jit
def backward_sum(sums_0, sums_1, sums_2, sums_3, keys: int, dk: int, dtype_of):
    """dk [keys, DK] and dv [keys, DV] in dtype_of's dtype: the first rows of four sums added up.

    Args:
        sums_0, ...: [>= keys, DK + DV] float32, in this order.
        dtype_of: any tensor.
    """
    width = sums_0.shape[1]
    dks = nl.ndarray((keys, dk), dtype=dtype_of.dtype, buffer=nl.shared_hbm)
    dvs = nl.ndarray((keys, width - dk), dtype=dtype_of.dtype, buffer=nl.shared_hbm)
    height = min(keys, nl.tile_size.pmax)
    whole = keys // height * height
    blocks = []
    for tensor in (sums_0, sums_1, sums_2, sums_3, dks, dvs):
        view = tensor[0:whole, :]
        blocks.append(view.reshape((whole // height, height, tensor.shape[1])))

    def one(i):
        rows = []
        for view in blocks:
            rows.append(view.select(0, i))
        add_up(rows, height, dk)

    first, number = share(whole // height)
    nl.fori_loop(first, first + number, one)
    if whole < keys:
        rows = []
        for tensor in (sums_0, sums_1, sums_2, sums_3, dks, dvs):
            rows.append(tensor[whole:keys, :])
        add_up(rows, keys - whole, dk)
    return dks, dvs


def add_up(rows, count, dk):
    """rows: views [count, N] of the four sums, of dk and of dv."""
    width = rows[0].shape[1]
    total = sbuf((count, width), nl.float32)
    fetch(total, rows[0])
    for other in rows[1:4]:
        more = sbuf((count, width), nl.float32)
        fetch(more, other)
        nisa.tensor_tensor(total, total, more, nl.add)
    for target, first, last in ((rows[4], 0, dk), (rows[5], dk, width)):
        out = sbuf((count, last - first), target.dtype)
        nisa.tensor_copy(out, total[:, first:last])
        fetch(target, out)
