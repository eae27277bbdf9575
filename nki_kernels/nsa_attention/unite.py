"""Lists: the union of the blocks that the queries of a tile chose, for some tiles together.

Blocks go by pieces of 128. A piece's blocks have a lane, so that the first search is one of 128
places for all pieces of GROUP tiles; what the pieces found is then searched tile by tile.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.nsa_attention.choose import LANES, passes
from nki_kernels.nsa_attention.geometry import CHUNKS, PIECE, QUERIES

GROUP = 4  # tiles of queries whose unions are made together
PIECES = 128 // GROUP  # most of a tile


class Unions(nl.NKIObject):
    """Attributes:
    lists: [tiles, slots] int32 in HBM, descending; behind the last place, the next block if any.
    flags: of two groups, [128, GROUP, PIECES]: whether block 128 * piece + row is in a union.
    filled: pieces of each that are not surely 0.
    names: [128, 128] float32: 1 + the block of a lane's piece.
    ready: places in the order of work before which lists are made.
    """

    def __init__(self, turned, lists):
        self.turned, self.lists = turned, lists
        self.flags, self.filled = [], []
        for _ in range(2):
            flags = sbuf((PIECE, GROUP, PIECES), turned.dtype)
            nisa.memset(flags, 0.0)
            self.flags.append(flags)
            self.filled.append([0] * GROUP)
        self.names = sbuf((GROUP * PIECES, PIECE), nl.float32)
        for a in range(GROUP):
            lanes = self.names[PIECES * a : PIECES * (a + 1), :]
            nisa.iota(lanes, [[1, PIECE]], offset=1, channel_multiplier=PIECE)
        self.ready = 0

    def learn(self, work, rows):
        """What a tile's queries chose; rows: [128, pieces of a chunk, chunks, 32]."""
        count = rows.shape[1]
        group, a = work.index // GROUP % 2, work.index % GROUP
        self.fill(group, a, CHUNKS * count)
        flags = self.flags[group][:, a, 0 : CHUNKS * count]
        into = flags.reshape_dim(1, (CHUNKS, count))
        nisa.tensor_reduce(into, nl.maximum, rows.permute((0, 2, 1, 3)), axis=3)

    def fill(self, group, a, count):
        """A tile's flags are 0 behind its first `count` pieces."""
        if self.filled[group][a] > count:
            rest = self.flags[group][:, a, count : self.filled[group][a]]
            nisa.memset(rest, 0.0, engine=nisa.engine.vector)
        self.filled[group][a] = count

    def steps_of(self, union):
        """(name, jobs to wait before) of the steps that list the blocks of up to GROUP tiles."""
        if len(union.ranked) == 0:
            return [("store", 0)]
        rounds = (self.lists.shape[1] + LANES - 1) // LANES
        found = [("unite", 1), ("near", 1), ("collect", 0)]
        long = 2 * passes(self.pieces_of(union) * rounds * LANES)
        for r in range(rounds):
            found.append(("list", 4 if r == 0 else 1 + long))
        found.append(("store", 1))
        return found

    def unite(self, union):
        """`names`: 1 + block where some query of a tile chose it, else 0, [lanes, 128]."""
        group = union.works[0].index // GROUP % 2
        for a in range(GROUP):
            if a not in union.ranked:
                self.fill(group, a, 0)
        flags = self.flags[group]
        lanes = psum((GROUP * PIECES, PIECE), flags.dtype)
        nisa.nc_transpose(lanes, flags.reshape((PIECE, GROUP * PIECES)), engine=nisa.engine.tensor)
        union.names = sbuf(self.names.shape, nl.float32)
        nisa.scalar_tensor_tensor(union.names, lanes, nl.greater, 0.0, nl.multiply, self.names)

    def near(self, union):
        """As many names of every piece as a list has places, descending."""
        rounds = (self.lists.shape[1] + LANES - 1) // LANES
        union.near = sbuf((GROUP * PIECES, rounds * LANES), nl.float32)
        current = union.names
        for r in range(rounds):
            top = union.near[:, r * LANES : (r + 1) * LANES]
            nisa.max8(top, current)
            if r < rounds - 1:
                following = sbuf(current.shape, nl.float32)
                nisa.nc_match_replace8(following, current, top, 0.0)
                current = following

    def pieces_of(self, union):
        """Most pieces of a tile."""
        pieces = 1
        for a in union.ranked:
            pieces = max(pieces, union.works[a].tile.pieces)
        return pieces

    def collect(self, union):
        """The names of a tile's pieces side by side, [tiles, pieces * places]."""
        pieces, places = self.pieces_of(union), union.near.shape[1]
        union.names = sbuf((GROUP, pieces * places), nl.float32)
        for a in range(GROUP):
            into = union.names[a : a + 1, :].reshape((1, pieces, places))
            nisa.dma_copy(into, union.near[PIECES * a : PIECES * a + pieces, :])
        union.found = sbuf((GROUP, places), nl.float32)

    def list(self, union):
        """The next eight names of each tile."""
        top = union.found[:, union.listed : union.listed + LANES]
        nisa.max8(top, union.names)
        union.listed += LANES
        if union.listed < union.found.shape[1]:
            following = sbuf(union.names.shape, nl.float32)
            nisa.nc_match_replace8(following, union.names, top, 0.0)
            union.names = following

    def store(self, union):
        """Writes the lists to HBM."""
        self.ready = union.works[len(union.works) - 1].index + 1
        if union.listed == 0:
            return
        slots = self.lists.shape[1]
        numbers = sbuf((GROUP, slots), nl.int32)
        found = union.found[:, 0:slots]
        nisa.tensor_scalar(numbers, found, nl.subtract, 1.0, op1=nl.maximum, operand1=0.0)
        for a in union.ranked:
            number = union.works[a].tile.number
            nisa.dma_copy(self.lists[number : number + 1, :], numbers[a : a + 1, :])

    def load(self, work):
        """A tile's list: `page_numbers` [1, listed]; `places` [slots, 1], with what it has behind
        the static ones; the masks of its blocks, `hidden`."""
        tile = work.tile
        row = self.lists[tile.number : tile.number + 1, 0 : tile.listed]
        work.page_numbers = sbuf((1, tile.listed), nl.int32)
        nisa.dma_copy(work.page_numbers, row)
        first = len(tile.taken)
        work.places = sbuf((tile.slots, 1), nl.int32)
        if tile.groups > 0:  # all are turned to row numbers
            nisa.memset(work.places, 0, engine=nisa.engine.gpsimd)
        places = work.places[first : tile.slots, :]
        nisa.dma_copy(places, row.reshape((tile.listed, 1)))
        work.hidden = sbuf((tile.slots, QUERIES), self.turned.dtype)
        nisa.memset(work.hidden, 1.0)
        turned = self.turned[tile.number]
        nisa.dma_copy(work.hidden[first : tile.slots, :], turned.vector_select(0, places))


class Union(nl.NKIObject):
    """Up to GROUP tiles whose lists are in the making; `ranked`: which of them choose."""

    def __init__(self, works):
        self.works = works
        self.listed = 0
        self.ranked = []
        for a in range(len(works)):
            if works[a].tile.ranked:
                self.ranked.append(a)
