"""Attention of one kv head with (token of a row, query head) on the partitions.

A row of t tokens is cut in `groups` of `each`: lane g * pitch + h holds the logits of head h with
the tokens g * each .. g * each + each - 1 of every row, so 16 heads work on 64 of 128 partitions
and a step of VectorE or ScalarE is a quarter as long as with heads alone on them. What a head's
lanes have found is brought together by a matmul with `same`, 1 where two lanes have one head.

Columns are row * each + token: in the order of positions, so that one pair of bounds per lane says
what a query sees. The largest logit is exact and over all lanes, therefore weights of all tokens
may be turned by PE and multiplied with values into one sum.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.decode.lanes import FLOOR

HIDDEN = -3.0e38
"""What a hidden logit is replaced by."""


class Lanes(nl.NKIObject):
    """How rows of `tokens` lie on the partitions.

    Args:
        heads: G. pitch: lanes of a group, a width of PE's columns, 32, 64 or 128, at least G.
        same: [128, 128] float32, 1 where two lanes have one head. apart: [128, 128 / pitch], -scale
            where a lane is of a group, else 0.
    """

    def __init__(self, tokens, heads, pitch, same, apart):
        self.tokens, self.heads, self.pitch = tokens, heads, pitch
        self.groups = groups_of(tokens, pitch)
        self.each = tokens // self.groups
        self.count = self.groups * pitch
        self.same = same[0 : self.count, 0 : self.count]
        self.apart = apart[0 : self.count, 0 : self.groups]


def groups_of(tokens, pitch):
    """In how many groups a row is cut."""
    found = 1
    for groups in range(1, 128 // pitch + 1):
        if tokens % groups == 0:
            found = groups
    return found


class Spread(nl.NKIObject):
    """Logits of a branch, then weights.

    Attributes:
        values: [lanes, tiles, each + rows * each] float32: hidden ones, then a tile's logits.
        weights: their exponentials, less the largest, of `dtype`.
        inverse: [lanes, 1] float32, 1 / the sum of the head's weights.
    """

    def __init__(self, lanes, rows, tiles, dtype):
        self.lanes, self.rows, self.tiles, self.dtype = lanes, rows, tiles, dtype
        self.skip = lanes.each
        self.columns = rows * lanes.each
        shape = (lanes.count, tiles, self.skip + self.columns)
        self.values, self.weights = sbuf(shape, nl.float32), sbuf(shape, dtype)
        self.tops = sbuf((lanes.count, tiles + 1), nl.float32)
        nisa.memset(self.values[:, :, 0 : self.skip], HIDDEN)
        nisa.memset(self.tops[:, tiles:], FLOOR)
        self.open = False

    def score(self, keys, queries):
        """Logits of a tile of turned keys, in PSUM. queries: see `turned`."""
        lanes = self.lanes
        bank = psum((lanes.count, self.rows, lanes.each))
        for j in range(lanes.tokens):
            g, s = j // lanes.each, j % lanes.each
            own = slice(g * lanes.pitch, (g + 1) * lanes.pitch)
            first = True
            for chunks, place, start, height, query in keys.pieces[j]:
                stationary = queries[start : start + height, query, :]
                moving = chunks[start : start + height, place, :]
                if lanes.pitch == 128 and start == 0:
                    nisa.nc_matmul(bank[own, :, s], stationary, moving, accumulate=not first)
                else:
                    size = 32 if height <= 32 else 64 if height <= 64 else 128
                    nisa.nc_matmul(
                        bank[own, :, s], stationary, moving, accumulate=not first,
                        tile_position=(start, g * lanes.pitch), tile_size=(size, lanes.pitch),
                    )  # fmt: skip
                first = False
        return bank

    def hide(self, tile, bank, low, high):
        """Takes the logits of a tile out of PSUM, those of columns low .. high - 1 (float32
        [lanes, 1]); finds the largest."""
        nisa.range_select(
            self.values[:, tile, self.skip :], bank.reshape((self.lanes.count, self.columns)),
            nl.greater_equal, nl.less, low, high, reduce_res=self.tops[:, tile : tile + 1],
        )  # fmt: skip

    def hide_by(self, tile, bank, shown):
        """The same by [lanes, columns] uint8, not 0 where a token is seen."""
        nisa.select_reduce(
            self.values[:, tile, self.skip :], shown,
            bank.reshape((self.lanes.count, self.columns)), HIDDEN,
            reduce_res=self.tops[:, tile : tile + 1], reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )  # fmt: skip

    def find_top(self):
        """-scale * the largest logit of each lane's head."""
        lanes, tops = self.lanes, self.tops.shape[1]
        spread = sbuf((lanes.count, tops, lanes.groups), nl.float32)
        nisa.tensor_tensor(
            spread, self.tops.expand_dim(2).broadcast(2, lanes.groups),
            lanes.apart.expand_dim(1).broadcast(1, tops), nl.multiply,
        )  # fmt: skip
        of_head = psum((lanes.count, tops * lanes.groups))
        nisa.nc_matmul(of_head, lanes.same, spread, accumulate=False)
        self.shift = sbuf((lanes.count, 1), nl.float32)
        nisa.tensor_reduce(self.shift, nl.minimum, of_head, axis=1)

    def weigh(self, scale):
        """Makes the weights, and adds them up."""
        self.sums = sbuf((self.lanes.count, 1), nl.float32)
        nisa.activation(
            self.weights, nl.exp, self.values, bias=self.shift, scale=scale, reduce_op=nl.add,
            reduce_res=self.sums, reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )  # fmt: skip

    def add_up(self):
        """1 / the sum of the weights of each lane's head."""
        lanes = self.lanes
        total, self.inverse = psum((lanes.count, 1)), sbuf((lanes.count, 1), nl.float32)
        nisa.nc_matmul(total, lanes.same, self.sums, accumulate=False)
        # The largest weight is 1: only an empty sum is smaller.
        nisa.tensor_scalar(self.inverse, total, nl.maximum, 0.5)
        nisa.reciprocal(self.inverse, self.inverse)

    def turn(self, tile, dtype, by_scalar):
        """Weights of a tile with rows on the partitions, [rows, each, lanes]."""
        lanes = self.lanes
        bank = psum((self.rows, lanes.each, lanes.count), self.dtype)
        for s in range(lanes.each):
            own = self.weights[:, tile, self.skip + s :: lanes.each]
            nisa.nc_transpose(bank[:, s, :], own, engine=nisa.engine.tensor)
        turned = sbuf(bank.shape, dtype)
        engine = nisa.engine.scalar if by_scalar else nisa.engine.vector
        nisa.tensor_copy(turned, bank, engine=engine)
        return turned

    def add(self, turned, v):
        """Adds weights times values [rows, t, DV], finite where nothing has weight."""
        lanes, rows = self.lanes, v.shape[0]
        if not self.open:
            self.out = psum((lanes.heads, v.shape[2]))
        for j in range(lanes.tokens):
            first = j // lanes.each * lanes.pitch
            own = turned[0:rows, j % lanes.each, first : first + lanes.heads]
            nisa.nc_matmul(self.out, own, v[:, j, :], accumulate=self.open)
            self.open = True

    def gated(self, gate, before, dtype):
        """gate * the branch + what was `before`, a list of at most one [heads, DV] float32."""
        heads = self.lanes.heads
        factor, found = sbuf((heads, 1), nl.float32), sbuf(self.out.shape, dtype)
        nisa.tensor_tensor(factor, self.inverse[0:heads, :], gate, nl.multiply)
        if len(before) == 0:
            nisa.tensor_scalar(found, self.out, nl.multiply, factor)
        else:
            nisa.scalar_tensor_tensor(found, self.out, nl.multiply, factor, nl.add, before[0])
        return found


class Cleared(nl.NKIObject):
    """Values [rows, t, heads, DV] that become zero where no token may be used; see
    `lanes.clear_foreign`.

    VectorE ands bits, GpSimd multiplies them as integers, which it does exactly.

    Args:
        kept: [rows, t] float32, 1 for a token that may be used, else 0.
    """

    def __init__(self, v, kept, by_gpsimd):
        wide = v.dtype == nl.float32 or v.shape[3] % 2 == 0
        self.by_gpsimd = by_gpsimd and wide
        self.own = v.view(nl.int32 if wide else nl.int16)
        bits = sbuf(kept.shape, nl.int32 if wide else nl.int16)
        nisa.tensor_scalar(bits, kept, nl.multiply, 1.0 if self.by_gpsimd else -1.0)
        self.bits = bits.expand_dim(2).expand_dim(3)

    def clear(self):
        """Does it."""
        shown = self.bits.broadcast(2, self.own.shape[2]).broadcast(3, self.own.shape[3])
        if self.by_gpsimd:
            nisa.tensor_tensor(self.own, self.own, shown, nl.multiply, engine=nisa.engine.gpsimd)
        else:
            nisa.tensor_tensor(self.own, self.own, shown, nl.bitwise_and)
