"""What the queries of a pair of tiles chose: masks in HBM, and a list of any length of each tile.

GpSimd makes the lists by one instruction. Rows of the first blocks are gathered at once
(GROUPS_OF_ROWS sixteens of them); those of longer lists in a hardware loop, by row numbers that
only then are made for all of the list.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.queues import fetch
from nki_kernels.common.spans import spans
from nki_kernels.nsa_attention.choose import BANK, TAKEN, Choice, hide, passes
from nki_kernels.nsa_attention.geometry import (
    AT_ONCE,
    CHUNKS,
    KEYS,
    PIECE,
    QUERIES,
    TOKENS,
)
from nki_kernels.nsa_attention.looped.sizes import GROUPS_OF_ROWS, PAIR
from nki_kernels.nsa_attention.rows import Numbers
from nki_kernels.nsa_attention.running import larger

LANE = 32  # partitions apart that two tiles' lists are made on
LANES = LANE * PAIR
LISTED = AT_ONCE * GROUPS_OF_ROWS
MOST_AT_ONCE = 1024  # blocks of a lane of which SBUF has room for the scores of two tiles
AT_A_TIME = 4096  # places of a list whose row numbers are made together
WAITS = {"best": 1, "gather": 3, "merge": 2, "spread": 7, "mark": 2}
"""Jobs between the steps of a choice, see `steps_of`."""


class Chosen(nl.NKIObject):
    """Of a pair.

    Attributes:
        turned: masks [blocks, 32] of each tile, in HBM. lists: [pair, places] int32 in HBM, the
            blocks of each tile's union, then 0s. ends: [pair, 1], how many. numbers: see `rows`.
        counts: [1, pair] int32. hidden: [listed, 32] of each tile, masks of the first ones.
    """

    def __init__(self, geometry, constants, dtype):
        self.turned, self.hidden = [], []
        for _ in range(PAIR):
            shape = (geometry.padded, QUERIES)
            self.turned.append(nl.ndarray(shape, dtype=dtype, buffer=nl.private_hbm))
            hidden = sbuf((LISTED, QUERIES), dtype)
            nisa.memset(hidden, 0.0)
            self.hidden.append(hidden)
        self.numbers = Numbers(PAIR, geometry.padded, constants, dtype)
        shape = (PAIR, geometry.padded + geometry.padded // CHUNKS)
        self.lists = nl.ndarray(shape, dtype=nl.int32, buffer=nl.private_hbm)
        self.ends = nl.ndarray((PAIR, 1), dtype=nl.int32, buffer=nl.private_hbm)
        self.counts = sbuf((1, PAIR), nl.int32)
        nisa.memset(self.counts, 0)

    def turns(self):
        """Registers: 1 if a list, on any core, has more blocks than are gathered ahead; and turns
        of sixteen blocks that the longest one takes, at least GROUPS_OF_ROWS."""
        counts, longest = sbuf((1, PAIR), nl.float32), sbuf((1, 1), nl.float32)
        nisa.tensor_copy(counts, self.counts, engine=nisa.engine.vector)
        nisa.tensor_reduce(longest, nl.maximum, counts, axis=1)
        longest = larger(longest)
        turns, some = sbuf((1, 1), nl.float32), sbuf((1, 1), nl.int32)
        # However it is rounded, there are enough; what is too much finds nothing.
        nisa.tensor_scalar(
            turns, longest, nl.multiply, 1.0 / AT_ONCE, op1=nl.add, operand1=1.0 - 0.5 / AT_ONCE
        )
        more, many = sbuf((1, 1), nl.float32), sbuf((1, 1), nl.int32)
        nisa.tensor_scalar(more, longest, nl.greater, float(LISTED))
        nisa.tensor_tensor(turns, turns, more, nl.multiply)
        nisa.tensor_scalar(many, turns, nl.maximum, float(GROUPS_OF_ROWS))
        nisa.tensor_copy(some, more, engine=nisa.engine.vector)
        found = [nisa.register_alloc(), nisa.register_alloc()]
        nisa.register_load(found[0], some)
        nisa.register_load(found[1], many)
        return found

    def spread(self):
        """Row numbers of all turns, some places at a time."""
        places = self.turned[0].shape[0]
        for first in range(0, places, AT_A_TIME):
            some = min(AT_A_TIME, places - first)
            lists = sbuf((LANES, some), nl.int32)
            nisa.memset(lists, 0)
            for u in range(PAIR):
                own = lists[LANE * u : LANE * u + 1, :]
                fetch(own, self.lists[u : u + 1, first : first + some])
            self.numbers.spread(lists, LANE, first)


class Lists(nl.NKIObject):
    """The pair whose lists are in the making.

    Attributes:
        ones: [128, pair, LANES] bfloat16, 1 in a tile's column. masks: of each tile.
        lists: two buffers of lists of a lane's blocks, in every LANEth row, and how many they are.
        ends: [LANES, 1] int32, where they begin. none: empty lists, in HBM.
        eights, tokens: [128, GROUPS_OF_ROWS] int32: 8, and the token that a lane's row begins with.
    """

    def __init__(self, geometry, constants, lane, scores, dtype):
        self.geometry, self.constants, self.lane, self.scores = geometry, constants, lane, scores
        self.ones = sbuf((128, PAIR, LANES), nl.bfloat16)
        nisa.memset(self.ones, 0.0)
        for u in range(PAIR):
            nisa.memset(self.ones[:, u, LANE * u], 1.0)
        self.masks = [[], []]
        self.lists = []
        for _ in range(2):
            self.lists.append(sbuf((LANES, scores.width + 1), nl.int32))
            nisa.memset(self.lists[-1], 0)
        self.ends = sbuf((LANES, 1), nl.int32)
        places = geometry.padded + scores.width
        self.none = nl.ndarray((PAIR, places), dtype=nl.int32, buffer=nl.private_hbm)
        for first in range(0, places, scores.width):
            zeros = self.lists[0][0:PAIR, 0 : scores.width]
            nisa.dma_copy(self.none[:, first : first + scores.width], zeros)
        self.eights = sbuf((KEYS, GROUPS_OF_ROWS), nl.int32)
        nisa.memset(self.eights, TOKENS)
        self.tokens = sbuf((KEYS, GROUPS_OF_ROWS), nl.int32)
        tokens = constants.lane_token.broadcast(1, GROUPS_OF_ROWS)
        nisa.tensor_copy(self.tokens, tokens, engine=nisa.engine.vector)
        unused = nl.ndarray((1, 1), dtype=dtype, buffer=nl.private_hbm)
        self.choice = Choice(geometry, constants, unused, [])
        taken = sbuf((128, 1), nl.float32)
        nisa.memset(taken, TAKEN)
        self.choice.taken.append(taken)

    def steps_of(self, works, others):
        """(jobs to wait before, whose, name, of what) of the steps that list what a pair chose, and
        of `others`, which VectorE does while it waits for these."""
        long = passes(self.scores.width)
        found = [(0, self, "limit", works)]
        if self.scores.width > MOST_AT_ONCE:
            found += others
            for work in works:
                if work.tile.u > 0:
                    found.append((0, self, "collect", work))
                found.append((5, self, "settle", work))
                for name, wait in self.choice.steps_to_mark(work):
                    found.append((wait, self.choice, name, work))
                found.append((5 + 2 * long, self, "turn", work))
        else:
            found += self.steps_in_turn(works, others)
        found.append((4, self, "unite", works))
        return found

    def steps_in_turn(self, works, others):
        """Those of both tiles' masks, in turn, so that no engine waits for another."""
        long, found = passes(self.scores.width), []
        first, second = works
        for work in works:
            found.append((10 if work.tile.u == 0 else 1 + long, self, "settle", work))
        for name, _ in self.choice.steps_to_mark(first):
            found.append((WAITS[name] + long, self.choice, name, first))
            found.append((2 + long, self.choice, name, second))
            if name == "gather":
                found += others
        found.append((5 + 2 * long, self, "turn", first))
        found.append((2 + long, self, "turn", second))
        return found

    def limit(self, works):
        self.scores.reach(self.near)

    def begin(self, works):
        """Scores from HBM, as many as there is room for."""
        for work in works:
            if work.tile.u == 0 or self.scores.width <= MOST_AT_ONCE:
                self.collect(work)

    def collect(self, work):
        work.scores, work.before = self.scores.collect(self.scratch, work.tile.u)

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
            nisa.tensor_copy(by_lane[:, first : first + some], bank, engine=nisa.engine.scalar)
        u, pieces = work.tile.u, CHUNKS * count
        target = self.chosen.turned[u].reshape_dim(0, (pieces, PIECE)).permute((1, 0, 2))
        nisa.dma_copy(target, rows.reshape((PIECE, pieces, QUERIES)))
        self.masks[u] = mask

    def unite(self, works):
        """Makes the lists, of a lane's blocks after the other's, each begun where the one before
        ends; a list's zeros are behind all of it."""
        width, chosen = self.scores.width, self.chosen
        nisa.memset(self.ends, 0, engine=nisa.engine.gpsimd)
        fetch(chosen.lists, self.none, "g")
        for c in range(CHUNKS):
            own = slice(QUERIES * c, QUERIES * (c + 1))
            unions, lists = sbuf((LANES, width), nl.float32), self.lists[c % len(self.lists)]
            for first, some in spans(width, BANK):
                counts = psum((LANES, some))
                for u in range(PAIR):
                    nisa.nc_matmul(
                        counts, self.ones[own, u, :], self.masks[u][own, first : first + some],
                        accumulate=u > 0, tile_position=(QUERIES * c, 0),
                        tile_size=(QUERIES, LANES),
                    )  # fmt: skip
                into = unions[:, first : first + some]
                nisa.tensor_copy(into, counts, engine=nisa.engine.scalar)
            nisa.nonzero_with_count(lists, unions, index_offset=c * width, padding_val=0)
            for u in range(PAIR):
                end = self.ends[LANE * u : LANE * u + 1, :]
                into = chosen.lists[u : u + 1, :].ap(
                    [[1, 1], [1, width]], scalar_offset=end, indirect_dim=1
                )
                fetch(into, lists[LANE * u : LANE * u + 1, 0:width], "g")
            count = lists[:, width : width + 1]
            nisa.tensor_tensor(self.ends, self.ends, count, nl.add, engine=nisa.engine.gpsimd)
        for u in range(PAIR):
            fetch(chosen.ends[u : u + 1, :], self.ends[LANE * u : LANE * u + 1, :], "g")

    def gather(self, buffers):
        """The first blocks of each tile's list, as rows, and what hides them; buffers: a list of
        each tile. All of it by GpSimd, for which the others do not wait."""
        chosen = self.chosen
        fetch(chosen.counts, chosen.ends.permute((1, 0)), "g")
        for u in range(PAIR):
            listed = chosen.lists[u, 0:LISTED]
            places, rows = sbuf((LISTED, 1), nl.int32), sbuf((KEYS, GROUPS_OF_ROWS), nl.int32)
            fetch(places, listed.expand_dim(1), "g")
            by_lane = listed.reshape_dim(0, (GROUPS_OF_ROWS, AT_ONCE)).permute((1, 0))
            by_lane = by_lane.expand_dim(1).broadcast(1, TOKENS)
            fetch(rows, by_lane, "g")
            nisa.tensor_tensor(rows, rows, self.eights, nl.multiply, engine=nisa.engine.gpsimd)
            nisa.tensor_tensor(rows, rows, self.tokens, nl.add, engine=nisa.engine.gpsimd)
            nisa.dma_copy(chosen.hidden[u], chosen.turned[u].vector_select(0, places))
            for group in range(GROUPS_OF_ROWS):
                row = rows[:, group : group + 1]
                nisa.dma_copy(buffers[u][group], self.lane.rows.vector_select(0, row))


class Masked(nl.NKIObject):
    """What `choose.hide` takes."""

    def __init__(self, hidden):
        self.hidden = hidden


def hide_in(hidden):
    """Turns masks into what they add to logits."""
    hide(Masked(hidden))
