"""Forward in hardware loops, for lengths whose unrolled programs no compiler takes.

    for each kv head:
        for each group of queries:                                  hardware loop
            q^T, U of each of its tiles                             as in `fast`
            for each chunk of keys:                                 five hardware loops
                for each tile of the group, each 128 keys:          as in `fast`
                acc += P v, total += P^T                            from PSUM to SBUF, VectorE
            o = acc / sum, lse; unsafe[group] = a sum was too small
        for each group, unsafe[group] times:                        hardware loop
            the exact way, its statistics and sums merged from chunk to chunk

Every DMA has a run-time address, so each moves as much as it can: rows of a whole group, keys of
PIECE. Loads of a chunk wait for nothing but their place, since pieces are tensors of their own.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.cores import this_core
from nki_kernels.common.queues import fetch
from nki_kernels.common.range_attention import exact
from nki_kernels.common.range_attention.fast import ADDERS, AHEAD, Fast, Work, unsafe_rows
from nki_kernels.common.range_attention.geometry import queries_per_part
from nki_kernels.common.range_attention.loops import (
    PARTS,
    Edges,
    Loops,
    by_part,
    chunks_of,
    columns_of_chunk,
    for_all_chunks,
    for_every_chunk,
    lanes,
    load_group,
    of_group,
    rows_of_chunk,
    tiles_of_group,
)
from nki_kernels.common.range_attention.operands import (
    SMALLEST_SUM,
    Constants,
    shift_rows,
    transpose_rows,
)
from nki_kernels.common.range_attention.source import Source, largest_of
from nki_kernels.common.spans import spans

AT_ONCE = 2048  # groups whose flags two cores exchange
NOTHING = -3e38  # below any logit, no number that exp takes for more than 0


def attend_looped(q, k_t, v, bounds, largest_key, trips, bases, scale, looped):
    """o [B, S, Hq, Dv] in q's dtype and lse [B, S, Hq, 1] float32, in HBM.

    As `forward.attend`, but S is a whole number of pairs of groups, T of small chunks, and `trips`,
    `bases` and `looped` are those of `loops.Loops`.
    """
    batch, queries, heads, _ = q.shape
    o = nl.ndarray((batch, queries, heads, v.shape[3]), dtype=q.dtype, buffer=nl.shared_hbm)
    lse = nl.ndarray((batch, queries, heads, 1), dtype=nl.float32, buffer=nl.shared_hbm)
    constants = Constants(q.dtype)
    loops = Loops(trips, bases, looped)
    constants.keep_positions(loops.small)
    kv_heads = k_t.shape[1]
    for b, h, h0, own in lanes(batch, kv_heads, heads // kv_heads):
        part = slice(h0, h0 + own)
        lane = Lane(q[b, :, part, :], k_t[b, h], v[b, :, h, :], bounds, constants, scale, loops)
        lane.aim(o[b, :, part, :], lse[b, :, part, :])
        if q.dtype == nl.float16:  # P would need its 11 bits
            loops.for_all_groups(lane.groups, lane.exactly)
        else:
            lane.attend(largest_key[b : b + 1, h : h + 1])
    return o, lse


class Lane(nl.NKIObject):
    """One kv head with up to 128 of its query heads: views of what it reads and writes."""

    def __init__(self, q, k_t, v, bounds, constants, scale, loops):
        self.q = q
        self.k_t = k_t
        self.v = v
        self.bounds = bounds
        self.constants = constants
        self.scale = scale
        self.loops = loops
        self.heads = q.shape[1]
        self.per_part = queries_per_part(self.heads)
        self.size = loops.queries(self.heads)
        self.groups = q.shape[0] // self.size

    def aim(self, o, lse):
        self.o = o
        self.lse = lse

    def source(self, size, j):
        """Keys and values of chunk j of `size` keys."""
        k_t, v = columns_of_chunk(self.k_t, size, j), rows_of_chunk(self.v, size, j)
        return Source(k_t, v, chunks_of(size))

    def attend(self, largest_key):
        """All groups the fast way, then those again, the exact way, that ask for it."""
        turns = self.groups // this_core()[1]
        unsafe = nl.ndarray((turns, 1), dtype=nl.float32, buffer=nl.private_hbm)
        fast = Fast(
            self.q.expand_dim(0), None, largest_key, self.o.expand_dim(0), None, None,
            self.constants, self.scale,
        )  # fmt: skip
        tiles = tiles_of_group(self.loops, self.heads, self.loops.small, False)
        fast.negative_key(tiles[0])  # outside of the loop

        def one_group(i):
            fetch(unsafe.select(0, i).expand_dim(0), self.attend_group(fast, tiles, i), "g")

        nl.fori_loop(0, turns, one_group)
        again = turns_of_cores(unsafe)

        def redo(i):
            times = nisa.register_alloc()
            nisa.register_load(times, again.select(0, i))

            def exactly(_):
                self.exactly(i)

            nl.fori_loop(0, times, exactly)

        nl.fori_loop(0, turns, redo)

    def attend_group(self, fast, tiles, i):
        """Writes o and lse of a group; float32 [1, 1], 0 if all of its sums can be trusted."""
        loaded = load_group(of_group(self.q, self.size, i), self.per_part, "y")
        rows, parts, _ = loaded.shape
        edges = Edges(of_group(self.bounds, self.size, i))
        acc = sbuf((rows, parts, self.v.shape[1] + 1), nl.float32)
        nisa.memset(acc, 0.0, engine=nisa.engine.gpsimd)
        works = []
        for r in range(len(tiles)):
            work = Work(tiles[r], r * PARTS)
            for p in range(PARTS):
                work.rows.append(loaded[:, r * PARTS + p, :])
            for step in (fast.square, fast.turn, fast.bound, fast.spread):
                step(work)
            if not fast.wide:
                for k in range(ADDERS):
                    work.totals.append(sbuf((128, work.tile.columns), nl.float32))
                    engine = nisa.engine.vector if k == 0 else nisa.engine.gpsimd
                    nisa.memset(work.totals[k], 0.0, engine=engine)
            works.append(work)

        def visit(size, j, limits):
            fast.source = self.source(size, j)
            of_chunk = tiles_of_group(self.loops, self.heads, size, limits is None)
            for r in range(len(works)):
                works[r].tile = of_chunk[r]
                works[r].sums = []
                if limits is not None:
                    t0, count = of_chunk[r].t0, of_chunk[r].count
                    works[r].limits = limits[:, t0 : t0 + count, :]
            add_chunk(fast, works, acc)

        trips, bases = self.one_of(self.loops.trips, i), self.one_of(self.loops.bases, i)
        for_all_chunks(self.loops, trips, bases, self.k_t.shape[1], edges, visit)
        totals = sbuf((128, parts), nl.float32)
        nisa.memset(totals, 1.0)
        if fast.wide:
            nisa.tensor_copy(totals[0:rows, :], acc[:, :, self.v.shape[1]])
        else:
            for work in works:
                summed = psum((128, PARTS), nl.float32)
                for p in range(PARTS):
                    fast.keep_total(work, p, summed, totals)
        self.store(works, acc, totals, i)
        return largest_of(unsafe_rows(totals))

    def one_of(self, table, i):
        """Row of a table of groups."""
        return of_group(table, 1, i)[0]

    def store(self, works, acc, totals, i):
        """o = acc / its last column, and lse = U + log(total)."""
        rows, parts, width = acc.shape
        width -= 1
        inverse = sbuf((rows, parts, 1), nl.float32)  # of 0: such a row is done again
        nisa.reciprocal(inverse, acc[:, :, width : width + 1])
        result = sbuf((rows, parts, width), self.o.dtype)
        engines = (nisa.engine.vector, nisa.engine.scalar)
        for p in range(parts):
            nisa.tensor_scalar(
                result[:, p, :], acc[:, p, 0:width], nl.multiply, inverse[:, p, :],
                engine=engines[p % 2],
            )  # fmt: skip
        fetch(by_part(of_group(self.o, self.size, i), self.per_part), result, "a")
        logarithms = sbuf((128, parts, 1), nl.float32)
        nisa.tensor_scalar(logarithms[:, :, 0], totals, nl.maximum, SMALLEST_SUM)
        nisa.activation(logarithms, nl.log, logarithms)
        for work in works:
            columns = logarithms[:, work.column : work.column + PARTS, 0]
            nisa.tensor_scalar(columns, columns, nl.subtract, work.bias)
        fetch(by_part(of_group(self.lse, self.size, i), self.per_part), logarithms[0:rows], "a")

    def exactly(self, i):
        """A group the exact way, one tile after the other."""
        loaded = load_group(of_group(self.q, self.size, i), self.per_part, "y")
        edges = Edges(of_group(self.bounds, self.size, i))
        edges.load_rows(self.per_part, self.heads)
        o, lse = of_group(self.o, self.size, i), of_group(self.lse, self.size, i)
        trips, bases = self.one_of(self.loops.trips, i), self.one_of(self.loops.bases, i)
        for tile in tiles_of_group(self.loops, self.heads, self.loops.small, False):
            rows = []
            for p in range(PARTS):
                rows.append(loaded[:, tile.t0 // self.per_part + p, :])
            way = Exact(self, tile, transpose_rows(rows, tile), edges)
            for_every_chunk(self.loops, trips, bases, edges, way.add_statistics)
            way.shift()
            for_every_chunk(self.loops, trips, bases, edges, way.add_values)
            way.store(o.expand_dim(0), lse.expand_dim(0))


class Exact(nl.NKIObject):
    """A tile whose statistics, then sums, are merged from chunk to chunk."""

    def __init__(self, lane, tile, q_t, edges):
        self.lane = lane
        self.tile = tile
        self.q_t = q_t
        self.edges = edges
        self.maxima = []
        self.totals = []
        self.acc = []
        rows, width = tile.part(0)[1], lane.v.shape[1] + 1
        for _ in range(PARTS):
            for found, size, value in (
                (self.maxima, 1, NOTHING), (self.totals, 1, 0.0), (self.acc, width, 0.0),
            ):  # fmt: skip
                column = sbuf((rows, size), nl.float32)
                nisa.memset(column, value)
                found.append(column)

    def add_statistics(self, j):
        """Maximum and sum of a chunk's logits."""
        lane, first = self.lane, self.tile.t0 // self.lane.per_part
        limits = []
        by_row = self.edges.relative_rows()
        for p in range(PARTS):
            limits.append(by_row[:, first + p, :])
        source = lane.source(lane.loops.small, j)
        maxima, totals = exact.block_columns(self.q_t, limits, self.tile, source, lane.scale, 1)
        for p in range(PARTS):
            nisa.tensor_copy(maxima[p][:, 0:1], self.maxima[p], engine=nisa.engine.vector)
            nisa.tensor_copy(totals[p][:, 0:1], self.totals[p], engine=nisa.engine.vector)
            exact.merge_blocks(maxima[p], totals[p], self.maxima[p], self.totals[p], lane.scale)

    def shift(self):
        """The rows' statistics are complete."""
        lane = self.lane
        self.largest, self.total = exact.row_statistics(
            self.maxima, self.totals, self.tile, lane.scale
        )
        self.shift_row = shift_rows(self.largest, self.tile, lane.constants)

    def add_values(self, j):
        """P @ [v | 1] of a chunk."""
        lane, tile = self.lane, self.tile
        limits = self.edges.relative()[:, tile.t0 : tile.t0 + tile.count, :]
        sums = exact.weighted_sums(
            self.q_t, self.shift_row, limits, tile, lane.source(lane.loops.small, j),
            lane.constants, lane.scale,
        )  # fmt: skip
        for p in range(PARTS):
            nisa.tensor_tensor(self.acc[p], self.acc[p], sums[p], nl.add)

    def store(self, o, lse):
        for p in range(PARTS):
            exact.finish_part(
                o, lse, self.tile, p, self.acc[p], self.largest, self.total, self.lane.constants,
                self.lane.scale,
            )  # fmt: skip


