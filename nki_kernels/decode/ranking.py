"""The n best selection blocks of one kv head, and where their rows lie.

Compressed keys lie in rows of t neighbours, row tiles * p + i on partition p of tile i, so that a
partition holds neighbouring blocks. What the heads give a block is a matmul with their weights
stationary. Neighbouring partitions are then put side by side on `parts` rows, whose best are found
eight at a time; of these candidates, at most 128, each finds its rank: all stand in a row on every
partition, compared with the partition's own, and PE counts. A last matmul picks those of rank p for
the p-th place.

Equal values: the eight that VectorE finds at a time lie in descending order of number, everything
else ascends; `before` says which candidates of one value come before which.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf

NOWHERE = 1.0e7
"""Added to the number of a block that is none: all its tokens lie behind every query."""

NONE = -3.0e38
"""Below every value that a block may have."""

EIGHT = 8
"""What VectorE finds at once."""


class Ranking(nl.NKIObject):
    """The choice.

    Args:
        chosen: n. of_parts: [parts, 2, blocks of a part] float32: what is added to the worth of
            blocks, and where they begin in their pool. lanes: that hold compressed keys.
        constants: all float32, by_token: [128, 2, each, blocks of a row]: strides that a token of a
            lane shares with a block of its row, and with a block of the next row. gather:
            [128, 128 / parts]: 1 where a partition is that one of its part; of_part: [128, parts]:
            1 where it is of that part. unit: [128, parts]. before: [128, 128], 1 where candidate p
            is before candidate j. slots: [128, rows], which chosen block a row is of, the same on
            all partitions.
    """

    def __init__(self, chosen, of_parts, constants, lanes):
        self.chosen, self.constants = chosen, constants
        self.by_token = constants.by_token[0:lanes]
        self.parts, _, self.blocks = of_parts.shape
        self.first_rows = of_parts[:, 1, :]
        self.rounds = (chosen + EIGHT - 1) // EIGHT
        self.found = count = self.parts * self.rounds * EIGHT
        self.unit = constants.unit[0 : self.parts, :]
        self.slots = constants.slots[0:count]
        self.before, self.after = (
            constants.before[0:count, 0:count],
            sbuf((count, count), nl.float32),
        )
        nisa.tensor_scalar(self.after, self.before, nl.multiply, -1.0, op1=nl.add, operand1=1.0)
        self.ones = sbuf((self.parts, 1), nl.float32)
        self.narrow_ones = sbuf((count, 1), nl.bfloat16)
        nisa.memset(self.ones, 1.0)
        nisa.memset(self.narrow_ones, 1.0)
        self.first_of_part = sbuf((self.parts, 1), nl.float32)
        nisa.iota(self.first_of_part, [[1, 1]], offset=0, channel_multiplier=self.blocks)
        # Begins the sum of worth, which PE has no time for later.
        self.worth = psum((self.parts, self.blocks))
        nisa.nc_matmul(self.worth, self.unit, of_parts[:, 0, :], accumulate=False)

    def find_worth(self, spread, length):
        """From the weights of the compressed branch: [128, blocks of a partition] in PSUM. length:
        l / d."""
        lanes, tiles = spread.lanes, spread.tiles
        shares = sbuf(self.by_token.shape, nl.float32)
        nisa.tensor_scalar(shares, self.by_token, nl.multiply, spread.inverse)
        per_row = shares.shape[3]
        by_row = psum((128, tiles, per_row))
        each, weights = lanes.each, spread.weights
        last = each * 128
        for i in range(tiles):
            for s in range(each):
                own = weights[:, i, each + s :: each]
                nisa.nc_matmul(by_row[:, i, :], own, shares[:, 0, s, :], accumulate=s > 0)
            for s in range(each):
                if each - s > length - 1:
                    continue
                # Of the row before, which is on this partition but in the first tile.
                if i > 0:
                    own = weights[:, i - 1, each + s :: each]
                else:
                    own = weights[:, tiles - 1, s:last:each]
                nisa.nc_matmul(by_row[:, i, :], own, shares[:, 1, s, :], accumulate=True)
        return by_row.reshape((128, tiles * per_row))

    def in_parts(self, by_row):
        """The worth of all blocks, and preference, in parts."""
        neighbours, blocks = self.constants.gather.shape[1], by_row.shape[1]
        side_by_side = sbuf((128, neighbours, blocks), nl.float32)
        nisa.tensor_tensor(
            side_by_side,
            by_row.expand_dim(1).broadcast(1, neighbours),
            self.constants.gather.expand_dim(2).broadcast(2, blocks), nl.multiply,
        )  # fmt: skip
        nisa.nc_matmul(
            self.worth,
            self.constants.of_part,
            side_by_side.reshape((128, self.blocks)),
            accumulate=True,
        )

    def find_candidates(self):
        """The best of each part, values and places."""
        shape = (self.parts, self.rounds * EIGHT)
        self.best, self.places = sbuf(shape, nl.float32), sbuf(shape, nl.uint32)
        left = self.worth
        for r in range(self.rounds):
            eight = slice(EIGHT * r, EIGHT * r + EIGHT)
            nisa.max8(self.best[:, eight], left)
            if r + 1 == self.rounds:
                by_part = self.spread_out(self.best)
                self.in_row, self.own = psum((self.found, self.found)), psum((self.found, 1))
                ones = self.ones.broadcast(1, self.found)
                nisa.nc_matmul(self.in_row, ones, by_part, accumulate=False)
                nisa.nc_matmul(self.own, by_part, self.ones, accumulate=False)
            following = sbuf((self.parts, self.blocks), nl.float32)
            nisa.nc_match_replace8(
                following, left, self.best[:, eight], NONE, dst_idx=self.places[:, eight]
            )
            left = following
        self.at = sbuf(shape, nl.uint32)
        # NaN matches nothing: its places are any, but must be some block's.
        nisa.tensor_scalar(self.at, self.places, nl.minimum, float(self.blocks - 1))
        self.first = sbuf(shape, nl.float32)
        nisa.nc_n_gather(self.first, self.first_rows, self.at)
        there, self.numbers = sbuf(shape, nl.float32), sbuf(shape, nl.float32)
        nisa.tensor_scalar(there, self.best, nl.less, 0.0, op1=nl.multiply, operand1=NOWHERE)
        nisa.scalar_tensor_tensor(self.numbers, self.at, nl.add, self.first_of_part, nl.add, there)

    def spread_out(self, some):
        """[parts, parts * n] of [parts, n]: its own on the diagonal of parts, else 0."""
        count = some.shape[1]
        found = sbuf((self.parts, self.parts, count), nl.float32)
        nisa.tensor_tensor(
            found, some.expand_dim(1).broadcast(1, self.parts),
            self.unit.expand_dim(2).broadcast(2, count), nl.multiply,
        )  # fmt: skip
        return found.reshape((self.parts, self.parts * count))

    def on_candidates(self, some):
        """[candidates, 1] of [parts, n], in SBUF."""
        bank, found = psum((self.found, 1)), sbuf((self.found, 1), nl.float32)
        nisa.nc_matmul(bank, self.spread_out(some), self.ones, accumulate=False)
        nisa.tensor_copy(found, bank, engine=nisa.engine.scalar)
        return found

    def rank(self):
        """Each candidate's rank, [candidates, 1] in PSUM."""
        count = self.found
        above, level = sbuf((count, count), nl.bfloat16), sbuf((count, count), nl.bfloat16)
        row = self.in_row
        nisa.scalar_tensor_tensor(above, row, nl.less, self.own, nl.multiply, self.after)
        nisa.scalar_tensor_tensor(level, row, nl.less_equal, self.own, nl.multiply, self.before)
        self.ranks = psum((count, 1))
        nisa.nc_matmul(self.ranks, above, self.narrow_ones, accumulate=False)
        nisa.nc_matmul(self.ranks, level, self.narrow_ones, accumulate=True)

    def pick(self, later, last):
        """Rows of chosen blocks, [rows, 1] int32; later: [rows, 1] float32, from a block's first
        row to this one; last: the pool's."""
        rows = self.slots.shape[1]
        self.numbers = self.on_candidates(self.numbers)
        first, index = self.on_candidates(self.first), sbuf((rows, 1), nl.int32)
        self.picked = sbuf((self.found, rows), nl.float32)
        nisa.tensor_scalar(self.picked, self.slots, nl.equal, self.ranks)
        bank = psum((rows, 1))
        nisa.nc_matmul(bank, self.picked, first, accumulate=False)
        nisa.tensor_scalar(index, bank, nl.add, later, op1=nl.minimum, operand1=float(last))
        return index

    def number(self, lanes):
        """Numbers of the rows' blocks in PSUM: [lanes, rows], alike on each lane, and [rows, 1]."""
        rows = self.slots.shape[1]
        in_row, by_row = psum((lanes, rows)), psum((rows, 1))
        nisa.nc_matmul(in_row, self.numbers.broadcast(1, lanes), self.picked, accumulate=False)
        nisa.nc_matmul(by_row, self.picked, self.numbers, accumulate=False)
        return in_row, by_row
