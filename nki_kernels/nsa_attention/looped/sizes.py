"""Sizes of the hardware loop over groups of tiles of queries, and views by its index."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import sbuf
from nki_kernels.nsa_attention.geometry import BLOCK, BLOCKS_OF_KEYS, KEYS, PIECE, QUERIES

GROUP = 4  # tiles of queries of a turn: 128 tokens
HALVES = 2  # of a group, each a pair of tiles
PAIR = 2
CHUNK = 8  # tiles of compressed keys of a turn of the inner loop
GRANULE = 4  # of them that are loaded together
GRANULES = CHUNK // GRANULE
SHARES = BLOCKS_OF_KEYS + 2  # columns of `constants.Constants.weights`
GROUPS_OF_ROWS = 3  # sixteen listed blocks each, that are gathered ahead


class Place(nl.NKIObject):
    """A tile of a group as `geometry.Tile`, counted from the group's first token and block.

    Attributes:
        taken: forced blocks, `own` first. rows_from: place in the list of the first row.
        window: tiles of keys of its window, counted from the group's last.
    """

    def __init__(self, geometry, half, u):
        g = geometry
        self.half, self.u = half, u
        self.t0, self.own = PAIR * QUERIES * half + QUERIES * u, half
        self.taken = [0] * g.forced
        self.chosen = g.count - g.forced
        self.ranked = True
        self.groups, self.rows_from = GROUPS_OF_ROWS, 0
        self.paged = self.slots = g.forced
        self.width = g.padded // 4
        self.window = list(range((self.t0 - g.window + 1) // KEYS, 1))


class Queries(nl.NKIObject):
    """Operands and sums of a pair of tiles.

    Attributes:
        lower, upper: q^T [D chunk, pair, columns], the second chunk on both halves of the
            partitions, a list that is empty if there is none. gates: [rows, pair, parts, 3].
            shifts: [128, pair, 3]. total: [rows, pair, parts, DV]; sums: [rows, pair, 3, parts].
    """

    def __init__(self, geometry, lane):
        g = self.geometry = geometry
        dk, columns = lane.q_t.shape[1:3]
        self.rest, self.low = dk - 128, min(dk, 128)
        self.lower = sbuf((self.low, PAIR, columns), lane.q_t.dtype)
        self.upper = []
        if dk > 128:
            self.upper.append(sbuf((128, PAIR, columns), lane.q_t.dtype))
            nisa.memset(self.upper[0], 0.0)
        self.gates = sbuf((g.rows, PAIR, g.parts, 3), nl.float32)
        self.shifts = sbuf((128, PAIR, 3), nl.float32)
        self.total = sbuf((g.rows, PAIR, g.parts, lane.v_win.shape[1] - 1), nl.float32)
        self.sums = sbuf((g.rows, PAIR, 3, g.parts), nl.float32)

    def operands(self):
        """What comes from HBM."""
        return [self.lower, *self.upper, self.gates, self.shifts]


def of_turn(tensor, first, size, turn):
    """Rows first + size * turn .. of a tensor in HBM, [size, ...]."""
    count = (tensor.shape[0] - first) // size
    part = tensor[first : first + count * size]
    return part.reshape_dim(0, (count, size)).select(0, turn)


def blocks_of_group():
    return GROUP * QUERIES // BLOCK


def pieces_of(geometry):
    return geometry.padded // PIECE
