"""The running softmax of the rows of a query tile over any number of keys. See `forward`."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import columns, psum, sbuf
from nki_kernels.common.queues import fetch
from nki_kernels.common.spans import spans
from nki_kernels.selected_attention import tile as parts
from nki_kernels.selected_attention.gather import BANK

FLOOR = -1.0e30
"""Where a running maximum starts: below every logit, above every hidden one."""


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
