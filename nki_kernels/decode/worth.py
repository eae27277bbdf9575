"""What selection blocks are worth to one kv head, with keys on the partitions.

Compressed keys lie in `tiles` tiles of 128 rows of t neighbours, so that row p of tile i holds
blocks (128 i + p) * b .. (128 i + p) * b + b - 1 with b = t / (m / d).
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.queues import fetch
from nki_kernels.common.spans import spans
from nki_kernels.decode.selection import FORCED, NONE

PARTITIONS = 128

APART = 32
"""Partitions from one at which engines begin to read or write to the next such."""


class Worth(nl.NKIObject):
    """From logits to one row of what blocks are worth.

    Args:
        tokens: t. length, ratio: l / d and m / d. blocks: that may be chosen, at least.
    """

    def __init__(self, tiles, tokens, length, ratio, blocks):
        self.tiles, self.tokens, self.length, self.ratio = tiles, tokens, length, ratio
        self.before, self.per_row = length - 1, tokens // ratio
        # Blocks may be chosen that have no compressed key yet.
        of_tile = PARTITIONS * self.per_row
        self.ranked = max(tiles, (blocks + of_tile - 1) // of_tile)

    def prepare(self, place, moves, initial):
        """What hangs on no key. Arguments as of `single.decode_single`."""
        self.shift, self.corner = sbuf((128, 128), nl.float32), sbuf((128, 128), nl.float32)
        fetch(self.shift, moves[0], "a")
        fetch(self.corner, moves[1], "a")
        self.shares = sbuf((PARTITIONS, self.ranked, self.before + self.tokens), nl.float32)
        nisa.memset(self.shares, 0.0)
        self.prefer(place, initial)

    def prefer(self, place, initial):
        """`FORCED` for blocks that are chosen anyway, `NONE` for those behind the query's own."""
        shape = (PARTITIONS, self.ranked, self.per_row)
        number, hidden = sbuf(shape, nl.float32), sbuf(shape, nl.float32)
        self.preference = sbuf(shape, nl.float32)
        nisa.iota(
            number, [[PARTITIONS * self.per_row, self.ranked], [1, self.per_row]], offset=0,
            channel_multiplier=self.per_row,
        )  # fmt: skip
        nisa.tensor_scalar(
            self.preference, number, nl.greater, place[:, 1:2], op1=nl.multiply,
            operand1=FORCED,
        )  # fmt: skip
        nisa.tensor_scalar(
            hidden, number, nl.greater, place[:, 0:1], op1=nl.multiply, operand1=NONE
        )
        nisa.tensor_scalar(
            number, number, nl.less, float(initial), op1=nl.multiply, operand1=FORCED
        )
        nisa.tensor_tensor(self.preference, self.preference, number, nl.maximum)
        nisa.tensor_tensor(self.preference, self.preference, hidden, nl.add)

    def find(self, values, scale, ones, meanwhile):
        """What blocks are worth, [1, blocks].

        Args:
            values: [128, G, tiles * t + 1], see `upright.Upright`.
            ones: [128, 128] float32. meanwhile: what VectorE does while others work.
        """
        self.share_out(values, scale, ones, meanwhile)
        if self.before > 0:
            self.fetch_neighbours(meanwhile)
        return self.in_a_row(self.importance(), meanwhile)

    def share_out(self, values, scale, ones, meanwhile):
        """What the heads together give each compressed key, behind what the one before it had."""
        group, tokens = values.shape[1], self.tokens
        shares, sums = sbuf(values.shape, nl.float32), sbuf((PARTITIONS, group), nl.float32)
        nisa.activation(shares, nl.exp, values, scale=scale)
        meanwhile()
        meanwhile()
        nisa.tensor_reduce(sums, nl.add, shares, axis=2)
        meanwhile()
        total, inverse = psum((PARTITIONS, group)), sbuf((PARTITIONS, group), nl.float32)
        nisa.nc_matmul(total, ones, sums, accumulate=False)
        nisa.reciprocal(inverse, total)
        own = shares[:, :, 0 : self.tiles * tokens]
        nisa.tensor_tensor(own, own, inverse.expand_dim(2).broadcast(2, own.shape[2]), nl.multiply)
        for i in range(self.tiles):
            by_key = own[:, :, i * tokens : (i + 1) * tokens].permute((0, 2, 1))
            nisa.tensor_reduce(self.shares[:, i, self.before :], nl.add, by_key, axis=2)

    def fetch_neighbours(self, meanwhile):
        """The last shares of a partition come before those of the next one."""
        halo = psum((PARTITIONS, self.ranked, self.before))
        last = self.shares[:, :, self.tokens :]
        nisa.nc_matmul(halo, self.shift, last, accumulate=False)
        if self.ranked > 1:
            nisa.nc_matmul(
                halo[:, 1:, :], self.corner, last[:, 0 : self.ranked - 1, :], accumulate=True
            )
        meanwhile()
        nisa.tensor_copy(self.shares[:, :, 0 : self.before], halo)

    def importance(self):
        """[128, ..., blocks of a row], with `preference`: overlapping keys count as often as they
        share strides with a block, see `selection.shared_weights`.

        Tiles lie `APART` apart, so that as partitions they are where engines can begin to read.
        """
        group = min(self.ranked, PARTITIONS // APART)
        found = []
        for first, count in spans(self.ranked, group):
            tiles = slice(first, first + count)
            apart = sbuf((PARTITIONS, (count - 1) * APART + 1, self.per_row), nl.float32)
            if count > 1:
                nisa.memset(apart, 0.0, engine=nisa.engine.gpsimd)
            own, last = apart[:, 0 : (count - 1) * APART + 1 : APART, :], self.preference[:, tiles]
            for offset in range(1 - self.length, self.ratio):
                times = min(offset + self.length, self.ratio) - max(offset, 0)
                start = offset + self.before
                end = start + self.ratio * (self.per_row - 1) + 1
                part = self.shares[:, tiles, start : end : self.ratio]
                nisa.scalar_tensor_tensor(own, part, nl.multiply, float(times), nl.add, last)
                last = own
            found.append(apart)
        return found

    def in_a_row(self, worth, meanwhile):
        """[1, blocks] of `importance`, exactly."""
        columns, half = PARTITIONS * self.per_row, (self.per_row + 1) // 2
        row = sbuf((1, self.ranked, PARTITIONS, self.per_row), nl.float32)
        first = 0
        for apart in worth:
            # Two banks, which two engines may read at a time.
            for j, count in spans(self.per_row, half):
                bank = psum((apart.shape[1], PARTITIONS, count))
                for i in range(count):
                    part = apart[:, :, j + i]
                    nisa.nc_transpose(bank[:, :, i], part, engine=nisa.engine.tensor)
                meanwhile()
                engine = nisa.engine.scalar if j == 0 else nisa.engine.vector
                for place in range(0, apart.shape[1], APART):
                    into = row[:, first + place // APART, :, j : j + count]
                    nisa.tensor_copy(into, bank[place : place + 1], engine=engine)
            first += (apart.shape[1] - 1) // APART + 1
        return row.reshape((1, self.ranked * columns))
