"""The selected branch: rows of the blocks that were chosen, of each query."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.spans import spans
from nki_kernels.decode.caches import Tile
from nki_kernels.decode.lanes import (
    Scores,
    Sum,
    clear_unseen,
    groups_of,
    multiply,
    turn_keys,
)
from nki_kernels.decode.selection import by_lane, choose, look_up, placed, seen_tokens
from nki_kernels.decode.turned import Chunks

HIDDEN = -3.0e38
"""What a hidden logit is replaced by; `range_select` has a number of its own, a little below."""

MOST_BYTES = 85_000
"""Of a partition, for chosen keys and values that are not needed yet."""


class Chosen(nl.NKIObject):
    """Blocks that the queries of a sequence choose. sequence: a `Sequence`; cache: its pools."""

    def __init__(self, sequence, cache):
        self.sequence, self.cache, self.call = sequence, cache, sequence.call

    def choose(self, ranked, place):
        """Which blocks, by `ranked` [pairs, blocks]; asks where their rows lie."""
        call = self.call
        size = call.per_block * call.tokens
        numbers, real = choose(ranked, place, call.chosen)
        seen = seen_tokens(numbers, real, place, size)
        self.asked = look_up(numbers, seen, place, call.table, call.blocks)
        self.seen = by_lane(seen, call.rows_of)

    def find(self):
        """Rows of the chosen blocks, of each query."""
        call = self.call
        self.tiles, self.places = [], placed(self.asked)
        for s in range(call.rows_of.shape[1]):
            for first, rows in spans(call.chosen_rows, call.block_rows):
                tile = Tile(first, self.rows_of(s, first, rows), call.tokens, None)
                tile.query = s
                tile.kept = self.kept_of(rows)
                self.tiles.append(tile)

    def gather(self):
        """Asks for all chosen keys and values, if they fit; of float32 half as many do."""
        cache = self.cache
        times = self.call.lanes.heads if cache.apart == 0 else 1
        times *= 2 if cache.k.dtype == nl.float32 else 1
        per_tile = cache.bytes(cache.k) + cache.bytes(cache.v)
        if len(self.tiles) * per_tile * times > MOST_BYTES:
            return
        for tile in self.tiles:
            tile.k = self.gather_keys(tile)
        for tile in self.tiles:
            tile.v = cache.gather_by_head(cache.v, tile.index)

    def gather_keys(self, tile):
        """Asks for the keys of a tile, turned if DMA can."""
        if self.sequence.by_dma:
            return Chunks(self.cache, tile.index)
        return self.cache.gather_by_head(self.cache.k, tile.index)

    def rows_of(self, s, first, rows):
        """Row numbers [rows, heads] of the blocks of query s, from one of the chosen rows on; keeps
        in `left` how many tokens from a row on the query sees."""
        call = self.call
        heads, queries = call.lanes.heads, call.rows_of.shape[1]
        bank = psum((rows, 2, heads))
        for i in range(len(self.places)):
            own = self.places[i][:, :, s : (heads - 1) * queries + s + 1 : queries]
            weights = call.spread[i][:, first : first + rows]
            nisa.nc_matmul(bank, weights, own, accumulate=i > 0)
        index = sbuf((rows, heads), nl.int32)
        self.left = sbuf((rows, heads), nl.float32)
        nisa.scalar_tensor_tensor(
            index, call.steps[0:rows, :].broadcast(1, heads), nl.multiply, float(call.step), nl.add,
            bank[:, 0, :],
        )  # fmt: skip
        nisa.scalar_tensor_tensor(
            self.left, call.steps[0:rows, :].broadcast(1, heads), nl.multiply,
            -float(call.tokens), nl.add, bank[:, 1, :],
        )  # fmt: skip
        return index

    def kept_of(self, rows):
        """As `Tile.kept`, of the rows that `left` is of."""
        heads, tokens = self.call.lanes.heads, self.call.tokens
        some = sbuf((rows, heads, tokens), nl.float32)
        kept = sbuf((rows, heads, tokens), self.sequence.kept.dtype)
        nisa.tensor_tensor(
            some,
            self.call.counted[0:rows, :].expand_dim(1).broadcast(1, heads),
            self.left.expand_dim(2).broadcast(2, tokens),
            nl.less,
        )
        nisa.tensor_scalar(kept, some, nl.multiply, -1.0)
        return kept

    def score(self):
        """Weights of the selected branch, and its values without what may not be used."""
        call, lanes, tiles = self.call, self.call.lanes, self.tiles
        parts = 0
        for tile in tiles:
            parts += len(groups_of(tile.rows, tile.tokens))
        scores = Scores(lanes, parts)
        for tile in tiles:
            k = tile.k
            if k is None:
                k = self.gather_keys(tile)
            tile.k = None
            by_dma = self.sequence.by_dma
            turned = k if by_dma else turn_keys(k, lanes)
            values = scores.next_values(tile.columns)
            for first, count in groups_of(tile.rows, tile.tokens):
                logits = multiply(
                    lanes, self.sequence.columns, turned, tile.rows, first, count, tile.tokens,
                    by_dma,
                )  # fmt: skip
                part = values[:, first * tile.rows : (first + count) * tile.rows]
                hide_unseen(part, logits, self.shown(tile, first, count), scores.next_top())
        scores.shift_by_maximum(call.scale)
        for i in range(len(tiles)):
            scores.weigh(i, self.sequence.own[0].dtype, call.scale, True)
            if tiles[i].v is not None:
                clear_unseen(tiles[i].v, tiles[i].kept)
        scores.invert()
        self.scores = scores

    def add_up(self):
        """Weights times values."""
        lanes, scores = self.call.lanes, self.scores
        found = Sum(lanes, self.sequence.own[2].shape[1])
        for i in range(len(self.tiles)):
            tile = self.tiles[i]
            v = tile.v
            if v is None:
                v = self.cache.gather_by_head(self.cache.v, tile.index)
                clear_unseen(v, tile.kept)
            tile.v = None
            found.add(scores.weights[i], tile, v)
        self.sum = found.finish()

    def shown(self, tile, first, count):
        """Which tokens of chosen rows each row of lanes sees, uint8 [rows, count * rows]."""
        call = self.call
        places = tile.rows // call.per_block
        place = tile.first // call.per_block
        shape = (call.lanes.rows, count, places, call.per_block)
        shown = sbuf(shape, nl.uint8)
        within = call.within[:, first : first + count, :].expand_dim(2).broadcast(2, places)
        seen = self.seen[:, tile.query, place : place + places]
        seen = seen.expand_dim(1).broadcast(1, count).expand_dim(3).broadcast(3, call.per_block)
        nisa.tensor_tensor(shown, within, seen, nl.less)
        return shown.reshape((call.lanes.rows, count * tile.rows))


def hide_unseen(values, logits, shown, top):
    """Logits where `shown`, else `HIDDEN`, and the largest of each row."""
    nisa.select_reduce(
        values, shown, logits.reshape(values.shape), HIDDEN, reduce_res=top,
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )  # fmt: skip
