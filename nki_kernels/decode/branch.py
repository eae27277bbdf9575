"""Branches whose rows are known beforehand: compressed blocks, and those of the window."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.spans import spans
from nki_kernels.decode.caches import Tile
from nki_kernels.decode.lanes import (
    Scores,
    Sum,
    clear_foreign,
    groups_of,
    multiply,
    turn_keys,
)
from nki_kernels.decode.turned import Chunks


class Branch(nl.NKIObject):
    """Rows of a sequence that are known beforehand: compressed blocks, or those of the window."""

    def __init__(self, sequence, cache, first_tile, first_kept, first_bound, rows):
        self.sequence, self.cache, self.keys = sequence, cache, rows * cache.tokens
        self.tiles = []
        tokens = cache.tokens
        for first, count in spans(rows, nl.tile_size.pmax):
            i = len(self.tiles)
            index = sequence.index[0:count, first_tile + i : first_tile + i + 1]
            at = first_kept + i * tokens
            kept = sequence.kept[0:count, at : at + tokens]
            self.tiles.append(Tile(first, index, tokens, kept))
            self.tiles[i].whole = sequence.index[:, first_tile + i : first_tile + i + 1]
        numbers = sequence.numbers[:, 3 + first_bound : 3 + first_bound + 2 * tokens]
        self.bounds = (numbers[:, 0:tokens], numbers[:, tokens : 2 * tokens])

    def fits(self, pool, most_bytes):
        """Whether all tiles of a pool together take at most so many bytes of a partition; half as
        many of float32, whose other tensors are twice as large, too."""
        share = 2 if pool.dtype == nl.float32 else 1
        return len(self.tiles) * self.cache.bytes(pool) * share <= most_bytes

    def gather_keys(self, most_bytes):
        """Asks for all keys, if they fit."""
        if self.fits(self.cache.k, most_bytes):
            for tile in self.tiles:
                tile.k = self.gather_tile(tile)

    def gather_tile(self, tile):
        """Asks for the keys of a tile, turned if DMA can."""
        if self.sequence.by_dma:
            return Chunks(self.cache, tile.whole)
        return self.cache.gather(self.cache.k, tile.index)

    def gather_values(self, most_bytes):
        if self.fits(self.cache.v, most_bytes):
            for tile in self.tiles:
                tile.v = self.cache.gather(self.cache.v, tile.index)

    def score(self, first_tile, count):
        """Logits of some tiles, hidden where a row does not see a token; `flush` makes the last."""
        lanes = self.sequence.call.lanes
        if first_tile == 0:
            self.scores = Scores(lanes, len(self.tiles) * self.cache.tokens)
            self.waiting = []
        for tile in self.tiles[first_tile : first_tile + count]:
            k = tile.k if tile.k is not None else self.gather_tile(tile)
            tile.k = None
            turned = k if self.sequence.by_dma else turn_keys(by_head(k), lanes)
            self.flush()
            self.waiting.append((tile, turned))

    def flush(self):
        """Logits of the tile that is turned; PE need not wait for the copies of the next."""
        sequence, lanes = self.sequence, self.sequence.call.lanes
        for tile, turned in self.waiting:
            values = self.scores.next_values(tile.columns)
            for first, tokens in groups_of(tile.rows, tile.tokens):
                logits = multiply(
                    lanes, sequence.columns, turned, tile.rows, first, tokens, tile.tokens,
                    sequence.by_dma,
                )  # fmt: skip
                for i in range(tokens):
                    start = (first + i) * tile.rows
                    part = values[:, start : start + tile.rows]
                    self.hide(part, logits[:, i, :], tile, first + i)
        self.waiting = []

    def hide(self, values, logits, tile, j):
        nisa.range_select(
            values, logits, nl.greater_equal, nl.less_equal, self.bounds[0][:, j : j + 1],
            self.bounds[1][:, j : j + 1], reduce_res=self.scores.next_top(), range_start=tile.first,
        )  # fmt: skip

    def order(self, i, ordered, scale):
        """Exponentials of tile i in the order of the keys, among `ordered` [rows, keys] float32."""
        first = self.tiles[i].first * self.tiles[i].tokens
        self.order_into(i, ordered[:, first : first + self.tiles[i].columns], scale, True)

    def order_into(self, i, by_row, scale, add_up):
        """The same into [rows, keys of the tile]; `add_up`: as of `Scores.exponentiate`."""
        tile, scores = self.tiles[i], self.scores
        rows = scores.lanes.rows
        by_row = by_row.reshape((rows, tile.rows, tile.tokens))
        by_token = scores.values[i].reshape((rows, tile.tokens, tile.rows))
        for first, count in groups_of(tile.rows, tile.tokens):
            target = by_row[:, :, first : first + count].permute((0, 2, 1))
            scores.exponentiate(target, by_token[:, first : first + count, :], scale, add_up)

    def clear_values(self):
        """Values that are there already lose what may not be used."""
        for tile in self.tiles:
            if tile.v is not None:
                clear_foreign(tile.v, tile.kept)

    def sum_values(self, first_tile, count):
        """Adds weights times values of some tiles to `sum`."""
        weights = self.scores.weights
        if first_tile == 0:
            self.sum = Sum(self.scores.lanes, self.cache.v.shape[-1])
        for i in range(first_tile, first_tile + count):
            tile = self.tiles[i]
            v = tile.v
            if v is None:
                v = self.cache.gather(self.cache.v, tile.index)
                clear_foreign(v, tile.kept)
            tile.v = None
            self.sum.add(weights[i], tile, by_head(v))
            weights[i] = None


def by_head(x):
    """[rows, t, heads, D] as a list of views [rows, t, D]."""
    found = []
    for h in range(x.shape[2]):
        found.append(x[:, :, h, :])
    return found
