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

At G = 16, 192/128, U = 40, per tile of 32 queries: PE 46,000 cycles (19 us), VectorE 33 us, ScalarE
17 us, and 40 DMAs of 1.6 us, 32 us on each of two queues; modelled 40 us. Of the other forms, keys
on partitions (S^T) spares the turning of p, a third of PE, but needs the maximum beforehand: all
scores twice. Adding the mask on VectorE would take 1.2 us per 128 x 512 scores.
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

FLOOR = -1.0e30
"""Where a running maximum starts: below every logit, above every hidden one."""

LAG = 3
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
        columns_of = []
        for start, length in spans(q_t.shape[2], nl.tile_size.pmax):
            part = sbuf((length, body, rows), q_t.dtype)
            source = q_t.select(0, g)[:, start : start + length, :]
            fetch(part, source.permute((1, 0, 2)))
            columns_of.append(part)
        ahead = Blocks(pages, numbers[:, 0:slots], queues)
        keys = parts.Keys(ahead, queries, 0, listed[:, 0, :], mask, dk)
        logs, waiting = Results(lse.select(0, g), nl.float32), []
        for j in range(body):
            if j + 1 < body:
                ahead = Blocks(pages, numbers[:, (j + 1) * slots : (j + 2) * slots], queues)
            q = []
            for part in columns_of:
                q.append(part[:, j, :])
            tile = Tile(Results(o.select(0, g)[j : j + 1], o.dtype), logs, j, False)
            jobs = tile.jobs(keys, True)
            for x in range(len(jobs)):
                if x == len(jobs) - 1 and j + 1 < body:
                    keys = parts.Keys(ahead, queries, j + 1, listed[:, j + 1, :], mask, dk)
                advance(waiting, jobs[x], q, mask, scale)
        drain(waiting, scale)
        logs.store()

    def one_longer(tiles, i):
        """All of the union of one tile, any number of trips."""
        chosen = sbuf((1, 1), nl.int32)
        fetch(chosen, tiles.select(0, i).expand_dim(0))
        queries = parts.Queries(parts.flat(ids, chosen), parts.flat(place, chosen))
        q = parts.load_columns(parts.flat(q_t, chosen)[0])
        logs = Results(parts.flat(lse, chosen), nl.float32)
        tile = Tile(Results(parts.flat(o, chosen), o.dtype), logs, 0, True)
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
            keys = parts.Keys(blocks, queries, 0, listed[:, 0, :], mask, dk)
            for job in tile.jobs(keys, False):
                advance(waiting, job, q, mask, scale)
            drain(waiting, scale)

        nl.fori_loop(0, times, one_trip)
        tile.finish(scale)
        logs.store()

    nl.fori_loop(first, first + number, one_group)
    many = nisa.register_alloc()
    nisa.register_load(many, count)
    half, halves = share(longer.shape[0])
    for h in range(half, half + halves):
        nl.fori_loop(0, many, of_half(one_longer, longer[h]))
    return o, lse


def advance(waiting, job, q, mask, scale):
    """Scores of a job, between the two halves of the work of one `LAG` before it.

    In this order no engine waits for one that is busy with something else: PE turns the old
    exponentials and makes the new scores while VectorE copies the turned ones and then finds the
    new maximum.
    """
    late = len(waiting) >= LAG
    if late:
        waiting[0].turn()
    job.score(q, mask, scale)
    waiting.append(job)
    if late:
        waiting.pop(0).add(scale)


def drain(waiting, scale):
    """The rest of all jobs whose scores are made."""
    for job in waiting:
        job.turn()
        job.add(scale)


def of_half(one_longer, tiles):
    """The body of a loop over a half's tiles."""

    def one(i):
        one_longer(tiles, i)

    return one


class Results(nl.NKIObject):
    """Rows of some tiles on their way to HBM: [rows of a part, TILES, parts, N]."""

    def __init__(self, target, dtype):
        """target: [TILES, ROWS, N] in HBM."""
        tiles, rows, width = target.shape
        height = min(rows, nl.tile_size.pmax)
        self.target = target
        self.values = sbuf((height, tiles, (rows + height - 1) // height, width), dtype)

    def store(self):
        """Writes all, in one transfer where parts are whole: row = part * height + partition."""
        height, count = self.values.shape[0], self.values.shape[2]
        if self.target.shape[1] == count * height:
            view = self.target.reshape_dim(1, (count, height))
            fetch(view.permute((2, 0, 1, 3)), self.values)
            return
        for p, length in spans(self.target.shape[1], height):
            view = self.target[:, p : p + length, :]
            fetch(view.permute((1, 0, 2)), self.values[0:length, :, p // height, :])


class Tile(nl.NKIObject):
    """The running softmax of the rows of a query tile, 128 at a time, and where results go."""

    def __init__(self, out, logs, index, looped):
        """out, logs: `Results` of this tile's o and of some tiles' lse, where its number is index;
        looped: see `Rows`."""
        self.out, self.logs, self.index = out, logs, index
        self.parts = []
        rows, dv = out.target.shape[1:]
        for start, length in spans(rows, nl.tile_size.pmax):
            self.parts.append(Rows(start, length, dv, looped))

    def jobs(self, keys, last):
        """All pairs of 128 rows and a run of keys; `last`: after the last one results are final."""
        found = []
        for part in self.parts:
            for run in parts.runs_of(keys.blocks):
                found.append(Job(part, keys, run))
        if last:
            found[len(found) - 1].tile = [self]
        return found

    def finish(self, scale):
        """Writes o; lse is written with that of the other tiles."""
        for p in range(len(self.parts)):
            part = self.parts[p]
            part.result(
                self.out.values[0 : part.length, 0, p, :],
                self.logs.values[0 : part.length, self.index, p, :],
                scale,
            )
        self.out.store()


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

    def turn(self):
        size = self.keys.blocks.size
        self.turned = parts.turned_tiles(self.p, size, nisa.engine.vector)

    def add(self, scale):
        dk, dv = self.keys.dk, self.rows.acc.shape[1]
        out = psum((self.rows.length, dv))
        for t in range(self.turned.shape[1]):
            values = self.keys.blocks.tiles[self.run[0] + t][:, dk : dk + dv]
            nisa.nc_matmul(out, self.turned[:, t, :], values, accumulate=t > 0)
        self.rows.add(out, self.total, self.fade)
        for tile in self.tile:
            tile.finish(scale)


class Rows(nl.NKIObject):
    """The running softmax of up to 128 rows of a tile.

    Attributes:
        top, total: [rows, 1] float32, running maximum of the logits before scaling; sum of
            exponentials.
        shift: [rows, 1] float32, what is added to scaled logits.
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
            self.shift_by(top, scale)
            self.top, self.seen = top, True
            return []
        (fade,) = columns(1, self.length)
        nisa.tensor_tensor(top, top, self.top, nl.maximum)
        if not self.looped:
            (self.shift,) = columns(1, self.length)
        self.shift_by(top, scale)
        nisa.activation(fade, nl.exp, self.top, bias=self.shift, scale=scale)
        if self.looped:
            nisa.tensor_copy(self.top, top)
        else:
            self.top = top
        return [fade]

    def shift_by(self, top, scale):
        """shift = -scale * top, or of `FLOOR` where nothing has been seen."""
        nisa.tensor_scalar(self.shift, top, nl.maximum, FLOOR, op1=nl.multiply, operand1=-scale)

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
