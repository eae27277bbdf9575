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

At G = 16, 192/128, U = 48, per tile of 32 queries: PE about 23 us, VectorE 40, ScalarE 20, and 48
DMAs of 1.6 us, 38 us on each of two queues; modelled 42 us, and more than twice that where a union
is longer: 36 blocks on average with 5 % replaced per query, none of 64 tiles above 44. U = 40
models at 87 us on average, 44 at 47, 64 at 53. Of the other forms, keys
on partitions (S^T) spares the turning of p, a third of PE, but needs the maximum beforehand: all
scores twice. Adding the mask on VectorE would take 1.2 us per 128 x 512 scores.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import sbuf
from nki_kernels.common.cores import share
from nki_kernels.common.queues import fetch
from nki_kernels.common.spans import spans
from nki_kernels.selected_attention import tile as parts
from nki_kernels.selected_attention.gather import Blocks
from nki_kernels.selected_attention.softmax import Results, Tile

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
