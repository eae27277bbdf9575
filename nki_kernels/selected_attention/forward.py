"""Selected attention, forward: the union of the blocks of a query tile, gathered and masked.

Dimensions: tiles of TQ queries x G heads = ROWS rows of a kv head; pages of m <= 128 tokens, of all
batches and kv heads; the union of a tile's blocks, U at a time.
Layout: scores have 128 rows on partitions and keys along the free axis (S form), so the exact row
maximum is one VectorE reduction, and softmax runs on (online) over any number of keys. Keys and
values come as they are, [m, DK + DV]; PE turns the keys once per tile of queries.

    first, for every tile, its first U blocks; BODY tiles unrolled per iteration of a hardware loop
        gather U pages                                          run-time addresses on DMA only
        K^T                                                     PE, ScalarE
        hidden[query, key] = key >= what the query sees         VectorE, on TQ partitions
        per 128 rows, per 1024 keys:
            S = q^T.T @ K^T + E.T @ hidden                      PE; E = HIDDEN where row is query's
            new = max(max, rowmax S); p = exp(scale (S - new))  VectorE, ScalarE
            acc = acc exp(scale (max - new)) + p V              PE (p turned there), VectorE
        o = acc / sum; lse = scale max + ln sum
    then, for tiles whose union is longer, all of it once more, U blocks per trip

So any union is right, and a long one only slower. Where DK leaves room (192 = 128 + 64), the mask's
rows stand behind the second part of q^T and K^T, and cost PE nothing.

At G = 16, 192/128, U = 40, per tile of 32 queries: PE 46,000 cycles (19 us), VectorE 20 us,
ScalarE 13 us, and 40 DMAs of 1.6 us dealt to queues, which bound it. Of the other forms, keys on partitions (S^T) spares the turning of p, a third of PE, but needs the maximum beforehand:
all scores twice. Adding the mask on VectorE would take 1.2 us per 128 x 512 scores.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import columns, psum, sbuf
from nki_kernels.common.cores import share
from nki_kernels.common.spans import spans
from nki_kernels.selected_attention import tile as parts
from nki_kernels.selected_attention.gather import BANK, Blocks, fetch

FLOOR = -1.0e30
"""Where a running maximum starts: below every logit, above every hidden one."""

LAG = 2
"""Scores are made so many jobs ahead of their products with values, to keep PE busy."""


@nki.jit
def forward(
    q_t, pages, ids, place, heads, near, lists, starts, longer, amounts, count, dv: int,
    queues: str, scale: float,
):  # fmt: skip
    """o [GROUPS, BODY, ROWS, DV] in q's dtype and lse [GROUPS, BODY, ROWS, 1] float32.

    Args:
        q_t: [GROUPS, BODY, DK, ROWS]; row = query * G + head. Where there is room, `heads` follows
            on DK: see `tile.Mask`.
        pages: [PAGES, m, DK + DV].
        ids: [GROUPS, BODY, TQ, n] int32, pages chosen by each query, -1 for none.
        place: [GROUPS, BODY, TQ, 2] float32, see `tile.Queries`.
        heads: [TQ, ROWS] bfloat16, HIDDEN where a row belongs to a query.
        near: [GROUPS, BODY, U] int32: the first U blocks of each tile's union; a page that nobody
            chose fills them up.
        lists: [LISTS, U] int32: whole unions, U blocks per trip.
        starts: [TILES, 1] int32, first row of `lists` of a tile.
        longer: [HALVES, TILES / HALVES, 1] int32: tiles of more than one trip, these first.
        amounts: [TILES / HALVES, 1] int32: trips of a tile of each half.
        count: [1, 1] int32: how many of these are done.
        queues: which queue each page's DMA goes to in turn, see `gather.fetch`.
    """
    groups, body, _, rows = q_t.shape
    o = nl.ndarray((groups, body, rows, dv), dtype=q_t.dtype, buffer=nl.shared_hbm)
    lse = nl.ndarray((groups, body, rows, 1), dtype=nl.float32, buffer=nl.shared_hbm)
    dk = pages.shape[2] - dv
    mask = parts.Mask(heads, pages.shape[1], q_t.shape[2] - dk)
    first, number = share(groups)

    def one_group(g):
        queries = parts.Queries(ids.select(0, g), place.select(0, g))
        slots = near.shape[2]
        numbers = sbuf((1, body * slots), nl.int32)
        fetch(numbers, near.select(0, g))
        listed = queries.listed(near.select(0, g))
        ahead = Blocks(pages, numbers[:, 0:slots], queues)
        keys = parts.Keys(ahead, queries, 0, listed[:, 0, :], mask, dk)
        waiting = []
        for j in range(body):
            if j + 1 < body:
                ahead = Blocks(pages, numbers[:, (j + 1) * slots : (j + 2) * slots], queues)
            q = parts.load_columns(q_t.select(0, g)[j])
            tile = Tile(rows, dv, o.select(0, g)[j], lse.select(0, g)[j], False)
            jobs = tile.jobs(keys, True)
            for x in range(len(jobs)):
                if x == len(jobs) - 1 and j + 1 < body:
                    keys = parts.Keys(ahead, queries, j + 1, listed[:, j + 1, :], mask, dk)
                jobs[x].score(q, mask, scale)
                waiting.append(jobs[x])
                if len(waiting) > LAG:
                    waiting.pop(0).finish(scale)
        for job in waiting:
            job.finish(scale)

    def one_longer(tiles, i):
        """All of the union of one tile, any number of trips."""
        chosen = sbuf((1, 1), nl.int32)
        fetch(chosen, tiles.select(0, i).expand_dim(0))
        queries = parts.Queries(flat(ids, chosen), flat(place, chosen))
        q = parts.load_columns(flat(q_t, chosen)[0])
        tile = Tile(rows, dv, flat(o, chosen)[0], flat(lse, chosen)[0], True)
        pointer = sbuf((1, 1), nl.int32)
        fetch(pointer, starts.select(0, chosen).expand_dim(0))
        amount = sbuf((1, 1), nl.int32)
        fetch(amount, amounts.select(0, i).expand_dim(0))
        times = nisa.register_alloc()
        nisa.register_load(times, amount)

        def one_trip(_):
            row = lists.select(0, pointer).expand_dim(0)
            numbers = sbuf((1, lists.shape[1]), nl.int32)
            fetch(numbers, row)
            listed = queries.listed(row)
            nisa.tensor_scalar(pointer, pointer, nl.add, 1)
            blocks = Blocks(pages, numbers, queues)
            waiting = []
            for job in tile.jobs(parts.Keys(blocks, queries, 0, listed[:, 0, :], mask, dk), False):
                job.score(q, mask, scale)
                waiting.append(job)
                if len(waiting) > LAG:
                    waiting.pop(0).finish(scale)
            for job in waiting:
                job.finish(scale)

        nl.fori_loop(0, times, one_trip)
        tile.store(scale)

    nl.fori_loop(first, first + number, one_group)
    many = nisa.register_alloc()
    nisa.register_load(many, count)
    half, halves = share(longer.shape[0])
    for h in range(half, half + halves):
        nl.fori_loop(0, many, of_half(one_longer, longer[h]))
    return o, lse


def of_half(one_longer, tiles):
    """The body of a loop over a half's tiles."""

    def one(i):
        one_longer(tiles, i)

    return one


