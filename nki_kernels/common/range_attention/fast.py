"""Forward of tiles of rows whose logits lie within 41 of an upper bound; others are told apart.

One shift for a tile, U = scale * max |q| * max |k|, is no less than any of its logits, so nothing
overflows; it is the exponential's bias and costs no matmul. A row's sum of exp(logit - U) says
afterwards whether it was too far below.

    two tiles ahead:  load q                                      DMA
    one tile ahead:   q^T; U from the rows' squares               PE, ScalarE, VectorE, GpSimd
    for each 128 keys, 512 rows:
        S^T = k q^T                                               PE
        P^T = exp(scale * S^T - U), 0 where not visible           ScalarE, float32
        total += P^T                                              VectorE twice, GpSimd once in 3
        o += P v, sum += P 1 (two tiles of keys behind)           PE
    o = o / sum;  lse = U + log(total summed over keys)

PE takes P^T as the upper halves of its float32 numbers, bfloat16 by truncation: o is divided by the
sum of the same, and nothing is converted. lse needs the float32 sum; its additions take turns in
three tensors, since one waits for the last to the same. What is left of Dk after 128, if at most
64, lies on both halves of the partitions, so that two tiles of keys share PE.
Modelled per 128 keys and 512 rows of one core, bfloat16, 32K keys (`nsa bench --target trn2`):
0.57 us at 192/128, 0.50 us at 128/128, PE and ScalarE both 98 % busy, VectorE 80 %, DMA 60 %.
Weighed: without the folded rest of Dk 0.67 us; one tensor of sums 0.71 us, bound by VectorE; a
shift per row as more contraction rows 0.22 us more on PE; summing bfloat16 P by the column of ones
leaves lse wrong by 1e-3; a second exponential for it makes ScalarE the bound, 0.95 us.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.range_attention.geometry import cut
from nki_kernels.common.range_attention.operands import (
    SMALLEST_SUM,
    hide,
    load_rows,
    query_bounds,
    store_rows,
    transpose_rows,
    visible,
)

KEPT_MASKS = 512  # [128, queries] of 2 bytes each
ADDERS = 3  # sums of P^T of a tile
GPSIMD_TURN = 2
AHEAD = 2  # tiles of keys between their scores and P @ V


class Work(nl.NKIObject):
    """A tile on its way: its rows, q^T and -U, then its sums, in the order they come to be.

    `column` is its first column among the totals of its group.
    """

    def __init__(self, tile, column):
        self.tile = tile
        self.column = column
        self.rows = []
        self.squares = None
        self.q_t = []
        self.bias = None
        self.limits = None
        self.sums = []
        self.totals = []
        self.added = 0


def unsafe_rows(totals):
    """float32 as `totals`, 1 where a row's sum is too small to be trusted, else 0."""
    unsafe = sbuf(totals.shape, nl.float32)
    # NaN counts as unsafe: `less` would let it pass.
    nisa.tensor_scalar(unsafe, totals, nl.greater_equal, SMALLEST_SUM)
    nisa.tensor_scalar(unsafe, unsafe, nl.multiply, -1.0, op1=nl.add, operand1=1.0)
    return unsafe


