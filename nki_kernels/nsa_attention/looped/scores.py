"""Scores of blocks of a pair of tiles: shares, from HBM, summed over heads, and back."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.queues import fetch
from nki_kernels.nsa_attention.choose import FORCED, LANES
from nki_kernels.nsa_attention.geometry import (
    BLOCKS_OF_KEYS,
    CHUNKS,
    PIECE,
    QUERIES,
)
from nki_kernels.nsa_attention.looped.sizes import GRANULE, GRANULES, PAIR, SHARES

ALL = 1e30  # more than any score
WHOLE = GRANULE * BLOCKS_OF_KEYS  # blocks of a granule
EXTRA = WHOLE + GRANULE  # and what its tiles share in the blocks behind theirs


class Scratch(nl.NKIObject):
    """HBM of a pair: `shares`, [chunks + 1, rows, pair, parts, GRANULE, SHARES] for either half of
    a chunk, those of the second half a place further; `sums` [chunks, 128, EXTRA], lane
    32 * (pair * half + tile) + query."""

    def __init__(self, geometry, chunks):
        g = geometry
        shape = (g.rows, PAIR, g.parts, GRANULE, SHARES)
        self.shares = []
        for _ in range(GRANULES):
            shares = nl.ndarray((chunks + 1, *shape), dtype=nl.float32, buffer=nl.private_hbm)
            self.shares.append(shares)
        self.sums = nl.ndarray((chunks, 128, EXTRA), dtype=nl.float32, buffer=nl.private_hbm)

    def clear(self):
        """Nothing is read before it is written."""
        zeros = sbuf((128, 2048), nl.float32)
        nisa.memset(zeros, 0.0)
        for shares in self.shares:
            rows = shares.shape[1]
            flat = shares.reshape((shares.shape[0], rows, shares.size // shares.shape[0] // rows))
            clear(flat, zeros)
        clear(self.sums, zeros)


def clear(tensor, zeros):
    """Writes zeros to [n, rows, columns] in HBM."""
    count, rows, columns = tensor.shape
    some = max(1, zeros.shape[1] // columns)
    for first in range(0, count, some):
        part = tensor[first : min(first + some, count)].permute((1, 0, 2))
        source = zeros[0:rows, 0 : part.shape[1] * columns]
        nisa.dma_copy(part, source.reshape((rows, part.shape[1], columns)))


class Scores(nl.NKIObject):
    """The pair whose shares are in HBM.

    Attributes:
        selectors: [rows, parts, 32] float32 of each tile: 1 / a row's sum in its query's column.
        scratch: of that pair.
    """

    def __init__(self, geometry, constants):
        g = self.geometry = geometry
        self.constants = constants
        self.selectors, self.buffers = [], []
        for _ in range(PAIR):
            selector = sbuf((g.rows, g.parts, QUERIES), nl.float32)
            nisa.memset(selector, 0.0)
            self.selectors.append(selector)
            self.buffers.append(sbuf((g.rows, PAIR, g.parts, GRANULE, SHARES), nl.float32))
        self.width = g.padded // CHUNKS
        self.most, self.forced = sbuf((128, 1), nl.float32), sbuf((128, 1), nl.float32)
        nisa.memset(self.most, ALL)
        nisa.memset(self.forced, FORCED)

    def weigh(self, row_sums):
        """`selectors` of the next pair; row_sums: [rows, pair, parts]."""
        g = self.geometry
        inverse = sbuf(row_sums.shape, nl.float32)
        nisa.tensor_scalar(inverse, row_sums, nl.maximum, 1e-30)
        nisa.reciprocal(inverse, inverse)
        for u in range(PAIR):
            for p in range(g.parts):
                into = self.selectors[u][:, p, p * g.per_part : (p + 1) * g.per_part]
                scale = inverse[:, u, p : p + 1]
                nisa.tensor_scalar(into, self.constants.heads, nl.multiply, scale)

    def load(self, j):
        """Shares of chunk j."""
        first, second = self.scratch.shares
        fetch(self.buffers[0], first.select(0, j))
        fetch(self.buffers[1], second[1:].select(0, j))

    def sum(self, j):
        """Their sums over heads, to HBM."""
        g = self.geometry
        bank = psum((128, GRANULE, SHARES))
        for half in range(GRANULES):
            for u in range(PAIR):
                column = QUERIES * (PAIR * half + u)
                for p in range(g.parts):
                    nisa.nc_matmul(
                        bank[column : column + QUERIES, :, :],
                        self.selectors[u][:, p, :],
                        self.buffers[half][:, u, p, :, :],
                        accumulate=p > 0,
                        tile_position=(0, column),
                        tile_size=(max(32, g.rows), QUERIES),
                    )
        sums = sbuf((128, EXTRA), nl.float32)
        by_tile = sums[:, 0:WHOLE].reshape_dim(1, (GRANULE, BLOCKS_OF_KEYS))
        nisa.tensor_copy(by_tile, bank[:, :, 0:BLOCKS_OF_KEYS], engine=nisa.engine.vector)
        nisa.tensor_copy(
            sums[:, WHOLE:EXTRA], bank[:, :, BLOCKS_OF_KEYS], engine=nisa.engine.vector
        )
        fetch(self.scratch.sums.select(0, j), sums)

    def collect(self, scratch, u):
        """Scores of tile u of a pair, [128, width], from HBM, and what tiles of keys share in the
        first block of the next one, [128, tiles], whose first column is that of the lane before."""
        granules = self.width // PIECE
        by_pair = scratch.sums.reshape_dim(1, (GRANULES, PAIR, QUERIES))[:, :, u]
        by_granule = by_pair.flatten_dims(0, 1)
        scores = sbuf((128, granules, WHOLE), nl.float32)
        before = sbuf((128, 1 + granules * GRANULE), nl.float32)
        nisa.memset(before[0:QUERIES, 0:1], 0.0, engine=nisa.engine.vector)
        for c in range(CHUNKS):
            lanes = slice(QUERIES * c, QUERIES * (c + 1))
            own = by_granule[c * granules : (c + 1) * granules].permute((1, 0, 2))
            fetch(scores[lanes], own[:, :, 0:WHOLE])
            into = before[lanes, 1:].reshape_dim(1, (granules, GRANULE))
            fetch(into, own[:, :, WHOLE:EXTRA])
            if c > 0:
                fetch(before[lanes, 0:1], by_granule[c * granules - 1, :, EXTRA - 1 : EXTRA])
        return scores.reshape((128, self.width)), before

    def reach(self, near):
        """`limit` [128, width] of scores, by GpSimd, as VectorE has more to do: ALL up to block
        `near` [128, 1], FORCED behind."""
        names, self.limit = sbuf((128, self.width), nl.float32), sbuf((128, self.width), nl.float32)
        for c in range(CHUNKS):
            lanes = names[QUERIES * c : QUERIES * (c + 1), :]
            nisa.iota(lanes, [[1, self.width]], offset=c * self.width, channel_multiplier=0)
        steps = ((nl.less_equal, near), (nl.multiply, self.most), (nl.add, self.forced))
        current = names
        for op, operand in steps:
            every = operand.broadcast(1, self.width)
            nisa.tensor_tensor(self.limit, current, every, op, engine=nisa.engine.gpsimd)
            current = self.limit

    def settle(self, work, scores, before):
        """What `choose.Choice.best` wants of a tile."""
        tiles = self.width // BLOCKS_OF_KEYS
        first = scores.reshape_dim(1, (tiles, BLOCKS_OF_KEYS))[:, :, 0]
        nisa.tensor_tensor(first, first, before[:, 0:tiles], nl.add)
        ranking = sbuf(scores.shape, nl.float32)
        nisa.tensor_tensor(ranking, self.limit, scores, nl.minimum, engine=nisa.engine.gpsimd)
        forced = ranking[0:QUERIES, 0 : self.geometry.initial]
        nisa.memset(forced, FORCED, engine=nisa.engine.vector)
        work.ranking, work.left = ranking, ranking
        work.tops = sbuf((128, (work.tile.chosen + LANES - 1) // LANES * LANES), nl.float32)
        work.searched = 0
