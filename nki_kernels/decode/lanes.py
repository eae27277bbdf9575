"""Which partition holds which row: the rows of several kv heads side by side on 128 partitions.

Keys are turned by DMA, see `turned`, or by PE here; then a width of 32 or 64 that is left of Dk
after 128 lies on the partitions twice, for an even and an odd token, so that half as many columns
leave PSUM.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.spans import spans

BANK = 2048
"""Bytes of a partition of a PSUM bank."""

LOGITS = 512
"""float32 logits of a bank."""

BY_SCALAR = (True, False)
"""Which copies out of PSUM ScalarE takes in turn; it has the exponentials to do meanwhile."""


class Lanes(nl.NKIObject):
    """`heads` kv heads on `pitch` partitions each: rows query * G + head, filled up with zeros."""

    def __init__(self, heads, pitch):
        self.heads, self.pitch = heads, pitch
        self.rows = heads * pitch
        self.copies = 0

    def of(self, head):
        """Partitions of a kv head."""
        return slice(head * self.pitch, (head + 1) * self.pitch)

    def matmul(self, out, stationary, moving, head, accumulate, row=0, height=128):
        """out[partitions of the head] (+)= stationary.T @ moving, on the head's columns of PE and
        its rows `row` .. `row + height`."""
        if self.pitch == nl.tile_size.pmax and height == nl.tile_size.pmax:
            nisa.nc_matmul(out, stationary, moving, accumulate=accumulate)
        else:
            nisa.nc_matmul(
                out,
                stationary,
                moving,
                accumulate=accumulate,
                tile_position=(row, head * self.pitch),
                tile_size=(height, self.pitch),
            )

    def copy(self, target, bank):
        """Copies a bank of PSUM, on one of two engines."""
        by_scalar = BY_SCALAR[self.copies % len(BY_SCALAR)]
        self.copies += 1
        engine = nisa.engine.scalar if by_scalar else nisa.engine.vector
        nisa.tensor_copy(target, bank, engine=engine)


HALVES = (32, 64)
"""Widths of parts of D that are turned two tokens at a time."""


def load_columns(q_t):
    """q^T [DK, rows] in parts of at most 128 of DK; a part of one of `HALVES` comes twice."""
    dk, rows = q_t.shape
    found = []
    for first, width in spans(dk, nl.tile_size.pmax):
        part = sbuf((2 * width if width in HALVES else width, rows), q_t.dtype)
        for row in range(0, part.shape[0], width):
            nisa.dma_copy(part[row : row + width, :], q_t[first : first + width, :])
        found.append(part)
    return found


def turn_keys(views, lanes):
    """Keys turned, for each part of DK [D, heads, columns]; of folded parts half as many columns.

    views: of each head [rows, t, DK].
    """
    rows, tokens, dk = views[0].shape
    item = 4 if views[0].dtype == nl.float32 else 2
    found = []
    for first, width in spans(dk, nl.tile_size.pmax):
        step = 2 if width in HALVES and tokens % 2 == 0 else 1
        height = step * width
        turned = sbuf((height, lanes.heads, tokens // step * rows), views[0].dtype)
        most = BANK // (item * rows)
        for h in range(lanes.heads):
            for start, count in spans(tokens // step, most):
                bank = psum((height, count, rows), views[0].dtype)
                for i in range(count):
                    j = (start + i) * step
                    part = views[h][:, j : j + step, first : first + width]
                    nisa.nc_transpose(bank[:, i, :], part, engine=nisa.engine.tensor)
                into = turned[:, h, start * rows : (start + count) * rows]
                lanes.copy(into, bank.reshape((height, count * rows)))
        found.append(turned)
    return found


def groups_of(rows, tokens):
    """(first token, tokens) of groups whose logits fill a bank of PSUM."""
    most = min(tokens, LOGITS // rows)
    return spans(tokens, most - most % 2 if most > 1 else 1)


def multiply(lanes, columns, turned, rows, first, count, tokens, by_dma):
    """Logits [rows of lanes, count, rows] in PSUM of `count` tokens of each row from `first` on.

    turned: from `turn_keys`, or `turned.Chunks` if DMA turned them.
    """
    if by_dma:
        return turned.multiply(lanes, columns, rows, first, count)
    logits = psum((lanes.rows, count, rows))
    for h in range(lanes.heads):
        part = logits[lanes.of(h)]
        for c in range(len(turned)):
            keys = turned[c]
            own = columns[c][:, lanes.of(h)]
            if keys.shape[2] == tokens * rows:
                moving = keys[:, h, first * rows : (first + count) * rows]
                lanes.matmul(part, own[0 : keys.shape[0]], moving, h, c > 0)
                continue
            half = keys.shape[0] // 2
            for odd in range(min(2, count)):
                row = odd * half
                moving = keys[row : row + half, h, first // 2 * rows : (first + count) // 2 * rows]
                lanes.matmul(
                    part[:, odd:count:2, :], own[row : row + half], moving, h, c > 0, row, half
                )
    return logits


FLOOR = -1.0e30
"""Below every logit, above every hidden one: what a row that sees nothing has as its maximum."""


class Scores(nl.NKIObject):
    """Logits of all rows and keys of a branch, by tiles, then their exponentials.

    Attributes:
        values: of each tile [rows, columns] float32, where hidden about -3e38; columns as of
            `Tile`.
        weights: of each tile exponentials in the inputs' dtype.
        shift: [rows, 1] float32, -scale * the largest logit.
        inverse: [rows, 1] float32, 1 / sum of the exponentials; of no use where nothing is seen.
    """

    def __init__(self, lanes, parts):
        self.lanes, self.used, self.summed = lanes, 0, 0
        self.values, self.weights = [], []
        self.top = sbuf((lanes.rows, parts), nl.float32)
        self.sums = sbuf((lanes.rows, parts), nl.float32)

    def next_values(self, columns):
        """Where the logits of the next tile go."""
        self.values.append(sbuf((self.lanes.rows, columns), nl.float32))
        return self.values[-1]

    def next_top(self):
        """Where the maximum of a further part goes."""
        self.used += 1
        return self.top[:, self.used - 1 : self.used]

    def shift_by_maximum(self, scale):
        """The maximum of all parts is known."""
        highest = sbuf((self.lanes.rows, 1), nl.float32)
        self.shift = sbuf((self.lanes.rows, 1), nl.float32)
        nisa.tensor_reduce(highest, nl.maximum, self.top[:, 0 : self.used], axis=1)
        nisa.tensor_scalar(self.shift, highest, nl.maximum, FLOOR, op1=nl.multiply, operand1=-scale)

    def exponentiate(self, target, values, scale, add_up):
        """target = exp(scale * values + shift); counts among the sums of `invert` if asked to."""
        if not add_up:
            nisa.activation(target, nl.exp, values, bias=self.shift, scale=scale)
            return
        self.summed += 1
        nisa.activation(
            target, nl.exp, values, bias=self.shift, scale=scale, reduce_op=nl.add,
            reduce_res=self.sums[:, self.summed - 1 : self.summed],
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )  # fmt: skip

    def weigh(self, tile, dtype, scale, add_up):
        """Makes the weights of a tile, by its number; its logits are of no use any more."""
        values = self.values[tile]
        weights = sbuf(values.shape, dtype)
        self.exponentiate(weights, values, scale, add_up)
        self.weights.append(weights)
        self.values[tile] = None

    def begin_again(self, tile):
        """Forgets a tile, by its number, whose logits are kept elsewhere."""
        self.values[tile] = None
        self.used, self.summed = 0, 0

    def merge(self, shifts, sums):
        """`shift` and `inverse` of tiles whose own are `shifts` and `sums` [rows, tiles]."""
        self.shift, total = sbuf((self.lanes.rows, 1), nl.float32), sbuf(shifts.shape, nl.float32)
        nisa.tensor_reduce(self.shift, nl.minimum, shifts, axis=1)
        # exp(shift - own shift), at most 1.
        nisa.activation(total, nl.exp, shifts, bias=self.shift, scale=-1.0)
        nisa.tensor_tensor(self.sums[:, 0 : shifts.shape[1]], total, sums, nl.multiply)
        self.summed = shifts.shape[1]
        self.invert()

    def invert(self):
        """1 / the sum of what was added up."""
        total = sbuf((self.lanes.rows, 1), nl.float32)
        self.inverse = sbuf((self.lanes.rows, 1), nl.float32)
        nisa.tensor_reduce(total, nl.add, self.sums[:, 0 : self.summed], axis=1)
        # The largest exponential is 1: only an empty sum is smaller.
        nisa.tensor_scalar(total, total, nl.maximum, 0.5)
        nisa.reciprocal(self.inverse, total)


class Sum(nl.NKIObject):
    """Weights times values, [rows, DV] in PSUM, over tiles.

    PE turns the weights of a tile before it multiplies those of the last, so that it need not wait
    for their copy.
    """

    def __init__(self, lanes, width):
        self.lanes, self.out = lanes, psum((lanes.rows, width))
        self.waiting, self.open = [], False

    def add(self, weights, tile, views):
        """weights: [rows, columns] of the tile. views: of each head [rows of the tile, t, DV]; what
        no row gives weight must be finite."""
        lanes, dtype = self.lanes, weights.dtype
        item = 4 if dtype == nl.float32 else 2
        for first, count in spans(tile.tokens, BANK // (item * lanes.rows)):
            bank = psum((tile.rows, count, lanes.rows), dtype)
            for i in range(count):
                start = (first + i) * tile.rows
                part = weights[:, start : start + tile.rows]
                nisa.nc_transpose(bank[:, i, :], part, engine=nisa.engine.tensor)
            turned = sbuf((tile.rows, count, lanes.rows), dtype)
            nisa.tensor_copy(turned, bank, engine=nisa.engine.scalar)
            self.multiply()
            self.waiting.append((turned, views, first, count))

    def finish(self):
        """The sum in SBUF, so that PSUM is free before VectorE has time for it."""
        self.multiply()
        total = sbuf(self.out.shape, nl.float32)
        nisa.tensor_copy(total, self.out, engine=nisa.engine.scalar)
        return total

    def multiply(self):
        """Adds what waits."""
        for turned, views, first, count in self.waiting:
            for i in range(count):
                for h in range(self.lanes.heads):
                    own = self.lanes.of(h)
                    self.lanes.matmul(
                        self.out[own, :], turned[:, i, own], views[h][:, first + i, :], h,
                        self.open,
                    )  # fmt: skip
                self.open = True
        self.waiting = []


def clear_foreign(values, kept):
    """Values [rows, t, heads, DV] become zero where no token may be used.

    A cache may hold NaN where no token is yet, and 0 * NaN is NaN. Bits of any kind and 0 are 0.

    kept: [rows, t], see `Tile`.
    """
    bits = nl.int32 if values.dtype == nl.float32 else nl.int16
    for j in range(values.shape[1]):
        own = values[:, j].view(bits)
        nisa.tensor_scalar(own, own, nl.bitwise_and, kept[:, j : j + 1])


def clear_unseen(views, kept):
    """The same of each head's [rows, t, DV], by kept [rows, heads, t]."""
    for h in range(len(views)):
        values = views[h].view(nl.int32 if views[h].dtype == nl.float32 else nl.int16)
        own = kept[:, h, :].expand_dim(2).broadcast(2, values.shape[2])
        nisa.tensor_tensor(values, values, own, nl.bitwise_and)
