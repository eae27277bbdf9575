"""Selected attention, backward: by query tile as forward; dk and dv added block by block.

Dimensions and layout as in `forward`. p = exp(scale S - lse) is recomputed;
ds = scale p (dO v^T - delta), delta = sum(dO o) - grad_lse; a hidden key has p = 0.

    per tile, its first U blocks; then for longer unions, trip by trip:
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
20 additions of 128 rows, 3.9 us each (78 us); PE has 42 us, ScalarE 35 us. Modelled: 103 us. The
other way, per block the list of the tiles that have it, needs no sums in HBM, but S and dP a second
time and 650 KB of q and dO per block and tile: modelled at 1,000 us per tile as first written.
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

LAG = 2
"""p and ds are made so many jobs ahead of their part of dq, to keep PE busy."""

CHAINS = 2
"""Sums per half of the query tiles that may be under way at once."""


@nki.jit
def backward(
    q_t, do_t, q, do, o, stats, pages, ids, place, heads, near, lists, starts, longer, amounts,
    count, queues: str, scale: float,
):  # fmt: skip
    """dq [GROUPS, BODY, ROWS, DK] in q's dtype, and 2 * CHAINS sums [PAGES * m, DK + DV] float32.

    Args:
        q_t, do_t: [GROUPS, BODY, D, ROWS], GROUPS even; q_t has `heads` behind it where there is
            room, see `tile.Mask`. q, do, o: [GROUPS, BODY, ROWS, D].
        stats: [GROUPS, BODY, ROWS, 3] float32: ln(scale) - lse and -lse (both 0 of rows that see
            nothing), and grad_lse.
        pages: [PAGES, m, DK + DV].
        ids, place, heads, near, lists, starts, longer, amounts, count, queues: as for `forward`;
            null pages that fill a list up differ within 128 keys.
    """
    groups, rows, dk = q_t.shape[0], q_t.shape[3], q.shape[3]
    dq = nl.ndarray((*q_t.shape[0:2], rows, dk), dtype=q_t.dtype, buffer=nl.shared_hbm)
    sums = []
    for _ in range(2 * CHAINS):
        shape = (pages.shape[0] * pages.shape[1], pages.shape[2])
        sums.append(nl.ndarray(shape, dtype=nl.float32, buffer=nl.shared_hbm))
    mask = parts.Mask(heads, pages.shape[1], q_t.shape[2] - dk)

    def first_trips(own_sums):
        def one_group(g):
            tensors = Tensors(
                q_t.select(0, g), do_t.select(0, g), q.select(0, g), do.select(0, g),
                o.select(0, g), stats.select(0, g),
            )  # fmt: skip
            queries = parts.Queries(ids.select(0, g), place.select(0, g))
            body, slots = near.shape[1:]
            numbers = sbuf((1, body * slots), nl.int32)
            fetch(numbers, near.select(0, g))
            listed = queries.listed(near.select(0, g))
            row = near.select(0, g).reshape((1, body * slots))
            places = rows_of(row, pages.shape[1])
            per = places.shape[1] // body
            ahead = Blocks(pages, numbers[:, 0:slots], queues)
            keys = Keys(ahead, queries, 0, listed[:, 0, :], mask, dk)
            for j in range(body):
                if j + 1 < body:
                    ahead = Blocks(pages, numbers[:, (j + 1) * slots : (j + 2) * slots], queues)
                tile = Tile(tensors, j, dk)
                tile.differentiate(keys, mask, scale)
                before = keys
                if j + 1 < body:
                    keys = Keys(ahead, queries, j + 1, listed[:, j + 1, :], mask, dk)
                tile.add_to(own_sums, before, places[:, j * per : (j + 1) * per])
                tile.store(dq.select(0, g)[j])

        return one_group

    def all_trips(own_sums, tiles):
        def one_tile(i):
            chosen = sbuf((1, 1), nl.int32)
            fetch(chosen, tiles.select(0, i).expand_dim(0))
            tensors = Tensors(
                parts.flat(q_t, chosen), parts.flat(do_t, chosen), parts.flat(q, chosen),
                parts.flat(do, chosen), parts.flat(o, chosen), parts.flat(stats, chosen),
            )  # fmt: skip
            queries = parts.Queries(parts.flat(ids, chosen), parts.flat(place, chosen))
            pointer, amount = sbuf((1, 1), nl.int32), sbuf((1, 1), nl.int32)
            fetch(pointer, starts.select(0, chosen).expand_dim(0))
            fetch(amount, amounts.select(0, i).expand_dim(0))
            times = nisa.register_alloc()
            nisa.register_load(times, amount)
            tile = Tile(tensors, 0, dk)
            tile.clear()

            def trip(again):
                row = lists.select(0, pointer).expand_dim(0)
                numbers = sbuf((1, lists.shape[1]), nl.int32)
                fetch(numbers, row)
                listed = queries.listed(row)
                places = rows_of(row, pages.shape[1])
                nisa.tensor_scalar(pointer, pointer, nl.add, 1)
                blocks = Blocks(pages, numbers, queues)
                keys = Keys(blocks, queries, 0, listed[:, 0, :], mask, dk)
                tile.differentiate(keys, mask, scale)
                if again:
                    tile.add_to(own_sums, keys, places)

            def one_trip(_):
                trip(True)

            # The first trip's dk and dv have been added already.
            trip(False)
            nl.fori_loop(1, times, one_trip)
            tile.store(parts.flat(dq, chosen)[0])

        return one_tile

    many = nisa.register_alloc()
    nisa.register_load(many, count)
    first, number = share(2)
    for half in range(first, first + number):
        own = sums[half * CHAINS : (half + 1) * CHAINS]
        for total in own:
            clear(total)
        nl.fori_loop(half * groups // 2, (half + 1) * groups // 2, first_trips(own))
        nl.fori_loop(0, many, all_trips(own, longer[half]))
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


class Keys(nl.NKIObject):
    """Gathered blocks, ready for the products: K^T and V^T, and which keys are hidden."""

    def __init__(self, blocks, queries, tile, listed, mask, dk):
        self.blocks = blocks
        self.scored = parts.Keys(blocks, queries, tile, listed, mask, dk)
        self.values = blocks.turned(dk, blocks.tiles[0].shape[1])


class Tensors(nl.NKIObject):
    """What is known of the rows of some tiles, in SBUF.

    Attributes:
        q_t, do_t: [D, TILES, ROWS], one per 128 of D.
        q, do, o, stats: [rows of a part, TILES, parts, N].
    """

    def __init__(self, q_t, do_t, q, do, o, stats):
        """Tensors of some tiles as `backward` takes them: [TILES, ...]."""
        self.q_t, self.do_t = self.columns(q_t), self.columns(do_t)
        self.q, self.do = self.rows(q), self.rows(do)
        self.o, self.stats = self.rows(o), self.rows(stats)

    def columns(self, source):
        """[TILES, D, ROWS] in HBM."""
        tiles, size, rows = source.shape
        found = []
        for start, length in spans(size, nl.tile_size.pmax):
            part = sbuf((length, tiles, rows), source.dtype)
            fetch(part, source[:, start : start + length, :].permute((1, 0, 2)))
            found.append(part)
        return found

    def rows(self, source):
        """[TILES, ROWS, N] in HBM."""
        tiles, rows, width = source.shape
        height = min(rows, nl.tile_size.pmax)
        count = (rows + height - 1) // height
        whole = sbuf((height, tiles, count, width), source.dtype)
        if rows == count * height:
            # Row = part * height + partition.
            view = source.reshape_dim(1, (count, height))
            fetch(whole, view.permute((2, 0, 1, 3)))
        else:
            for start, length in spans(rows, height):
                view = source[:, start : start + length, :].permute((1, 0, 2))
                fetch(whole[0:length, :, start // height, :], view)
        return whole


class Tile(nl.NKIObject):
    """The rows of a query tile, 128 at a time, and their dq."""

    def __init__(self, tensors, index, dk):
        self.q, self.grad = [], []
        for part in tensors.q_t:
            self.q.append(part[:, index, :])
        for part in tensors.do_t:
            self.grad.append(part[:, index, :])
        self.parts = []
        for start, length in spans(self.q[0].shape[1], nl.tile_size.pmax):
            self.parts.append(Rows(tensors, index, start, length, dk))

    def clear(self):
        """dq = 0, for several trips."""
        for part in self.parts:
            nisa.memset(part.acc, 0.0)
            part.looped = True

    def differentiate(self, keys, mask, scale):
        """p and ds of the keys of a trip, and what they add to dq."""
        waiting = []
        for part in self.parts:
            part.begin(keys)
            for run in spans(len(keys.blocks.tiles), BANK // keys.blocks.size):
                if len(waiting) >= LAG:
                    waiting.pop(0).add()
                job = Job(part, keys, run)
                job.differentiate(self.q, self.grad, mask, scale)
                waiting.append(job)
        for job in waiting:
            job.add()

    def add_to(self, sums, keys, places):
        """Adds dk and dv of the keys of a trip to `sums`, at `places` [keys of a tile, tiles]."""
        size = keys.blocks.size
        dk, dv = self.parts[0].q.shape[1], self.parts[0].do.shape[1]
        for t in range(len(keys.blocks.tiles)):
            some = slice(t * size, (t + 1) * size)
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

    def __init__(self, tensors, index, start, length, dk):
        self.rows, self.length, self.looped = slice(start, start + length), length, False
        p, own = start // nl.tile_size.pmax, slice(0, length)
        self.q, self.do = tensors.q[own, index, p, :], tensors.do[own, index, p, :]
        self.stats = tensors.stats[own, index, p, :]
        self.acc = sbuf((length, dk), nl.float32)
        (self.delta,) = columns(1, length)
        product = sbuf(self.do.shape, nl.float32)
        nisa.tensor_tensor(product, self.do, tensors.o[own, index, p, :], nl.multiply)
        nisa.tensor_reduce(self.delta, nl.add, product, axis=1)
        nisa.tensor_tensor(self.delta, self.delta, self.stats[:, 2:3], nl.subtract)

    def begin(self, keys):
        """Room for p and ds of a trip."""
        shape = (self.length, keys.blocks.keys)
        self.p, self.ds = sbuf(shape, self.q.dtype), sbuf(shape, self.q.dtype)
        self.out = psum(self.acc.shape)

    def take(self):
        """Adds what a trip has added up in PSUM to dq."""
        if self.looped:
            nisa.tensor_tensor(self.acc, self.acc, self.out, nl.add)
        else:
            nisa.tensor_copy(self.acc, self.out)


class Job(nl.NKIObject):
    """128 rows against a run of at most 512 keys: p and ds first, their part of dq later."""

    def __init__(self, rows, keys, run):
        self.rows, self.keys, self.run = rows, keys, run

    def differentiate(self, q, grad, mask, scale):
        rows, size = self.rows, self.keys.blocks.size
        first, count = self.run
        self.some = slice(first * size, (first + count) * size)
        shape = (rows.length, count * size)
        scores, dp, scaled = psum(shape), psum(shape), sbuf(shape, nl.float32)
        scored = self.keys.scored
        mask.scores(scores, q, scored.turned, scored.hidden, rows.rows, self.some)
        parts.product(dp, grad, self.keys.values, rows.rows, self.some)
        nisa.activation(scaled, nl.exp, scores, bias=rows.stats[:, 0:1], scale=scale)
        nisa.activation(rows.p[:, self.some], nl.exp, scores, bias=rows.stats[:, 1:2], scale=scale)
        nisa.scalar_tensor_tensor(
            rows.ds[:, self.some], dp, nl.subtract, rows.delta, nl.multiply, scaled
        )

    def add(self):
        rows, blocks = self.rows, self.keys.blocks
        first, count = self.run
        turned = parts.turned_tiles(rows.ds[:, self.some], blocks.size, nisa.engine.scalar)
        for t in range(count):
            key_rows = blocks.tiles[first + t][:, 0 : rows.q.shape[1]]
            nisa.nc_matmul(rows.out, turned[:, t, :], key_rows, accumulate=first + t > 0)
        if first + count == len(blocks.tiles):
            rows.take()


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
