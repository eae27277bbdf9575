"""Gradients of the rows of a query tile, a trip of gathered blocks at a time. See `backward`."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import columns, psum, sbuf
from nki_kernels.common.queues import fetch
from nki_kernels.common.spans import spans
from nki_kernels.selected_attention import tile as parts
from nki_kernels.selected_attention.gather import BANK

LAG = 2
"""p and ds are made so many jobs ahead of their part of dq, to keep PE busy."""


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
