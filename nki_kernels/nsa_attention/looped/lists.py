"""What the queries of a pair of tiles chose: masks in HBM, and a list of any length of each tile.

GpSimd makes the lists by one instruction. Rows of the first blocks are gathered at once
(GROUPS_OF_ROWS sixteens of them); those of longer lists in a hardware loop, by row numbers that
only then are made for all of the list.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.nsa_attention.choose import Choice, hide, passes
from nki_kernels.nsa_attention.geometry import AT_ONCE, CHUNKS, KEYS, PIECE, QUERIES
from nki_kernels.nsa_attention.looped.sizes import GROUPS_OF_ROWS, PAIR, pieces_of
from nki_kernels.nsa_attention.rows import Numbers
from nki_kernels.nsa_attention.running import larger

LANE = 16  # partitions apart that nonzero_with_count works on
LISTED = AT_ONCE * GROUPS_OF_ROWS


class Chosen(nl.NKIObject):
    """Of a pair: `turned`, masks [blocks, 32] of each tile in HBM; `numbers`, see `rows`; `turns`,
    [1, 1] int32, sixteens of the longer list, at least GROUPS_OF_ROWS; `more`, 1 if there are more
    than that; `hidden` [listed, 32] of each tile, what hides the first ones."""

    def __init__(self, geometry, constants, dtype):
        self.turned, self.hidden = [], []
        for _ in range(PAIR):
            shape = (geometry.padded, QUERIES)
            self.turned.append(nl.ndarray(shape, dtype=dtype, buffer=nl.private_hbm))
            hidden = sbuf((LISTED, QUERIES), dtype)
            nisa.memset(hidden, 0.0)
            self.hidden.append(hidden)
        self.numbers = Numbers(PAIR, geometry.padded, constants, dtype)
        self.turns, self.more = sbuf((1, 1), nl.int32), sbuf((1, 1), nl.int32)
        nisa.memset(self.turns, GROUPS_OF_ROWS)
        nisa.memset(self.more, 0)


class Lists(nl.NKIObject):
    """The pair whose lists are in the making.

    Attributes:
        flags: [128, pieces, pair * 16] bfloat16: whether block 128 * piece + row is in the union of
            a tile, in every 16th column.
    """

    def __init__(self, geometry, constants, lane, scores, dtype):
        self.geometry, self.constants, self.lane, self.scores = geometry, constants, lane, scores
        self.flags = sbuf((PIECE, pieces_of(geometry), LANE * PAIR), nl.bfloat16)
        nisa.memset(self.flags, 0.0)
        unused = nl.ndarray((1, 1), dtype=dtype, buffer=nl.private_hbm)
        self.choice = Choice(geometry, constants, unused, [])

    def steps_of(self, works):
        """(jobs to wait before, whose, name, of what) of the steps that list what a pair chose."""
        long = passes(self.scores.width)
        found = [(0, self, "collect", works)]
        for work in works:
            found.append((3 if work.tile.u == 0 else 1 + long, self, "settle", work))
            for name, wait in self.choice.steps_to_mark(work):
                found.append((wait, self.choice, name, work))
            found.append((2 + 3 * long, self, "turn", work))
        few = pieces_of(self.geometry) // 8
        for wait, name in ((1, "unite"), (2 + few, "name"), (1, "number"), (1, "count")):
            found.append((wait, self, name, works))
        return found

    def collect(self, works):
        """Scores from HBM."""
        for work in works:
            work.scores, work.before = self.scores.collect(self.scratch, work.tile.u)
        self.scores.reach(self.near)

    def settle(self, work):
        self.scores.settle(work, work.scores, work.before)

    def turn(self, work):
        """Writes a tile's mask to HBM with a block per row, and what it has to its union."""
        mask, count = work.mask, self.scores.width // PIECE
        rows = sbuf((PIECE, CHUNKS, count, QUERIES), mask.dtype)
        by_lane = rows.permute((0, 2, 1, 3))
        for first in range(0, count, CHUNKS):
            some = min(CHUNKS, count - first)
            bank = psum((PIECE, some, CHUNKS, QUERIES), mask.dtype)
            for i in range(some):
                blocks = mask[:, (first + i) * PIECE : (first + i + 1) * PIECE]
                into = bank[:, i].reshape((PIECE, CHUNKS * QUERIES))
                nisa.nc_transpose(into, blocks, engine=nisa.engine.tensor)
            nisa.tensor_copy(by_lane[:, first : first + some], bank, engine=nisa.engine.vector)
        u, pieces = work.tile.u, CHUNKS * count
        by_piece = rows.reshape((PIECE, pieces, QUERIES))
        target = self.chosen.turned[u].reshape_dim(0, (pieces, PIECE)).permute((1, 0, 2))
        nisa.dma_copy(target, by_piece)
        nisa.tensor_reduce(self.flags[:, :, LANE * u], nl.maximum, by_piece, axis=2)

    def unite(self, works):
        """`lists` [pair * 16, blocks + 1] int32: blocks of a tile's union, 0s, and how many they
        are, in every 16th row."""
        lanes, pieces = LANE * PAIR, pieces_of(self.geometry)
        unions = sbuf((lanes, pieces * PIECE), nl.float32)
        for first in range(0, pieces, 8):
            some = min(8, pieces - first)
            bank = psum((lanes, some, PIECE), nl.bfloat16)
            for i in range(some):
                flags = self.flags[:, first + i, :]
                nisa.nc_transpose(bank[:, i, :], flags, engine=nisa.engine.tensor)
            into = unions[:, first * PIECE : (first + some) * PIECE]
            nisa.tensor_copy(into.reshape_dim(1, (some, PIECE)), bank, engine=nisa.engine.vector)
        self.lists = sbuf((lanes, pieces * PIECE + 1), nl.int32)
        nisa.memset(self.lists, 0)
        nisa.nonzero_with_count(self.lists, unions, index_offset=0, padding_val=0)

    def name(self, works):
        """`places` [128, pair]: the first blocks of the lists, as integers and for PE."""
        lanes = self.lists.shape[0]
        names, turned = sbuf((lanes, KEYS), nl.float32), psum((KEYS, lanes))
        nisa.tensor_copy(names, self.lists[:, 0:KEYS], engine=nisa.engine.vector)
        nisa.nc_transpose(turned, names, engine=nisa.engine.tensor)
        self.names = sbuf((KEYS, PAIR), nl.float32)
        nisa.tensor_copy(self.names, turned[:, 0::LANE], engine=nisa.engine.vector)
        self.places = []
        for u in range(PAIR):
            places = sbuf((LISTED, 1), nl.int32)
            source = self.names[0:LISTED, u : u + 1]
            nisa.tensor_copy(places, source, engine=nisa.engine.vector)
            self.places.append(places)

    def number(self, works):
        """`row_numbers` [128, GROUPS_OF_ROWS] int32 of each tile."""
        self.row_numbers = []
        for u in range(PAIR):
            blocks = psum((KEYS, GROUPS_OF_ROWS))
            for group in range(GROUPS_OF_ROWS):
                lanes = self.constants.slot_lanes[0:LISTED, group, :]
                names = self.names[0:LISTED, u : u + 1]
                nisa.nc_matmul(blocks[:, group : group + 1], lanes, names, accumulate=False)
            numbers = sbuf(blocks.shape, nl.int32)
            self.constants.number_rows(numbers, blocks)
            self.row_numbers.append(numbers)

    def count(self, works):
        """How many turns the longest list takes, on any core."""
        lanes, last = self.lists.shape[0], self.lists.shape[1] - 1
        counts, turned = sbuf((lanes, 1), nl.float32), psum((1, lanes))
        nisa.tensor_copy(counts, self.lists[:, last : last + 1], engine=nisa.engine.vector)
        nisa.nc_transpose(turned, counts, engine=nisa.engine.tensor)
        longest = sbuf((1, 1), nl.float32)
        nisa.tensor_reduce(longest, nl.maximum, turned[:, 0::LANE], axis=1)
        longest = larger(longest)
        turns = sbuf((1, 1), nl.float32)
        # However it is rounded, there are enough; what is too much finds nothing.
        nisa.tensor_scalar(
            turns, longest, nl.multiply, 1.0 / AT_ONCE, op1=nl.add, operand1=1.0 - 0.5 / AT_ONCE
        )
        chosen = self.chosen
        nisa.tensor_scalar(chosen.turns, turns, nl.maximum, float(GROUPS_OF_ROWS))
        ahead = float(GROUPS_OF_ROWS * AT_ONCE)
        nisa.tensor_scalar(chosen.more, longest, nl.greater, ahead)

    def spread(self):
        """Row numbers of all turns, if there are more than are gathered at once."""
        more, lists = nisa.register_alloc(), self.lists
        nisa.register_load(more, self.chosen.more)

        def once(_):
            self.chosen.numbers.spread(lists[:, 0 : lists.shape[1] - 1], LANE)

        nl.fori_loop(0, more, once)

    def gather(self, buffers):
        """The first blocks of each tile's list, as rows, and what hides them; buffers: a list of
        each tile."""
        for u in range(PAIR):
            hidden = self.chosen.hidden[u]
            nisa.dma_copy(hidden, self.chosen.turned[u].vector_select(0, self.places[u]))
            for group in range(GROUPS_OF_ROWS):
                rows = self.row_numbers[u][:, group : group + 1]
                nisa.dma_copy(buffers[u][group], self.lane.rows.vector_select(0, rows))

    def hide(self):
        """Makes what hides blocks of their masks."""
        for hidden in self.chosen.hidden:
            hide_in(hidden)


class Masked(nl.NKIObject):
    """What `choose.hide` takes."""

    def __init__(self, hidden):
        self.hidden = hidden


def hide_in(hidden):
    """Turns masks into what they add to logits."""
    hide(Masked(hidden))
