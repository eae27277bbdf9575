"""From shares to masks: the best blocks of each query of a tile.

VectorE has 128 lanes and a tile 32 queries, so blocks are cut in four chunks of `tile.width` and
lane 32 * c + q holds chunk c of query q. Each lane finds its best; of these, query by query, the
best of all; then each lane marks as many of its own as were taken. Blocks are taken in the order of
their scores, equal ones by number, as one search of all blocks would.

Forced blocks have fixed places in every list, so they are not ranked; so block 0 is never listed,
and stands for the end of a list: no query's mask has it.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.nsa_attention.geometry import CHUNKS, PIECE, QUERIES

LANES = 8  # what max8 finds at once
BANK = 512  # float32 of a bank of PSUM
# Scores are >= 0. Below, so that none is mistaken for another:
FORCED = -1.0
TAKEN = -8.0
NOTHING = -9.0
HIDDEN = 3.0e38


class Choice(nl.NKIObject):
    """Attributes:
    turned: [tiles, blocks, 32] in HBM, the masks of tiles, a block per row.
    unions: see `unite.Unions`, which learns what each tile chose.
    selectors: [rows, parts, 32] float32. places: [128, most chosen] float32, 0, 1, 2, ...
    nothing: [128, 32], masks of blocks that nobody chose.
    taken: [128, 1] float32, TAKEN, where GpSimd makes masks of marks; a list that is empty if not.
    """

    def __init__(self, geometry, constants, turned, unions):
        self.geometry, self.constants = geometry, constants
        self.turned, self.unions = turned, unions
        self.taken = []
        self.selectors = []
        for _ in range(2):
            selector = sbuf((geometry.rows, geometry.parts, QUERIES), nl.float32)
            nisa.memset(selector, 0.0)
            self.selectors.append(selector)
        self.nothing = sbuf((PIECE, QUERIES), turned.dtype)
        nisa.memset(self.nothing, 0.0)
        self.places = sbuf((128, max(LANES, geometry.count + LANES)), nl.float32)
        nisa.iota(self.places, [[1, self.places.shape[1]]], offset=0, channel_multiplier=0)

    def steps_of(self, work):
        """(name, jobs to wait before) of the steps that mark what a tile's queries chose."""
        rounds = (work.tile.chosen + LANES - 1) // LANES
        long = passes(work.tile.width)
        found = [("weigh", 1), ("sum", 2 + long), *self.steps_to_mark(work)]
        found.append(("turn", 2 + (rounds + 1) * long))
        return found

    def steps_to_mark(self, work):
        """Those between scores and `mask`."""
        rounds = (work.tile.chosen + LANES - 1) // LANES
        long, found = passes(work.tile.width), []
        for r in range(rounds):
            found.append(("best", 1 + (2 * long if r > 0 else long)))
        found.append(("gather", 1 + long))
        for name, wait in (("merge", 1), ("spread", 1 + long), ("mark", 1)):
            found.append((name, wait))
        return found

    def weigh(self, work):
        """`selector` [rows, parts, 32]: of each row 1 / its sum, in its query's column."""
        g = self.geometry
        selector = self.selectors[work.index % 2]
        for p in range(g.parts):
            inverse = work.inverse[:, p : p + 1]
            into = selector[:, p, p * g.per_part : (p + 1) * g.per_part]
            nisa.tensor_scalar(into, self.constants.heads, nl.multiply, inverse)

    def sum(self, work):
        """`ranking`: scores of the blocks that a query may choose, float32 [128, width]."""
        g, tile = self.geometry, work.tile
        selector = self.selectors[work.index % 2]
        scores = sbuf((128, tile.width), nl.float32)
        for start in range(0, tile.width, BANK):
            some = min(BANK, tile.width - start)
            sums = psum((128, some))
            ends = []
            for c in range(CHUNKS):
                first = c * tile.width + start
                ends.append(min(some, max(0, tile.known - first)))
                for at in range(0, ends[c], PIECE):
                    for p in range(g.parts):
                        length = min(PIECE, ends[c] - at)
                        nisa.nc_matmul(
                            sums[QUERIES * c : QUERIES * (c + 1), at : at + length],
                            selector[:, p, :],
                            work.shares_of(p, (first + at) // PIECE, length),
                            accumulate=p > 0,
                            tile_position=(0, QUERIES * c),
                            tile_size=(max(32, g.rows), QUERIES),
                        )
            full = 0
            while full < CHUNKS - 1 and ends[full] == some:
                full += 1
            for c, many in ((0, full), (full, 1)):  # whole chunks, and the last one
                length = ends[c]
                if many > 0 and length > 0:
                    lanes = slice(QUERIES * c, QUERIES * (c + many))
                    into = scores[lanes, start : start + length]
                    nisa.tensor_copy(into, sums[lanes, 0:length], engine=nisa.engine.vector)
        self.exclude(scores, tile)
        work.ranking, work.left = scores, scores
        work.tops = sbuf((128, (tile.chosen + LANES - 1) // LANES * LANES), nl.float32)
        work.searched = 0

    def exclude(self, scores, tile):
        """Blocks that no query of a tile may choose: forced ones, and those behind its own."""
        width, g = tile.width, self.geometry
        nisa.memset(scores[0:QUERIES, 0 : g.initial], FORCED, engine=nisa.engine.vector)
        chunk, column = divmod(tile.own - g.local + 1, width)
        for c in range(chunk, CHUNKS):
            lanes = scores[QUERIES * c : QUERIES * (c + 1), column if c == chunk else 0 : width]
            nisa.memset(lanes, FORCED, engine=nisa.engine.vector)

    def best(self, work):
        """The next eight best scores of each lane, into `tops`."""
        top = work.tops[:, work.searched : work.searched + LANES]
        nisa.max8(top, work.left)
        work.searched += LANES
        if work.searched < work.tops.shape[1]:
            following = sbuf(work.left.shape, nl.float32)
            nisa.nc_match_replace8(following, work.left, top, TAKEN)
            work.left = following

    def gather(self, work):
        """The best of a query's lanes side by side, [32, chunks * most chosen] in PSUM."""
        many = work.tops.shape[1]
        work.gathered = psum((QUERIES, CHUNKS * many))
        for c in range(CHUNKS):
            lanes = slice(QUERIES * c, QUERIES * (c + 1))
            nisa.nc_matmul(
                work.gathered[:, c * many : (c + 1) * many],
                self.constants.same[lanes, :],
                work.tops[lanes, :],
                accumulate=False,
                tile_position=(QUERIES * c, 0),
                tile_size=(QUERIES, QUERIES),
            )

    def merge(self, work):
        """How many of each lane's best are among its query's best, `numbers` [32, chunks]."""
        many = work.tops.shape[1]
        current = sbuf((QUERIES, CHUNKS * many), nl.float32)
        nisa.tensor_copy(current, work.gathered, engine=nisa.engine.vector)
        for first in range(0, work.tile.chosen, LANES):
            top = sbuf((QUERIES, LANES), nl.float32)
            nisa.max8(top, current)
            if work.tile.chosen - first < LANES:
                beyond = top[:, work.tile.chosen - first : LANES]
                nisa.memset(beyond, NOTHING, engine=nisa.engine.vector)
            following = sbuf(current.shape, nl.float32)
            nisa.nc_match_replace8(following, current, top, TAKEN)
            current = following
        taken = sbuf(current.shape, nl.float32)
        nisa.tensor_scalar(taken, current, nl.equal, TAKEN)
        work.numbers = sbuf((QUERIES, CHUNKS), nl.float32)
        nisa.tensor_reduce(work.numbers, nl.add, taken.reshape((QUERIES, CHUNKS, many)), axis=2)

    def spread(self, work):
        """`numbers` with a lane per row, [128, 1] in PSUM."""
        work.by_lane = psum((128, 1))
        for c in range(CHUNKS):
            nisa.nc_matmul(
                work.by_lane[QUERIES * c : QUERIES * (c + 1), :],
                self.constants.same[0:QUERIES, :],
                work.numbers[:, c : c + 1],
                accumulate=False,
                tile_position=(0, QUERIES * c),
                tile_size=(QUERIES, QUERIES),
            )

    def mark(self, work):
        """`mask` [128, width]: 1 where a query chose a block."""
        many = work.tops.shape[1]
        number = sbuf((128, 1), nl.float32)
        nisa.tensor_copy(number, work.by_lane, engine=nisa.engine.vector)
        values, others = sbuf((128, many), nl.float32), sbuf((128, many), nl.float32)
        places = self.places[:, 0:many]
        nisa.scalar_tensor_tensor(values, places, nl.less, number, nl.multiply, work.tops)
        nisa.tensor_scalar(
            others, places, nl.greater_equal, number, op1=nl.multiply, operand1=NOTHING
        )
        nisa.tensor_tensor(values, values, others, nl.add)
        current = work.ranking
        for first in range(0, many, LANES):
            following = sbuf(current.shape, nl.float32)
            nisa.nc_match_replace8(following, current, values[:, first : first + LANES], TAKEN)
            current = following
        work.mask = sbuf(current.shape, self.turned.dtype)
        for taken in self.taken:
            every = taken.broadcast(1, current.shape[1])
            nisa.tensor_tensor(work.mask, current, every, nl.equal, engine=nisa.engine.gpsimd)
        if len(self.taken) == 0:
            nisa.tensor_scalar(work.mask, current, nl.equal, TAKEN)

    def turn(self, work):
        """Writes a tile's mask to HBM with a block per row, and what it has to its union."""
        mask, width = work.mask, work.tile.width
        place = self.turned[work.tile.number]
        count = width // PIECE
        rows = sbuf((PIECE, count, CHUNKS, QUERIES), mask.dtype)
        for first in range(0, count, CHUNKS):
            some = min(CHUNKS, count - first)
            bank = psum((PIECE, some, 128), mask.dtype)
            for i in range(some):
                blocks = mask[:, (first + i) * PIECE : (first + i + 1) * PIECE]
                nisa.nc_transpose(bank[:, i, :], blocks, engine=nisa.engine.tensor)
            into = rows[:, first : first + some].reshape((PIECE, some, 128))
            nisa.tensor_copy(into, bank, engine=nisa.engine.vector)
        target = place[0 : CHUNKS * width, :].reshape_dim(0, (CHUNKS, count, PIECE))
        nisa.dma_copy(target.permute((2, 1, 0, 3)), rows)
        pieces = place.shape[0] // PIECE - CHUNKS * count
        if work.tile.crowded and pieces > 0:  # `crowded` reads all blocks, whichever tile's
            rest = place[CHUNKS * width :, :].reshape_dim(0, (pieces, PIECE)).permute((1, 0, 2))
            nisa.dma_copy(rest, self.nothing.expand_dim(1).broadcast(1, pieces))
        self.unions.learn(work, rows)


def passes(width):
    """Jobs in which VectorE has the time for one more pass over so many elements."""
    return width // 320


def hide(work):
    """What a mask adds to logits: 0 where it is 1, else so much that nothing is left."""
    hidden = work.hidden
    nisa.tensor_scalar(hidden, hidden, nl.subtract, 1.0, op1=nl.multiply, operand1=HIDDEN)
