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
from nki_kernels.nsa_attention.geometry import BLOCK
from nki_kernels.nsa_attention.work import SELECTED

QUADRANT = 32


class Selected(nl.NKIObject):
    """Two buffers of gathered pages, [128, slots, width], used in turn."""

    def __init__(self, geometry, constants, lane, scale):
        self.geometry, self.constants, self.lane, self.scale = geometry, constants, lane, scale
        self.dv = lane.v_win.shape[1] - 1
        self.buffers = []
        for _ in range(2):
            shape = (128, geometry.slots, lane.pages.shape[3])
            self.buffers.append(sbuf(shape, lane.pages.dtype))

    def count(self, tile):
        """Pairs of blocks."""
        return (tile.slots + 1) // 2

    def gather_known(self, work):
        """The pages of a tile at known addresses."""
        buffer, tile = self.buffers[work.index % 2], work.tile
        for slot in range(len(tile.taken)):
            nisa.dma_copy(buffer[:, slot, :], self.lane.pages[slot % 2, tile.taken[slot]])

    def gather(self, work, n, queue):
        """Page n of a tile's list, by a queue of `common.queues`."""
        slot = len(work.tile.taken) + n
        page = self.lane.pages[slot % 2].select(0, work.page_numbers[0:1, n : n + 1])
        target = self.buffers[work.index % 2][:, slot, :]
        fetch(target, page, queue)

    def weigh(self, work, x):
        """P^T of a pair of blocks, bfloat16 [64 or 128, columns]."""
        tile, buffer = work.tile, self.buffers[work.index % 2]
        first = 2 * x
        many = min(2, tile.slots - first)
        scores = psum((BLOCK * many, self.geometry.columns))
        masked = first + many > len(tile.taken)
        if masked:
            self.hide(scores, work, x)
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
        weights = sbuf(scores.shape, work.q[0].dtype)
        bias = work.shifts[0 : BLOCK * many, SELECTED : SELECTED + 1]
        nisa.activation(weights, nl.exp, scores, bias=bias, scale=self.scale)
        if x == 0:  # the tile's own block
            ahead = tile.own * BLOCK - tile.t0
            keep_where(weights[0:BLOCK, :], self.constants.near, nl.greater_equal, ahead)
        return weights

    def hide(self, scores, work, x):
        """Starts S^T with what hides a pair's blocks from the queries that did not choose them."""
        p0 = 2 * x // QUADRANT * QUADRANT
        p1 = min(p0 + QUADRANT, work.hidden.shape[0])
        group = self.geometry.group
        nisa.nc_matmul(
            scores,
            self.constants.slot_keys[p0:p1, x, 0 : scores.shape[0]],
            work.hidden[p0:p1, :].expand_dim(2).broadcast(2, group),
            accumulate=False,
            tile_position=(p0, 0),
            tile_size=(QUADRANT, 128),
        )

    def add(self, work, x, weights):
        """Adds a pair of blocks to P @ [v | 1]."""
        g, buffer = self.geometry, self.buffers[work.index % 2]
        if x == 0:
            work.open(g, self.constants.zeros, self.dv)
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
