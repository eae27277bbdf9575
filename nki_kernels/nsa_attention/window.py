"""The window branch: the last tokens of each query, in tiles of 128 keys that a ring keeps."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.nsa_attention.constants import keep_where
from nki_kernels.nsa_attention.geometry import KEYS
from nki_kernels.nsa_attention.work import NEAR, multiply_keys


class Window(nl.NKIObject):
    """A ring of tiles of keys and values per stream of tiles of queries.

    Attributes:
        lower, upper, values: tensors of each place of the rings; `upper`, K^T's rows after 128,
            lies on the half of the partitions that is the tile's parity.
        held: the tile of keys at each place, -1 for none.
    """

    def __init__(self, geometry, constants, lane, scale, streams):
        self.geometry, self.constants, self.lane, self.scale = geometry, constants, lane, scale
        self.places = geometry.key_tiles_of_window() + 2
        self.lower, self.upper, self.values, self.held = [], [], [], []
        self.dk, width = lane.k_win_t.shape[0], lane.v_win.shape[1]
        for _ in range(self.places * streams):
            self.lower.append(sbuf((min(128, self.dk), KEYS), lane.k_win_t.dtype))
            if self.dk > 128:
                self.upper.append(sbuf((128, KEYS), lane.k_win_t.dtype))
            self.values.append(sbuf((KEYS, width), lane.v_win.dtype))
            self.held.append(-1)

    def place(self, tile, number):
        return tile.stream * self.places + number % self.places

    def count(self, tile):
        return tile.last_near - tile.first_near + 1

    def load(self, tile):
        """The tiles of keys of a tile of queries that are not there yet."""
        for number in range(tile.first_near, tile.last_near + 1):
            at = self.place(tile, number)
            if self.held[at] != number:
                self.held[at] = number
                keys = self.lane.k_win_t[:, number * KEYS : (number + 1) * KEYS]
                nisa.dma_copy(self.lower[at], keys[0 : min(128, self.dk), :])
                if self.dk > 128:
                    p0 = 64 * (number % 2)
                    nisa.dma_copy(self.upper[at][p0 : p0 + self.dk - 128, :], keys[128:, :])
                nisa.dma_copy(
                    self.values[at], self.lane.v_win[number * KEYS : (number + 1) * KEYS, :]
                )

    def weigh(self, work, x):
        """P^T of a tile of keys, bfloat16 [128, columns]."""
        tile = work.tile
        number = tile.first_near + x
        at, half = self.place(tile, number), number % 2
        scores = psum((KEYS, self.geometry.columns))
        upper = []
        for tensor in self.upper[at : at + 1]:
            upper.append(tensor[64 * half : 64 * half + self.dk - 128, :])
        multiply_keys(scores, work, self.lower[at], upper, half, False)
        weights = sbuf(scores.shape, work.q[0].dtype)
        bias = work.shifts[:, NEAR : NEAR + 1]
        nisa.activation(weights, nl.exp, scores, bias=bias, scale=self.scale)
        ahead = number * KEYS - tile.t0
        if ahead + KEYS - 1 > 0:
            keep_where(weights, self.constants.near, nl.greater_equal, ahead)
        if ahead < 32 - self.geometry.window:
            keep_where(
                weights, self.constants.near, nl.less_equal, ahead + self.geometry.window - 1
            )
        return weights

    def add(self, work, x, weights):
        """Adds a tile of keys to P @ [v | 1]."""
        g, tile = self.geometry, work.tile
        values = self.values[self.place(tile, tile.first_near + x)]
        if x == 0:
            work.open(g, self.constants.zeros, values.shape[1] - 1)
        for p in range(g.parts):
            columns = weights[:, p * g.rows : (p + 1) * g.rows]
            nisa.nc_matmul(work.bank(p), columns, values, accumulate=True)