def flat(tensor, index):
    """[1, ...] of [GROUPS, BODY, ...] at the run-time number of a tile."""
    return tensor.flatten_dims(0, 1).select(0, index).expand_dim(0)


class Tile(nl.NKIObject):
    """The running softmax of the rows of a query tile, 128 at a time, and where results go."""

    def __init__(self, rows, dv, o, lse, looped):
        """o [ROWS, DV] and lse [ROWS, 1] in HBM; looped: see `Rows`."""
        self.o, self.lse = o, lse
        self.parts = []
        for start, length in spans(rows, nl.tile_size.pmax):
            self.parts.append(Rows(start, length, dv, looped))
        height = min(rows, nl.tile_size.pmax)
        self.out = sbuf((height, len(self.parts), dv), o.dtype)
        self.log = sbuf((height, len(self.parts), 1), nl.float32)

    def jobs(self, keys, last):
        """All pairs of 128 rows and a run of keys; `last`: after the last one results are final."""
        found = []
        for part in self.parts:
            for run in parts.runs_of(keys.blocks):
                found.append(Job(part, keys, run))
        if last:
            found[len(found) - 1].tile = [self]
        return found

    def store(self, scale):
        """Writes o and lse; of rows that saw nothing 0 and -inf."""
        for p in range(len(self.parts)):
            part = self.parts[p]
            part.result(self.out[0 : part.length, p, :], self.log[0 : part.length, p, :], scale)
        height, count = self.out.shape[0:2]
        for target, values in ((self.o, self.out), (self.lse, self.log)):
            if target.shape[0] == count * height:
                # All parts in one transfer: row = part * height + partition.
                view = target.reshape((count, height, target.shape[1]))
                fetch(view.permute((1, 0, 2)), values)
            else:
                for p in range(count):
                    part = self.parts[p]
                    rows = target[part.start : part.start + part.length, :]
                    fetch(rows, values[0 : part.length, p, :])


