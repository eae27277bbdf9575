"""Small inputs of `decode_single`: fields side by side in one tile, so that one DMA brings them."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import sbuf
from nki_kernels.decode.spread import groups_of

PARTITIONS = 128

EIGHT = 8
"""Largest values that VectorE finds at once."""

BEHIND = -1.0e7
"""Tokens before a row that is none: behind every query."""


class Columns(nl.NKIObject):
    """Columns of a tile [128, ...], one field after the other."""

    def __init__(self, tile):
        self.tile, self.used = tile, 0

    def take(self, count):
        """The next `count`."""
        self.used += count
        return self.tile[:, self.used - count : self.used]


class Constants(nl.NKIObject):
    """What hangs on sizes only, most of it fields of a tile [128, ...] float32.

    Attributes:
        same, apart: see `spread`; apart [128, 128 / pitch].
        gather, of_part, unit, before, slots, by_token: see `ranking`.
        behind: [128, rows], less the tokens of a block before a row, the same on all partitions.
        token: [128, t], 0, 1, ... on each partition. zero: [128, 1].
    """

    def __init__(self, tile, call):
        """call: see `single`."""
        columns, pitch, tokens = Columns(tile), call.pitch, call.far_tokens
        parts, ratio = call.parts, call.ratio
        each, per_row = tokens // groups_of(tokens, pitch), tokens // ratio
        self.apart = columns.take(PARTITIONS // pitch)
        by_token = columns.take(2 * each * per_row)
        self.by_token = by_token.reshape((PARTITIONS, 2, each, per_row))
        self.gather = columns.take(PARTITIONS // parts)
        self.of_part, self.unit = columns.take(parts), columns.take(parts)
        head, order = columns.take(1), columns.take(1)
        self.same = counted([[0, PARTITIONS // pitch], [1, pitch]], 0)
        nisa.tensor_scalar(self.same, self.same, nl.equal, head)
        self.before = counted([[EIGHT, PARTITIONS // EIGHT], [-1, EIGHT]], EIGHT - 1)
        nisa.tensor_scalar(self.before, self.before, nl.greater, order)
        tokens, rows = call.chosen_tokens, call.rows[1]
        per_block = call.size // tokens
        used = call.chosen * per_block
        self.token, self.zero = counted([[1, tokens]], 0), sbuf((PARTITIONS, 1), nl.float32)
        nisa.memset(self.zero, 0.0)
        self.slots = sbuf((PARTITIONS, rows), nl.float32)
        self.behind = sbuf((PARTITIONS, rows), nl.float32)
        if used < rows:
            nisa.memset(self.slots[:, used:], -1.0)
            nisa.memset(self.behind[:, used:], BEHIND)
        count_up(self.slots[:, 0:used], [[1, call.chosen], [0, per_block]], 0)
        count_up(self.behind[:, 0:used], [[0, call.chosen], [-tokens, per_block]], 0)


def count_up(target, pattern, offset):
    """The same numbers on each partition."""
    nisa.iota(target, pattern, offset=offset, channel_multiplier=0)


def counted(pattern, offset):
    """Such numbers, [128, ...] float32."""
    count = 1
    for _, times in pattern:
        count *= times
    found = sbuf((PARTITIONS, count), nl.float32)
    count_up(found, pattern, offset)
    return found


class Place(nl.NKIObject):
    """What hangs on the sequence's length, fields of [128, ...] float32.

    Attributes:
        seen: on each lane how many columns of each tile of compressed keys the query sees.
        low, high: the first column of the window that it sees, and one behind the last.
        later: on each partition, from a block's first row to the row there.
        left: 1 + the query's position less the block's tokens before that row.
        token: of each lane its tokens in a row of chosen blocks, less 1 + the position.
        kept: 1 for tokens of the rows of compressed keys and of the window that the query sees,
            else 0.
    """

    def __init__(self, tile, tiles, each):
        columns = Columns(tile)
        self.seen = columns.take(tiles)
        self.low, self.high = columns.take(1), columns.take(1)
        self.later, self.left = columns.take(1), columns.take(1)
        self.token = columns.take(each)
        self.kept = columns.take(tile.shape[1] - columns.used)
