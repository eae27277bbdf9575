"""From scores to lists: the best blocks of each query, and their union over a tile of queries.

Forced blocks have fixed places in every list, so they are neither ranked nor listed here; so block
0 is never listed, and stands for the end of a list: no query's mask has it.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.nsa_attention.geometry import QUERIES

LANES = 8  # what max8 finds at once
GROUP = 4  # tiles of queries whose unions are made together
BANK = 512
# Scores are >= 0. Below, so that none is mistaken for another:
FORCED = -1.0
TAKEN = -8.0
NOTHING = -9.0
HIDDEN = 3.0e38


class Choice(nl.NKIObject):
    """Attributes:
    masks: [ranks, blocks], 1 where a query chose a block that is not forced; of the last tiles.
    filled: how many blocks of each are not surely 0. selectors: [rows, parts, 32] float32.
    turned: [tiles, blocks, 32] in HBM, the masks of some tiles, a block per row.
    lists: [tiles, slots] int32 in HBM, descending; behind the last place, the next block if any.
    ready: places in the order of work before which lists are made.
    """

    def __init__(self, geometry, constants, turned, lists):
        self.geometry, self.constants = geometry, constants
        self.turned, self.lists = turned, lists
        self.masks, self.filled, self.selectors = [], [], []
        self.ready = 0
        for _ in range(GROUP):
            mask = sbuf((geometry.ranks, turned.shape[1]), turned.dtype)
            nisa.memset(mask, 0.0)
            self.masks.append(mask)
            self.filled.append(0)
        for _ in range(2):
            selector = sbuf((geometry.rows, geometry.parts, QUERIES), nl.float32)
            nisa.memset(selector, 0.0)
            self.selectors.append(selector)

    def steps_of(self, work):
        """(name, jobs to wait before) of the steps that mark what a tile's queries chose."""
        found = [("weigh", 1), ("sum", 3)]
        for _ in range((work.tile.chosen + LANES - 1) // LANES):
            found.append(("best", 2))
        found.append(("mark", 1))
        found.append(("turn", 5))
        return found

    def weigh(self, work):
        """`selector` [rows, parts, 32]: of each row 1 / its sum, in its query's column."""
        g = self.geometry
        selector = self.selectors[work.index % 2]
        for p in range(g.parts):
            inverse = work.inverse[:, p : p + 1]
            into = selector[:, p, 0 : g.per_part]
            nisa.tensor_scalar(into, self.constants.heads, nl.multiply, inverse)

    def sum(self, work):
        """`ranking`: scores of the blocks that a query may choose, float32 [ranks, blocks]."""
        g, tile = self.geometry, work.tile
        selector = self.selectors[work.index % 2]
        width = max(LANES, tile.blocks)
        scores = sbuf((g.ranks, width), nl.float32)
        _, _, tiles, blocks = work.scores.shape
        by_part = work.scores.reshape((g.rows, g.parts, tiles * blocks))
        known = min(tile.blocks, tiles * blocks)
        for start in range(0, known, BANK):
            some = min(BANK, known - start)
            sums = psum((g.ranks, some))
            for p in range(g.parts):
                nisa.nc_matmul(
                    sums[QUERIES * p : QUERIES * (p + 1), :],
                    selector[:, p, :],
                    by_part[:, p, start : start + some],
                    accumulate=False,
                    tile_position=(0, QUERIES * p),
                    tile_size=(max(32, g.rows), QUERIES),
                )
            nisa.tensor_copy(scores[:, start : start + some], sums, engine=nisa.engine.vector)
        nisa.memset(scores[:, 0 : g.initial], FORCED, engine=nisa.engine.vector)
        nisa.memset(scores[:, tile.own - g.local + 1 :], FORCED, engine=nisa.engine.vector)
        work.ranking, work.left = scores, tile.chosen

    def best(self, work):
        """Marks the eight best scores that are left, the lowest block of equal ones."""
        top = sbuf((work.ranking.shape[0], LANES), nl.float32)
        nisa.max8(top, work.ranking)
        if work.left < LANES:
            nisa.memset(top[:, work.left : LANES], NOTHING, engine=nisa.engine.vector)
        following = sbuf(work.ranking.shape, nl.float32)
        nisa.nc_match_replace8(following, work.ranking, top, TAKEN)
        work.ranking = following
        work.left -= LANES

    def mark(self, work):
        """The mask of a tile."""
        at, blocks = work.index % GROUP, work.tile.blocks
        mask = self.masks[at]
        nisa.tensor_scalar(mask[:, 0:blocks], work.ranking[:, 0:blocks], nl.equal, TAKEN)
        if self.filled[at] > blocks:
            nisa.memset(mask[:, blocks : self.filled[at]], 0.0, engine=nisa.engine.vector)
        self.filled[at] = blocks

    def turn(self, work):
        """Writes a tile's mask to HBM with a block per row."""
        g, mask = self.geometry, self.masks[work.index % GROUP]
        place = self.turned[work.index % self.turned.shape[0]]
        count = (work.tile.blocks + 127) // 128
        rows = sbuf((128, count, QUERIES), mask.dtype)
        for first in range(0, count, GROUP):
            some = min(GROUP, count - first)
            bank = psum((128, some, g.ranks), mask.dtype)
            for i in range(some):
                blocks = mask[:, (first + i) * 128 : (first + i + 1) * 128]
                nisa.nc_transpose(bank[:, i, :], blocks, engine=nisa.engine.tensor)
            by_part = bank.reshape((128, some, g.parts, QUERIES))[:, :, :, 0 : g.per_part]
            into = rows[:, first : first + some, :]
            into = into.reshape_dim(2, (g.parts, g.per_part))
            nisa.tensor_copy(into, by_part, engine=nisa.engine.vector)
        target = place[0 : 128 * count, :].reshape_dim(0, (count, 128))
        nisa.dma_copy(target.permute((1, 0, 2)), rows)

    def union_steps(self, works):
        """(name, jobs to wait before) of the steps that list the blocks of up to GROUP tiles."""
        ranked = 0
        for work in works:
            if work.tile.ranked:
                ranked += 1
        if ranked == 0:
            return [("store", 0)]
        found = [("unite", 1)]
        for _ in range(0, self.lists.shape[1], LANES):
            found.append(("list", 2))
        found.append(("store", 1))
        return found

    def unite(self, union):
        """`names`: 1 + block where some query of a tile chose it, else 0, [tiles, blocks]."""
        ranked, blocks = [], LANES
        for a in range(len(union.works)):
            if union.works[a].tile.ranked:
                ranked.append(a)
                blocks = max(blocks, union.works[a].tile.blocks)
        union.ranked = ranked
        union.names = sbuf((GROUP, blocks), nl.float32)
        nisa.iota(union.names, [[1, blocks]], offset=1, channel_multiplier=0)
        for start in range(0, blocks, BANK):
            some = min(BANK, blocks - start)
            counts = psum((GROUP, some))
            for a in ranked:
                mask = self.masks[union.works[a].index % GROUP]
                nisa.nc_matmul(
                    counts,
                    self.constants.member[:, a, :],
                    mask[:, start : start + some],
                    accumulate=a > ranked[0],
                    tile_position=(0, 0),
                    tile_size=(self.geometry.ranks, QUERIES),
                )
            into = union.names[:, start : start + some]
            nisa.scalar_tensor_tensor(into, counts, nl.greater, 0.0, nl.multiply, into)
        slots = self.lists.shape[1]
        union.found = sbuf((GROUP, (slots + LANES - 1) // LANES * LANES), nl.float32)

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
        """A tile's list: `page_numbers` [1, listed], and the masks of its blocks, `hidden`."""
        tile = work.tile
        row = self.lists[tile.number : tile.number + 1, 0 : tile.listed]
        work.page_numbers = sbuf((1, tile.listed), nl.int32)
        nisa.dma_copy(work.page_numbers, row)
        first = len(tile.taken)
        places = sbuf((tile.listed, 1), nl.int32)
        nisa.dma_copy(places, row.reshape((tile.listed, 1)))
        work.hidden = sbuf((tile.slots, QUERIES), self.turned.dtype)
        nisa.memset(work.hidden, 1.0)
        turned = self.turned[work.index % self.turned.shape[0]]
        nisa.dma_copy(work.hidden[first : tile.slots, :], turned.vector_select(0, places))


class Union(nl.NKIObject):
    """Up to GROUP tiles whose lists are in the making; see `Choice.unite`."""

    def __init__(self, works):
        self.works = works
        self.listed = 0


def hide(work):
    """What a mask adds to logits: 0 where it is 1, else so much that nothing is left."""
    hidden = work.hidden
    nisa.tensor_scalar(hidden, hidden, nl.subtract, 1.0, op1=nl.multiply, operand1=HIDDEN)