def add_chunk(fast, works, acc):
    """Adds a chunk to the sums of all tiles, in one pipeline."""
    waiting = []
    for work in works:
        for job in fast.jobs(work):
            waiting.append(fast.weigh(work, job))
            if len(waiting) > AHEAD:
                add_job(fast, waiting.pop(0), acc)
    for job in waiting:
        add_job(fast, job, acc)


def add_job(fast, job, acc):
    """Adds a tile of keys, and a tile's sums to `acc` after the chunk's last."""
    fast.add_values(job)
    work, _, _, _, last = job
    if last:
        for p in range(PARTS):
            column = acc[:, work.column + p, :]
            nisa.tensor_tensor(column, column, work.sums[p], nl.add)


def turns_of_cores(unsafe):
    """int32 [turns, 1] in HBM: 1 where a number of float32 [turns, 1] is above 0, on any core."""
    turns = unsafe.shape[0]
    found = nl.ndarray((turns, 1), dtype=nl.int32, buffer=nl.private_hbm)
    core, cores = this_core()
    for first, count in spans(turns, AT_ONCE):
        own = sbuf((1, count), nl.float32)
        nisa.dma_copy(own, unsafe[first : first + count, :].permute((1, 0)))
        if cores == 2:
            other = sbuf((1, count), nl.float32)
            nisa.sendrecv(
                src=own, dst=other, send_to_rank=1 - core, recv_from_rank=1 - core, pipe_id=0
            )
            nisa.tensor_tensor(own, own, other, nl.maximum)
        flags = sbuf((1, count), nl.int32)
        nisa.tensor_scalar(flags, own, nl.minimum, 1.0)
        nisa.dma_copy(found[first : first + count, :].permute((1, 0)), flags)
    return found
