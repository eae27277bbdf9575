"""The compressed branch: S^T, P^T in float32, P @ [v | 1], and the blocks' scores from the same P.

A row's scores are P^T's product with the keys' shares in blocks, in float32 (rule 3), before they
are divided by the row's sum, which comes with them: the last column of the weights is 1.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.nsa_attention.constants import keep_where
from nki_kernels.nsa_attention.geometry import BLOCKS_OF_KEYS, KEYS, STRIDE
from nki_kernels.nsa_attention.work import COMPRESSED, multiply_keys

TOGETHER = 3  # tiles of keys whose scores leave PSUM together
LOADED = 16  # tiles of keys loaded together


class Compressed(nl.NKIObject):
    """Compressed keys and values of a kv head, all in SBUF.

    Attributes:
        lower: K^T [<= 128, tiles, 128], one tensor per LOADED tiles. upper: what is left of it
            after 128 channels, [128, tiles / 2, 128], tiles in turn on either half.
        values: [128, tiles, DV + 1].
    """

    def __init__(self, geometry, constants, lane, scale):
        self.geometry, self.constants, self.scale = geometry, constants, scale
        self.lower, self.upper, self.values = [], [], []
        tiles = (geometry.keys + KEYS - 1) // KEYS
        dk, width = lane.k_cmp_t.shape[0], lane.v_cmp.shape[1]
        low = min(dk, 128)
        for first in range(0, tiles, LOADED):
            some = min(LOADED, tiles - first)
            k_t = lane.k_cmp_t[:, first * KEYS : (first + some) * KEYS]
            by_tile = k_t.reshape_dim(1, (some, KEYS))
            lower = sbuf((low, some, KEYS), k_t.dtype)
            nisa.dma_copy(lower, by_tile[0:low])
            self.lower.append(lower)
            if dk > 128:
                upper = sbuf((128, (some + 1) // 2, KEYS), k_t.dtype)
                for half in range(min(2, some)):
                    p0, count = 64 * half, (some + 1 - half) // 2
                    nisa.dma_copy(
                        upper[p0 : p0 + dk - 128, 0:count, :], by_tile[128:dk, half::2, :]
                    )
                self.upper.append(upper)
            rows = lane.v_cmp[first * KEYS : (first + some) * KEYS, :]
            values = sbuf((KEYS, some, width), rows.dtype)
            nisa.dma_copy(values, rows.reshape_dim(0, (some, KEYS)).permute((1, 0, 2)))
            self.values.append(values)

    def weigh(self, work, x):
        """P^T of a tile of keys, float32 [128, columns]."""
        chunk, at = divmod(x, LOADED)
        scores = psum((KEYS, self.geometry.columns))
        upper = []
        for tensor in self.upper[chunk : chunk + 1]:
            p0 = 64 * (at % 2)
            upper.append(tensor[p0 : p0 + work.rest, at // 2, :])
        multiply_keys(scores, work, self.lower[chunk][:, at, :], upper, at % 2)
        weights = sbuf(scores.shape, nl.float32)
        bias = work.shifts[:, COMPRESSED : COMPRESSED + 1]
        nisa.activation(weights, nl.exp, scores, bias=bias, scale=self.scale)
        # Key i is seen from token STRIDE * i + block - 1 on.
        after = STRIDE * KEYS * x + self.geometry.block - 1 - work.tile.t0
        if after + STRIDE * (KEYS - 1) > 0:
            keep_where(weights, self.constants.far, nl.greater_equal, after)
        if not work.tile.ranked:
            return [weights]
        rest = sbuf(weights.shape, nl.bfloat16)
        nisa.tensor_tensor(rest, weights, upper_halves(weights), nl.subtract)
        return [weights, rest]

    def add(self, work, x, weights):
        """Adds a tile of keys to P @ [v | 1], and makes its scores."""
        g = self.geometry
        chunk, at = divmod(x, LOADED)
        values = self.values[chunk][:, at, :]
        if x == 0:
            work.open(g, self.constants.zeros, values.shape[1] - 1)
            tiles = work.tile.key_tiles
            work.scores = sbuf((g.rows, g.parts, tiles, BLOCKS_OF_KEYS), nl.float32)
            work.extra = sbuf((g.rows, g.parts, tiles, 2), nl.float32)
        if x % TOGETHER == 0 and work.tile.ranked:
            work.shares = psum((g.rows, g.parts, TOGETHER, BLOCKS_OF_KEYS + 2))
        for p in range(g.parts):
            some = slice(p * g.rows, (p + 1) * g.rows)
            upper = upper_halves(weights[0])[:, some]
            nisa.nc_matmul(work.bank(p), upper, values, accumulate=True)
            for rest in weights[1:]:
                target = work.shares[:, p, x % TOGETHER, :]
                nisa.nc_matmul(target, upper, self.constants.weights, accumulate=False)
                nisa.nc_matmul(target, rest[:, some], self.constants.weights, accumulate=True)
        last = x == work.tile.key_tiles - 1
        if work.tile.ranked and (x % TOGETHER == TOGETHER - 1 or last):
            self.keep_scores(work, x // TOGETHER * TOGETHER, x + 1)
        if last:
            self.finish(work)

    def keep_scores(self, work, first, end):
        """Scores of the tiles of keys first .. end - 1 from PSUM to SBUF."""
        some = work.shares[:, :, 0 : end - first, :]
        blocks = BLOCKS_OF_KEYS
        nisa.tensor_copy(
            work.scores[:, :, first:end, :], some[:, :, :, 0:blocks], engine=nisa.engine.scalar
        )
        nisa.tensor_copy(
            work.extra[:, :, first:end, :], some[:, :, :, blocks:], engine=nisa.engine.vector
        )

    def finish(self, work):
        """The branch's part of the output; 1 / row sum in float32; whole scores."""
        g = self.geometry
        work.close(g, COMPRESSED)
        tiles = work.tile.key_tiles
        if not work.tile.ranked:
            return
        work.inverse = sbuf((g.rows, g.parts), nl.float32)
        nisa.tensor_reduce(work.inverse, nl.add, work.extra[:, :, :, 1], axis=2)
        nisa.tensor_scalar(work.inverse, work.inverse, nl.maximum, 1e-30)
        nisa.reciprocal(work.inverse, work.inverse)
        if tiles > 1:
            first = work.scores[:, :, 1:tiles, 0]
            nisa.tensor_tensor(first, first, work.extra[:, :, 0 : tiles - 1, 0], nl.add)


def upper_halves(weights):
    """The upper halves of float32 numbers [keys, columns]: bfloat16 by truncation."""
    return weights.view(nl.bfloat16)[:, 1::2]
