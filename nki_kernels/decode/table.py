"""Where chosen blocks of one kv head lie, by a table that stands in SBUF.

Each partition holds the first rows of some neighbouring blocks: it compares the numbers of the
chosen ones with its own, and a matmul adds up what the one partition finds that has it.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf

PARTITIONS = 128

NOWHERE = 1.0e7
"""Added to the number of a block that is none: all its tokens lie behind every query."""


class Table(nl.NKIObject):
    """Rows of blocks.

    Args:
        first: [128, slots] float32, first rows of `slots` neighbouring blocks on each partition.
        blocks: of a sequence. size: tokens of a block; tokens: of a row.
        place: see `single.decode_single`. ones: [128, 128] float32.
    """

    def __init__(self, first, blocks, size, tokens, place, ones):
        self.first, self.blocks, self.size, self.tokens = first, blocks, size, tokens
        self.place, self.ones, self.per_block = place, ones, size // tokens
        slots = first.shape[1]
        self.slots, self.places = counted(slots, 0), counted(tokens, 0)
        self.first_block = counted(1, slots)

    def look_up(self, numbers, best):
        """Rows of chosen blocks, [rows, 1] int32, from `selection.search`."""
        chosen, slots = numbers.shape[1], self.slots.shape[1]
        rows = chosen * self.per_block
        at, everywhere = sbuf((1, chosen), nl.float32), psum((PARTITIONS, chosen))
        # A row of NaN matches nothing: its numbers are any, but must be some block's.
        nisa.tensor_scalar(at, numbers, nl.minimum, float(self.blocks - 1))
        nisa.nc_matmul(everywhere, self.ones[0:1, :], at, accumulate=False)
        own = sbuf((PARTITIONS, chosen, slots), nl.float32)
        nisa.scalar_tensor_tensor(
            own, everywhere.expand_dim(2).broadcast(2, slots), nl.subtract, self.first_block,
            nl.equal, self.slots.expand_dim(1).broadcast(1, chosen),
        )  # fmt: skip
        nisa.tensor_tensor(own, own, self.first.expand_dim(1).broadcast(1, chosen), nl.multiply)
        first = sbuf((PARTITIONS, chosen), nl.float32)
        nisa.tensor_reduce(first, nl.add, own, axis=2)
        bank, index = psum((rows, 1)), sbuf((rows, 1), nl.int32)
        nisa.nc_matmul(bank, by_row(first, self.per_block), self.ones[:, 0:1], accumulate=False)
        nisa.tensor_tensor(index, bank, self.place[0:rows, 2:3], nl.add)
        # NOWHERE for what is no block: its tokens lie behind every query.
        there = sbuf((1, chosen), nl.float32)
        nisa.tensor_scalar(there, best, nl.less, 0.0, op1=nl.multiply, operand1=NOWHERE)
        nisa.tensor_tensor(there, there, at, nl.add)
        self.numbers = psum((rows, 1))
        nisa.nc_matmul(
            self.numbers, by_row(there, self.per_block), self.ones[0:1, 0:1], accumulate=False
        )
        return index

    def seen(self):
        """Which tokens of the rows found last the query sees: [rows, t] uint8, and -1 or 0."""
        rows = self.numbers.shape[0]
        left, shown = sbuf((rows, 1), nl.float32), sbuf((rows, self.tokens), nl.uint8)
        bits = sbuf((rows, self.tokens), nl.int32)
        nisa.scalar_tensor_tensor(
            left, self.numbers, nl.multiply, -float(self.size), nl.add, self.place[0:rows, 3:4]
        )
        nisa.tensor_scalar(shown, self.places[0:rows, :], nl.less, left)
        nisa.tensor_scalar(bits, shown, nl.multiply, -1)
        return shown, bits


def counted(count, each):
    """0 .. count - 1 on each partition, and `each` times its number: [128, count] float32."""
    found = sbuf((PARTITIONS, count), nl.float32)
    nisa.iota(found, [[1, count]], offset=0, channel_multiplier=each)
    return found


def by_row(x, rows):
    """[P, n] with each column `rows` times."""
    return x.expand_dim(2).broadcast(2, rows)
