"""The compressed branch: S^T, P^T in float32, P @ [v | 1], and the blocks' scores from the same P.

A row's scores are P^T's product with the keys' shares in blocks, in float32 (rule 3), before they
are divided by the row's sum, which comes with them: the last column of the weights is 1.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.nsa_attention.constants import keep_where
from nki_kernels.nsa_attention.geometry import BLOCKS_OF_KEYS, KEYS, STRIDE
from nki_kernels.nsa_attention.work import COMPRESSED, SECTION, multiply_keys

TOGETHER = 3  # tiles of keys whose scores leave PSUM together
RESIDENT = 64  # most tiles of keys that SBUF keeps beside the rest
LOADED = (16, 8)  # tiles of keys loaded together, where SBUF keeps all and where it does not


class Keys(nl.NKIObject):
    """Some tiles of compressed keys and values.

    Attributes:
        lower: K^T [<= 128, tiles, 128]. upper: what is left of it after 128 channels, if any,
            [128, tiles / 2, 128], tiles in turn on either half. values: [128, tiles, DV + 1].
    """

    def __init__(self, lane, first, some):
        dk, width = lane.k_cmp_t.shape[0], lane.v_cmp.shape[1]
        low = min(dk, 128)
        k_t = lane.k_cmp_t[:, first * KEYS : (first + some) * KEYS]
        by_tile = k_t.reshape_dim(1, (some, KEYS))
        self.lower = sbuf((low, some, KEYS), k_t.dtype)
        nisa.dma_copy(self.lower, by_tile[0:low])
        self.upper = []
        if dk > 128:
            upper = sbuf((128, (some + 1) // 2, KEYS), k_t.dtype)
            for half in range(min(2, some)):
                p0, count = 64 * half, (some + 1 - half) // 2
                nisa.dma_copy(upper[p0 : p0 + dk - 128, 0:count, :], by_tile[128:dk, half::2, :])
            self.upper.append(upper)
        rows = lane.v_cmp[first * KEYS : (first + some) * KEYS, :]
        self.values = sbuf((KEYS, some, width), rows.dtype)
        nisa.dma_copy(self.values, rows.reshape_dim(0, (some, KEYS)).permute((1, 0, 2)))


class Compressed(nl.NKIObject):
    """Compressed keys and values of a kv head: all in SBUF, or the latest, loaded ahead.

    Attributes:
        tiles: of keys. size: tiles loaded together. resident: whether SBUF keeps all.
        kept: (number of the tile of queries, of the load) and `Keys` of what is there, in order.
    """

    def __init__(self, geometry, constants, lane, scale, works):
        self.geometry, self.constants, self.lane, self.scale = geometry, constants, lane, scale
        self.works = works
        self.tiles = (geometry.keys + KEYS - 1) // KEYS
        self.resident = self.tiles <= RESIDENT
        self.size = LOADED[0 if self.resident else 1]
        self.kept = []
        if self.resident:
            for n in range((self.tiles + self.size - 1) // self.size):
                self.load(0, n)

    def load(self, index, n):
        first = n * self.size
        keys = Keys(self.lane, first, min(self.size, self.tiles - first))
        self.kept.append((index, n, keys))

    def keys(self, work, x):
        """(`Keys` that have tile x of a tile of queries, its place there)."""
        n, at = divmod(x, self.size)
        if self.resident:
            return self.kept[n][2], at
        for index, number, keys in self.kept:
            if index == work.index and number == n:
                return keys, at
        self.load(work.index, n)
        return self.kept[len(self.kept) - 1][2], at

    def load_ahead(self, work, x):
        """Loads what follows the keys of tile x, if they are not all there."""
        n, at = divmod(x, self.size)
        if self.resident or at != 0:
            return
        self.keys(work, x)
        index, n = work.index, n + 1
        if n * self.size >= work.tile.key_tiles:
            index, n = index + 1, 0
        if index < len(self.works):
            self.keys(self.works[index], n * self.size)
        while len(self.kept) > 3:
            self.kept.pop(0)

    def weigh(self, work, x):
        """P^T of a tile of keys, float32 [128, columns]."""
        self.load_ahead(work, x)
        keys, at = self.keys(work, x)
        scores = psum((KEYS, self.geometry.columns))
        upper = []
        for tensor in keys.upper:
            p0 = 64 * (at % 2)
            upper.append(tensor[p0 : p0 + work.rest, at // 2, :])
        multiply_keys(scores, work, keys.lower[:, at, :], upper, at % 2, False)
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
        keys, at = self.keys(work, x)
        values = keys.values[:, at, :]
        tiles = work.tile.key_tiles
        if x == 0:
            work.open(g, self.constants.zeros, values.shape[1] - 1)
            work.scores = []
            work.extra = sbuf((g.rows, g.parts, tiles, 2), nl.float32)
        if x % SECTION == 0 and work.tile.ranked:
            some = min(SECTION, tiles - x)
            work.scores.append(sbuf((g.rows, g.parts, some, BLOCKS_OF_KEYS), nl.float32))
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
        blocks, at = BLOCKS_OF_KEYS, first % SECTION
        section = work.scores[first // SECTION]
        into = section[:, :, at : at + end - first, :]
        nisa.tensor_copy(into, some[:, :, :, 0:blocks], engine=nisa.engine.scalar)
        nisa.tensor_copy(
            work.extra[:, :, first:end, :], some[:, :, :, blocks:], engine=nisa.engine.scalar
        )
        if end % SECTION == 0 or end == work.tile.key_tiles:
            # What keys before a block share in it.
            at = max(1, end - section.shape[2])
            if at < end:
                block = section[:, :, at % SECTION :, 0]
                nisa.tensor_tensor(block, block, work.extra[:, :, at - 1 : end - 1, 0], nl.add)

    def finish(self, work):
        """The branch's part of the output; 1 / row sum in float32; whole scores."""
        g = self.geometry
        work.close(g, COMPRESSED)
        if not work.tile.ranked:
            return
        work.inverse = sbuf((g.rows, g.parts), nl.float32)
        nisa.tensor_reduce(work.inverse, nl.add, work.extra[:, :, :, 1], axis=2)
        nisa.tensor_scalar(work.inverse, work.inverse, nl.maximum, 1e-30)
        nisa.reciprocal(work.inverse, work.inverse)


def upper_halves(weights):
    """The upper halves of float32 numbers [keys, columns]: bfloat16 by truncation."""
    return weights.view(nl.bfloat16)[:, 1::2]