class Job(nl.NKIObject):
    """128 rows against a run of keys: scores and exponentials first, values later."""

    def __init__(self, rows, keys, run):
        self.rows, self.keys, self.run = rows, keys, run
        self.tile = []

    def score(self, q, mask, scale):
        first, banks, tiles = self.run
        size = self.keys.blocks.size
        width = tiles * size
        scores = psum((self.rows.length, banks, BANK))
        rows = slice(self.rows.start, self.rows.start + self.rows.length)
        for b in range(banks):
            start = (first + b * tiles) * size
            some = slice(start, start + width)
            mask.scores(scores[:, b, 0:width], q, self.keys.turned, self.keys.hidden, rows, some)
        self.p = sbuf((self.rows.length, banks * width), q[0].dtype)
        self.total = sbuf((self.rows.length, 1), nl.float32)
        self.fade = self.rows.raise_top(scores[:, :, 0:width], scale)
        nisa.activation(
            self.p.reshape_dim(1, (banks, width)), nl.exp, scores[:, :, 0:width],
            bias=self.rows.shift, scale=scale, reduce_op=nl.add, reduce_res=self.total,
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )  # fmt: skip

    def finish(self, scale):
        first, size, dk = self.run[0], self.keys.blocks.size, self.keys.dk
        dv = self.rows.acc.shape[1]
        turned = parts.turned_tiles(self.p, size)
        out = psum((self.rows.length, dv))
        for t in range(turned.shape[1]):
            values = self.keys.blocks.tiles[first + t][:, dk : dk + dv]
            nisa.nc_matmul(out, turned[:, t, :], values, accumulate=t > 0)
        self.rows.add(out, self.total, self.fade)
        for tile in self.tile:
            tile.store(scale)


class Rows(nl.NKIObject):
    """The running softmax of up to 128 rows of a tile.

    Attributes:
        top, total: [rows, 1] float32, running maximum of the logits before scaling; sum of
            exponentials.
        shift: [rows, 1] float32, -scale * top.
        acc: [rows, DV] float32, sum of exponentials times values.
        looped: keys come in a hardware loop, so that everything stays in the same place; else the
            first keys need no sums before them.
    """

    def __init__(self, start, length, dv, looped):
        self.start, self.length, self.looped = start, length, looped
        self.top, self.total, self.shift = columns(3, length)
        self.acc = sbuf((length, dv), nl.float32)
        self.seen, self.added = looped, looped
        if looped:
            nisa.memset(self.top, FLOOR)
            nisa.memset(self.total, 0.0)
            nisa.memset(self.acc, 0.0)

    def raise_top(self, scores, scale):
        """Takes scores [rows, banks, keys] into the maximum; what old sums fade by, as a list."""
        top = sbuf((self.length, 1), nl.float32)
        nisa.tensor_reduce(top, nl.maximum, scores, axis=(1, 2))
        if not self.seen:
            nisa.tensor_scalar(self.top, top, nl.maximum, FLOOR)
            nisa.tensor_scalar(self.shift, self.top, nl.multiply, -scale)
            self.seen = True
            return []
        (fade,) = columns(1, self.length)
        nisa.tensor_tensor(top, top, self.top, nl.maximum)
        if not self.looped:
            (self.shift,) = columns(1, self.length)
        nisa.tensor_scalar(self.shift, top, nl.multiply, -scale)
        nisa.activation(fade, nl.exp, self.top, bias=self.shift, scale=scale)
        if self.looped:
            nisa.tensor_copy(self.top, top)
        else:
            self.top = top
        return [fade]

    def add(self, out, total, fade):
        """Adds exponentials' sums: with values [rows, DV] (PSUM), and alone [rows, 1]."""
        if not self.added:
            nisa.tensor_copy(self.acc, out)
            nisa.tensor_copy(self.total, total)
            self.added = True
            return
        nisa.scalar_tensor_tensor(self.acc, self.acc, nl.multiply, fade[0], nl.add, out)
        nisa.scalar_tensor_tensor(self.total, self.total, nl.multiply, fade[0], nl.add, total)

    def result(self, o, lse, scale):
        """o [rows, DV] and lse [rows, 1]."""
        dead = sbuf((self.length, 1), nl.uint8)
        safe, inverse = columns(2, self.length)
        nisa.tensor_scalar(dead, self.total, nl.equal, 0.0)
        # The largest exponential is 1: only an empty sum is smaller.
        nisa.tensor_scalar(safe, self.total, nl.maximum, 0.5)
        nisa.reciprocal(inverse, safe)
        nisa.tensor_scalar(o, self.acc, nl.multiply, inverse)
        nisa.activation(lse, nl.log, safe)
        nisa.scalar_tensor_tensor(lse, self.top, nl.multiply, scale, nl.add, lse)
        nisa.tensor_copy_predicated(lse, -float("inf"), dead)
