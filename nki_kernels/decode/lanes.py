"""Which partition holds which row: the rows of several kv heads side by side on 128 partitions."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import columns, psum, sbuf
from nki_kernels.common.spans import spans

HIDDEN = -3.0e38
"""What a hidden logit is replaced by; `range_select` has a number of its own, a little below."""

FLOOR = -1.0e30
"""Below every logit, above every hidden one: what a row that sees nothing has as its maximum."""


class Lanes(nl.NKIObject):
    """`heads` kv heads on `pitch` partitions each: rows query * G + head, filled up with zeros."""

    def __init__(self, heads, pitch):
        self.heads, self.pitch = heads, pitch
        self.rows = heads * pitch

    def of(self, head):
        """Partitions of a kv head."""
        return slice(head * self.pitch, (head + 1) * self.pitch)

    def matmul(self, out, stationary, moving, head, accumulate):
        """out[partitions of the head] (+)= stationary.T @ moving, on the head's columns of PE."""
        if self.pitch == nl.tile_size.pmax:
            nisa.nc_matmul(out, stationary, moving, accumulate=accumulate)
        else:
            nisa.nc_matmul(
                out[self.of(head), :],
                stationary,
                moving,
                accumulate=accumulate,
                tile_position=(0, head * self.pitch),
                tile_size=(nl.tile_size.pmax, self.pitch),
            )


def key_columns(tiles, lanes):
    """Key tiles [keys, heads, DK] turned: [D, heads, all keys], one per 128 of DK."""
    dtype, dk = tiles[0].dtype, tiles[0].shape[2]
    total = 0
    for tile in tiles:
        total += tile.shape[0]
    found = []
    for first, length in spans(dk, nl.tile_size.pmax):
        turned = sbuf((length, lanes.heads, total), dtype)
        start = 0
        for tile in tiles:
            keys = tile.shape[0]
            bank = psum((length, lanes.heads, keys), dtype)
            for h in range(lanes.heads):
                part = tile[:, h, first : first + length]
                nisa.nc_transpose(bank[:, h, :], part, engine=nisa.engine.tensor)
            nisa.tensor_copy(turned[:, :, start : start + keys], bank)
            start += keys
        found.append(turned)
    return found


class Scores(nl.NKIObject):
    """Logits of all rows and keys of a branch; after `normalise` their exponentials.

    Attributes:
        values: [rows, keys] float32, where hidden at most `HIDDEN`.
        top: [rows, groups] float32, maxima of groups of keys.
        inverse: [rows, 1] float32, 1 / sum of the exponentials; of no use where nothing is seen.
    """

    def __init__(self, lanes, groups, keys):
        self.values = sbuf((lanes.rows, keys), nl.float32)
        self.top = sbuf((lanes.rows, groups), nl.float32)
        self.inverse = sbuf((lanes.rows, 1), nl.float32)

    def normalise(self, group_spans, scale):
        """values = exp(scale (values - maximum))."""
        rows, groups = self.top.shape
        highest, shift, total = columns(3, rows)
        sums = sbuf((rows, groups), nl.float32)
        nisa.tensor_reduce(highest, nl.maximum, self.top, axis=1)
        nisa.tensor_scalar(shift, highest, nl.maximum, FLOOR, op1=nl.multiply, operand1=-scale)
        for i in range(groups):
            first, length = group_spans[i]
            part = self.values[:, first : first + length]
            nisa.activation(
                part, nl.exp, part, bias=shift, scale=scale, reduce_op=nl.add,
                reduce_res=sums[:, i : i + 1], reduce_cmd=nisa.reduce_cmd.reset_reduce,
            )  # fmt: skip
        nisa.tensor_reduce(total, nl.add, sums, axis=1)
        # The largest exponential is 1: only an empty sum is smaller.
        nisa.tensor_scalar(total, total, nl.maximum, 0.5)
        nisa.reciprocal(self.inverse, total)


def weigh(scores, branch, lanes, dtype):
    """Sum of exponentials times values, [rows, DV] in PSUM.

    A value that no row gives weight is replaced by zero first: a cache may hold NaN where no token
    is yet.
    """
    out = psum((lanes.rows, branch.v.shape[3]))
    for first, length in branch.tiles():
        weights = sbuf((lanes.rows, length), dtype)
        nisa.tensor_copy(
            weights, scores.values[:, first : first + length], engine=nisa.engine.scalar
        )
        bank = psum((length, lanes.rows), dtype)
        nisa.nc_transpose(bank, weights, engine=nisa.engine.tensor)
        turned = sbuf((length, lanes.heads, lanes.pitch), dtype)
        nisa.tensor_copy(turned.reshape((length, lanes.rows)), bank)
        values = branch.values(first, length)
        largest = sbuf((length, lanes.heads), nl.float32)
        used = sbuf((length, lanes.heads), nl.uint8)
        clean = sbuf(values.shape, dtype)
        nisa.tensor_reduce(largest, nl.maximum, turned, axis=2)
        nisa.tensor_scalar(used, largest, nl.greater, 0.0)
        nisa.select_reduce(clean, used.expand_dim(2).broadcast(2, values.shape[2]), values, 0.0)
        for h in range(lanes.heads):
            lanes.matmul(out, turned[:, h, :], clean[:, h, :], h, accumulate=first > 0)
    return out
