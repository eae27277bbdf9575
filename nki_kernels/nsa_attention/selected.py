"""The selected branch: the listed blocks of a tile of queries, gathered as pages.

A page is one block's K^T and V, [128, 64 + max(64, DV + 1)]: K^T's first 128 rows in 64 columns;
then [V | 1] on one half of the partitions and the rest of K^T on the other. Two tables hold them,
V on the lower or on the upper half, so that two blocks side by side fill the 128 rows of S^T.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.queues import fetch
from nki_kernels.nsa_attention.constants import keep_where
from nki_kernels.nsa_attention.geometry import AT_ONCE, BLOCK, QUADRANT, TOKENS
from nki_kernels.nsa_attention.rows import turned_rows
from nki_kernels.nsa_attention.work import SELECTED

EARLY = 2


class Selected(nl.NKIObject):
    """The selected branch of all tiles.

    Attributes:
        pages: two buffers of gathered pages, [128, places, columns], used in turn.
        early, copies: jobs between the transposes of gathered rows and their first use; the engine
            that takes half of them from PSUM.
        rows: two lists of buffers of gathered rows, [128, TOKENS, columns], see `rows`.
    """

    def __init__(self, geometry, constants, lane, scale, works):
        self.geometry, self.constants, self.lane, self.scale = geometry, constants, lane, scale
        self.dv = lane.v_win.shape[1] - 1
        paged, groups = 0, 0
        for work in works:
            paged, groups = max(paged, work.tile.paged), max(groups, work.tile.groups)
        self.early, self.copies = EARLY, nisa.engine.vector
        self.pages, self.rows = [], []
        for _ in range(2):
            self.pages.append(sbuf((128, paged, lane.pages.shape[3]), lane.pages.dtype))
            some = []
            for _ in range(groups):
                some.append(sbuf((128, TOKENS, lane.rows.shape[2]), lane.rows.dtype))
            self.rows.append(some)

    def pairs(self, tile):
        """Pairs of blocks that come as pages."""
        return (tile.paged + 1) // 2

    def count(self, tile):
        """Tiles of up to 128 keys."""
        return self.pairs(tile) + TOKENS * tile.groups

    def steps_of(self, tile):
        """(name, n) of what gathers a tile's list, in order."""
        found = []
        paged = tile.listed - AT_ONCE * tile.groups
        for n in range(paged):
            found.append(("gather_page", n))
        if tile.groups > 0:
            early = [("name_rows", 0), ("number_rows", 0)]
            for group in range(tile.groups):
                early.append(("gather_rows", group))
            found = early + found
        return found

    def gather_known(self, work):
        """The pages of a tile at known addresses."""
        buffer, tile = self.pages[work.index % 2], work.tile
        for slot in range(len(tile.taken)):
            nisa.dma_copy(buffer[:, slot, :], self.lane.pages[slot % 2, tile.taken[slot]])

    def gather_page(self, work, n, queue):
        """Page n of a tile's list, by a queue of `common.queues`."""
        slot = len(work.tile.taken) + n
        page = self.lane.pages[slot % 2].select(0, work.page_numbers[0:1, n : n + 1])
        target = self.pages[work.index % 2][:, slot, :]
        fetch(target, page, queue)

    def name_rows(self, work, n, queue):
        """The list as numbers that PE takes."""
        work.names = sbuf(work.places.shape, nl.float32)
        nisa.tensor_copy(work.names, work.places, engine=nisa.engine.vector)

    def number_rows(self, work, n, queue):
        """The rows of all groups, `row_numbers` [128, groups] int32."""
        tile = work.tile
        blocks = psum((128, tile.groups))
        for group in range(tile.groups):
            lanes = self.constants.slot_lanes[0 : tile.slots, tile.paged // AT_ONCE + group, :]
            nisa.nc_matmul(blocks[:, group : group + 1], lanes, work.names, accumulate=False)
        work.row_numbers = sbuf(blocks.shape, nl.int32)
        self.constants.number_rows(work.row_numbers, blocks)

    def gather_rows(self, work, n, queue):
        """The rows of group n, by GpSimd."""
        rows = self.lane.rows.vector_select(0, work.row_numbers[:, n : n + 1])
        nisa.dma_copy(self.rows[work.index % 2][n], rows)

    def weigh(self, work, x):
        """P^T of a tile of keys, bfloat16 [64 or 128, columns]."""
        tile, pairs = work.tile, self.pairs(work.tile)
        if x == 0:
            work.turned = []
        for group in range(tile.groups):
            if x == max(0, pairs + TOKENS * group - self.early):
                buffer = self.rows[work.index % 2][group]
                low, wide = work.q[0].shape[0], len(work.q) > 1
                work.turned.append(turned_rows(buffer, low, wide, self.copies))
        scores = self.of_pair(work, x) if x < pairs else self.of_rows(work, x - pairs)
        weights = self.exponentials(work, scores)
        if x == 0:  # the tile's own block
            ahead = tile.own * BLOCK - tile.t0
            keep_where(weights[0:BLOCK, :], self.constants.near, nl.greater_equal, ahead)
        return weights

    def exponentials(self, work, scores):
        """P^T of S^T."""
        weights = sbuf(scores.shape, work.q[0].dtype)
        bias = work.shifts[0 : scores.shape[0], SELECTED : SELECTED + 1]
        nisa.activation(weights, nl.exp, scores, bias=bias, scale=self.scale)
        return weights

    def of_pair(self, work, x):
        """S^T of a pair of pages."""
        tile, buffer = work.tile, self.pages[work.index % 2]
        first = 2 * x
        many = min(2, tile.paged - first)
        scores = psum((BLOCK * many, self.geometry.columns))
        masked = first + many > len(tile.taken)
        if masked:
            self.hide(scores, work, first, self.constants.slot_keys[:, x, 0 : scores.shape[0]])
        low = work.q[0].shape[0]
        k_t = buffer[0:low, first : first + many, 0:BLOCK]
        nisa.nc_matmul(scores, k_t, work.q[0], accumulate=masked)
        if len(work.q) > 1:
            width = work.rest
            for h in range(many):
                p0 = BLOCK * (1 - h)
                nisa.nc_matmul(
                    scores[BLOCK * h : BLOCK * (h + 1), :],
                    buffer[p0 : p0 + width, first + h, BLOCK : 2 * BLOCK],
                    work.q[1][p0 : p0 + width, :],
                    accumulate=True,
                    tile_position=(p0, BLOCK * h),
                    tile_size=(BLOCK, BLOCK),
                )
        return scores

    def of_rows(self, work, n):
        """S^T of the tokens of gathered rows that are the same in all rows of a group."""
        group, t = divmod(n, TOKENS)
        lower, upper = work.turned[group]
        scores = psum((128, self.geometry.columns))
        first = work.tile.rows_from + AT_ONCE * group
        lanes = self.constants.slot_rows[:, first % QUADRANT // AT_ONCE, :]
        self.hide(scores, work, first, lanes)
        nisa.nc_matmul(scores, lower[:, t, :], work.q[0], accumulate=True)
        for rest in upper:
            p0 = BLOCK * (t % 2)
            channels = slice(p0, p0 + work.rest)
            nisa.nc_matmul(
                scores, rest[channels, t // 2, :], work.q[1][channels, :], accumulate=True,
                tile_position=(p0, 0), tile_size=(BLOCK, 128),
            )  # fmt: skip
        return scores

    def hide(self, scores, work, slot, keys):
        """Starts S^T with what hides blocks from the queries that did not choose them; slot: one of
        the blocks'; keys: [slots, keys], where each block's keys are."""
        p0 = slot // QUADRANT * QUADRANT
        p1 = min(p0 + QUADRANT, work.hidden.shape[0])
        nisa.nc_matmul(
            scores,
            keys[p0:p1, :],
            work.hidden[p0:p1, :].expand_dim(2).broadcast(2, self.geometry.group),
            accumulate=False,
            tile_position=(p0, 0),
            tile_size=(QUADRANT, 128),
        )

    def add(self, work, x, weights):
        """Adds a tile of keys to P @ [v | 1]."""
        g, pairs = self.geometry, self.pairs(work.tile)
        if x == 0:
            work.open(g, self.constants.zeros, self.dv)
        if x >= pairs:
            group, t = divmod(x - pairs, TOKENS)
            self.add_rows(work, self.rows[work.index % 2][group], t, weights)
            return
        buffer = self.pages[work.index % 2]
        for h in range(weights.shape[0] // BLOCK):
            p0 = BLOCK * h
            values = buffer[p0 : p0 + BLOCK, 2 * x + h, BLOCK : BLOCK + self.dv + 1]
            for p in range(g.parts):
                nisa.nc_matmul(
                    work.bank(p),
                    weights[p0 : p0 + BLOCK, p * g.rows : (p + 1) * g.rows],
                    values,
                    accumulate=True,
                    tile_position=(p0, 0),
                    tile_size=(BLOCK, 128),
                )

    def add_rows(self, work, buffer, t, weights):
        """The same of gathered rows' tokens t."""
        g = self.geometry
        values = buffer[:, t, buffer.shape[2] - self.dv - 1 :]
        for p in range(g.parts):
            columns = weights[:, p * g.rows : (p + 1) * g.rows]
            nisa.nc_matmul(work.bank(p), columns, values, accumulate=True)