class Fast(nl.NKIObject):
    """The fast way: what its tiles share."""

    def __init__(self, q, bounds, largest_key, o, lse, source, constants, scale):
        self.q = q
        self.bounds = bounds
        self.largest_key = largest_key
        self.o = o
        self.lse = lse
        self.source = source
        self.constants = constants
        self.scale = scale
        self.wide = q.dtype == nl.float32  # P @ 1 is the float32 sum itself
        self.keys = {}
        self.masks = {}

    def attend(self, tiles):
        """Writes o and lse of some tiles.

        One pipeline runs through all of them: scores are AHEAD tiles of keys before P @ V, also
        from one tile of rows to the next, whose preparation comes a step per tile of keys.

        Returns:
            float32 [128, columns], 1 where a row's sum is too small to be trusted, else 0.
        """
        works, columns = [], 0
        for tile in tiles:
            works.append(Work(tile, columns))
            columns += tile.parts
        totals = sbuf((128, columns), nl.float32)
        nisa.memset(totals, 1.0)
        for work in works[0:2]:
            self.load(work)
        for step in (self.square, self.turn, self.bound, self.spread):
            step(works[0])
        steps, waiting = [], []
        for i in range(len(works)):
            for step, work in steps:
                step(work)
            steps = []
            if i + 1 < len(works):
                for step in (self.square, self.turn, self.bound, self.spread):
                    steps.append((step, works[i + 1]))
            if i + 2 < len(works):
                self.load(works[i + 2])
            for job in self.jobs(works[i]):
                waiting.append(self.weigh(works[i], job))
                if len(steps) > 0:
                    step, work = steps.pop(0)
                    step(work)
                if len(waiting) > AHEAD:
                    self.add_values(waiting[0])
                    self.finish_last(waiting.pop(0), totals)
        for job in waiting:
            self.add_values(job)
            self.finish_last(job, totals)
        self.store_lse(works, totals)
        return unsafe_rows(totals)

    def load(self, work):
        """Rows of each part, and the bounds of the queries."""
        for p in range(work.tile.parts):
            work.rows.append(load_rows(self.q, work.tile, p))
        work.limits = query_bounds(self.bounds, work.tile)

    def square(self, work):
        """|q|^2 of every row, float32 [rows of a part, parts]."""
        tile = work.tile
        most = tile.part(0)[1]
        work.squares = sbuf((most, tile.parts), nl.float32)
        if tile.part(tile.parts - 1)[1] < most:
            nisa.memset(work.squares, 0.0)
        for p in range(tile.parts):
            rows = work.rows[p]
            ignored = sbuf(rows.shape, nl.bfloat16)
            column = work.squares[0 : rows.shape[0], p : p + 1]
            nisa.activation_reduce(ignored, nl.square, rows, nl.add, column)

    def turn(self, work):
        """q^T, [D chunk, columns]."""
        work.q_t = transpose_rows(work.rows, work.tile, True)

    def bound(self, work):
        """The largest square of the tile, float32 [1, 1]."""
        most = work.squares.shape[0]
        of_row = sbuf((most, 1), nl.float32)
        nisa.tensor_reduce(of_row, nl.maximum, work.squares, axis=1)
        turned = psum((1, most), nl.float32)
        nisa.nc_transpose(turned, of_row, engine=nisa.engine.tensor)
        work.squares = sbuf((1, 1), nl.float32)
        nisa.tensor_reduce(work.squares, nl.maximum, turned, axis=1)

    def spread(self, work):
        """-U with U = scale * max |q| * max |k| of the tile on every partition, [128, 1]."""
        spread = psum((128, 1), nl.float32)
        nisa.nc_matmul(spread, self.constants.one_row, work.squares, accumulate=False)
        square = sbuf((128, 1), nl.float32)
        nisa.tensor_scalar(square, spread, nl.add, 1e-30)
        inverse = sbuf((128, 1), nl.float32)
        nisa.tensor_scalar(inverse, square, nl.rsqrt, 0.0, engine=nisa.engine.gpsimd)
        work.bias = sbuf((128, 1), nl.float32)
        key = self.negative_key(work.tile)
        nisa.scalar_tensor_tensor(work.bias, square, nl.multiply, inverse, nl.multiply, key)

    def negative_key(self, tile):
        """-scale * max |k| of the tile's kv head on every partition, float32 [128, 1]."""
        name = str(tile.batch) + "." + str(tile.kv_head)
        if name not in self.keys:
            key = sbuf((128, 1), nl.float32)
            norm = self.largest_key[tile.batch : tile.batch + 1, tile.kv_head : tile.kv_head + 1]
            nisa.dma_copy(key, norm.broadcast(0, 128))
            nisa.tensor_scalar(key, key, nl.multiply, -self.scale)
            self.keys = {name: key}
        return self.keys[name]

    def visible(self, tile, limits, position, size):
        """Which keys each query sees; where ranges are exact it depends on where keys and queries
        lie to each other, so that many tiles share it."""
        if not tile.reach[3]:
            return visible(limits, tile, self.constants, position, size)
        name = str(tile.distance(position)) + "." + str(tile.count) + "." + str(size)
        if name not in self.masks:
            seen = visible(limits, tile, self.constants, position, size)
            if len(self.masks) >= KEPT_MASKS:
                return seen
            self.masks[name] = seen
        return self.masks[name]

    def jobs(self, work):
        """(chunk's first key, first key in it, keys, last) of the tiles of keys of a tile."""
        tile = work.tile
        self.source.chunks.select(tile.batch, tile.kv_head)
        found = []
        for first, skipped, count in self.source.chunks.of(tile.first, tile.last - tile.first):
            for k0, size in cut(count, 128):
                start = skipped + k0
                found.append((first, start, size, first + start + size == tile.last))
        return found

    def weigh(self, work, job):
        """P^T of a tile of keys, float32 [keys, columns], with what P @ V needs."""
        first, start, size, last = job
        tile, position = work.tile, first + start
        k_t, v = self.source.folded_keys(first), self.source.values(first)
        scores = psum((size, tile.columns), nl.float32)
        for c in range(len(work.q_t)):
            self.multiply(scores, k_t[c], work.q_t[c], start, c)
        weights = sbuf(scores.shape, nl.float32)
        nisa.activation(weights, nl.exp, scores, bias=work.bias[0:size, :], scale=self.scale)
        if not tile.sees_all(position, position + size):
            hide(weights, self.visible(tile, work.limits, position, size), tile)
        return work, weights, v[0:size, start // 128, :], position == tile.first, last

    def multiply(self, scores, k_t, q_t, start, c):
        """Adds chunk c of the contraction to S^T of the tile of keys at `start` of its chunk."""
        size = scores.shape[0]
        if len(k_t.shape) == 2:
            nisa.nc_matmul(scores, k_t[:, start : start + size], q_t, accumulate=c > 0)
            return
        p0, width = start // 128 % 2 * 64, self.q.shape[3] - 128
        nisa.nc_matmul(
            scores,
            k_t[p0 : p0 + width, start // 256, 0:size],
            q_t[p0 : p0 + width, :],
            accumulate=True,
            tile_position=(p0, 0),
            tile_size=(64, 128),
        )

    def add_values(self, job):
        """Adds one tile of keys to P @ [v | 1] of every part and to the sums of P^T."""
        work, weights, v, opening, _ = job
        tile = work.tile
        if opening:
            for p in range(tile.parts):
                work.sums.append(psum((tile.part(p)[1], v.shape[1]), nl.float32))
        for p in range(tile.parts):
            c0, rows = tile.part(p)
            if self.wide:
                part = weights[:, c0 : c0 + rows]
            else:  # the upper halves of float32 are bfloat16
                part = weights.view(nl.bfloat16)[:, 2 * c0 + 1 : 2 * (c0 + rows) : 2]
            nisa.nc_matmul(work.sums[p], part, v, accumulate=not opening)
        if not self.wide:
            self.add_weights(work, weights)

    def add_weights(self, work, weights):
        """Adds P^T to one of the tile's float32 sums, in turn, since an addition waits for the
        last one to the same sum; the first ones are the first P^T themselves. GpSimd takes one in
        ADDERS, at half VectorE's speed."""
        turn = work.added % ADDERS
        work.added += 1
        if len(work.totals) < ADDERS:
            work.totals.append(weights)
            return
        summed = work.totals[turn][0 : weights.shape[0], :]
        engine = nisa.engine.gpsimd if turn == GPSIMD_TURN else nisa.engine.vector
        nisa.tensor_tensor(summed, summed, weights, nl.add, engine=engine)

    def finish_last(self, job, totals):
        """Finishes a tile whose last keys have been added."""
        if job[4]:
            self.finish(job[0], totals)

    def finish(self, work, totals):
        """Writes o, and keeps the rows' float32 sums."""
        tile, width = work.tile, self.o.shape[3]
        summed = psum((128, tile.parts), nl.float32)
        for p in range(tile.parts):
            rows = tile.part(p)[1]
            of_part = work.sums[p]
            if self.wide:
                kept = totals[0:rows, work.column + p : work.column + p + 1]
                nisa.tensor_copy(kept, of_part[:, width : width + 1], engine=nisa.engine.vector)
            else:
                self.keep_total(work, p, summed, totals)
            inverse = sbuf((rows, 1), nl.float32)  # of 0: such a row is done again
            nisa.reciprocal(inverse, of_part[:, width : width + 1])
            result = sbuf((rows, width), self.o.dtype)
            nisa.activation(result, nl.copy, of_part[:, 0:width], scale=inverse)
            store_rows(self.o, tile, p, result)

    def keep_total(self, work, p, summed, totals):
        """The float32 sums over all keys of part p's rows, from those by partition."""
        c0, rows = work.tile.part(p)
        column = summed[0:rows, p : p + 1]
        for i in range(len(work.totals)):
            over_rows = work.totals[i][:, c0 : c0 + rows]
            over_keys = self.constants.one_column[0 : over_rows.shape[0], :]
            nisa.nc_matmul(column, over_rows, over_keys, accumulate=i > 0)
        kept = totals[0:rows, work.column + p : work.column + p + 1]
        nisa.tensor_copy(kept, column, engine=nisa.engine.vector)

    def store_lse(self, works, totals):
        """lse = U + log(total) of all tiles: one logarithm, since its table displaces exp's."""
        logarithms = sbuf(totals.shape, nl.float32)
        nisa.tensor_scalar(logarithms, totals, nl.maximum, SMALLEST_SUM)
        nisa.activation(logarithms, nl.log, logarithms)
        for work in works:
            columns = logarithms[:, work.column : work.column + work.tile.parts]
            nisa.tensor_scalar(columns, columns, nl.subtract, work.bias)
            for p in range(work.tile.parts):
                rows = work.tile.part(p)[1]
                store_rows(self.lse, work.tile, p, columns[0:rows, p : p + 1])
