"""What the kernels of selected attention share: query tiles, masks, products."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.queues import fetch
from nki_kernels.common.spans import spans
from nki_kernels.selected_attention.gather import BANK, tiles_per_bank

HIDDEN = -3.0e38
"""What hides a key: added to its logit, and exactly what is left, since no logit reaches 2**100."""

COMPARED = 4096
"""Pairs of a listed and a chosen block compared by one instruction, per query."""


def load_columns(source):
    """[D, N] of HBM in SBUF, as one tile per 128 of D."""
    size, width = source.shape
    found = []
    for start, length in spans(size, nl.tile_size.pmax):
        tile = sbuf((length, width), source.dtype)
        fetch(tile, source[start : start + length, :])
        found.append(tile)
    return found


def flat(tensor, index):
    """[1, ...] of [GROUPS, BODY, ...] at the run-time number of a tile."""
    return tensor.flatten_dims(0, 1).select(0, index).expand_dim(0)


class Queries(nl.NKIObject):
    """What says which keys the queries of some tiles see.

    Attributes:
        ids: [TQ, TILES, n] float32, chosen blocks.
        place: [TQ, TILES, 2] float32: the query's own block; tokens of it up to the query.
    """

    def __init__(self, ids, place):
        """ids: [TILES, TQ, n] int32, place: [TILES, TQ, 2] float32, in HBM."""
        tiles, self.count, self.per_query = ids.shape
        raw = sbuf((self.count, tiles, self.per_query), nl.int32)
        fetch(raw, ids.permute((1, 0, 2)))
        self.ids = sbuf(raw.shape, nl.float32)
        nisa.tensor_copy(self.ids, raw)
        self.place = sbuf((self.count, tiles, 2), nl.float32)
        fetch(self.place, place.permute((1, 0, 2)))

    def listed(self, lists):
        """Lists [TILES, U] int32 in HBM as float32 on every query's partition, [TQ, TILES, U]."""
        tiles, slots = lists.shape
        raw = sbuf((self.count, tiles, slots), nl.int32)
        fetch(raw, lists.expand_dim(0).broadcast(0, self.count))
        blocks = sbuf(raw.shape, nl.float32)
        nisa.tensor_copy(blocks, raw)
        return blocks

    def visible(self, tile, blocks, tokens):
        """How many tokens of `blocks` [TQ, U] (float32) the queries of a tile see, [TQ, U].

        bfloat16 counts exactly so far: m <= 128.

        A block that starts after the query, or that it did not choose: 0; its own: up to itself.
        """
        shape = blocks.shape
        slots = shape[1]
        chosen, part = sbuf(shape, nl.float32), sbuf(shape, nl.float32)
        near, seen = sbuf(shape, nl.float32), sbuf(shape, nl.bfloat16)
        nisa.memset(chosen, 0.0)
        for start, length in spans(self.per_query, max(1, COMPARED // slots)):
            same = sbuf((self.count, slots, length), nl.bfloat16)
            own = self.ids[:, tile, start : start + length]
            nisa.tensor_tensor(
                same,
                blocks.expand_dim(2).broadcast(2, length),
                own.expand_dim(1).broadcast(1, slots),
                nl.equal,
            )
            nisa.tensor_reduce(part, nl.maximum, same, axis=2)
            nisa.tensor_tensor(chosen, chosen, part, nl.maximum)
        # (own block - block) * m + tokens of the own block up to the query, between 0 and m.
        place = self.place[:, tile, :]
        nisa.tensor_scalar(
            near, blocks, nl.subtract, place[:, 0:1], op1=nl.multiply, operand1=-float(tokens)
        )
        nisa.tensor_scalar(
            near, near, nl.add, place[:, 1:2], op1=nl.minimum, operand1=float(tokens)
        )
        nisa.scalar_tensor_tensor(seen, near, nl.maximum, 0.0, nl.multiply, chosen)
        return seen


class Mask(nl.NKIObject):
    """How keys are hidden inside the products of queries and keys.

    Hidden keys [TQ, keys] (1, else 0) are more rows of K^T; `heads` [TQ, ROWS], HIDDEN where a row
    belongs to a query, more rows of q^T. Either they stand behind the last rows of both (room > 0:
    there is room on 128 partitions, and HIDDEN is a number of their dtype), or they are a product
    of their own.

    Attributes:
        numbers: [TQ, m] bfloat16, 0 .. m - 1.
        heads: [TQ, ROWS] bfloat16, unless there is room.
    """

    def __init__(self, heads, tokens, room):
        self.room = room
        self.numbers = sbuf((heads.shape[0], tokens), nl.bfloat16)
        nisa.iota(self.numbers, [[1, tokens]], offset=0, channel_multiplier=0)
        if room == 0:
            self.heads = sbuf(heads.shape, heads.dtype)
            nisa.dma_copy(self.heads, heads)

    def hide(self, turned, seen):
        """Hidden keys [TQ, keys], from `Queries.visible`: in K^T's room, or a tile of their own."""
        count, slots = seen.shape
        tokens = self.numbers.shape[1]
        if self.room > 0:
            last = turned[len(turned) - 1]
            hidden = last[last.shape[0] - self.room : last.shape[0], :]
        else:
            hidden = sbuf((count, slots * tokens), nl.bfloat16)
        nisa.tensor_tensor(
            hidden.reshape_dim(1, (slots, tokens)),
            self.numbers.expand_dim(1).broadcast(1, slots),
            seen.expand_dim(2).broadcast(2, tokens),
            nl.greater_equal,
        )
        return hidden

    def scores(self, out, q, turned, hidden, rows, keys):
        """out = q^T.T @ K^T of some rows and keys, HIDDEN where hidden."""
        product(out, q, turned, rows, keys)
        if self.room == 0:
            nisa.nc_matmul(out, self.heads[:, rows], hidden[:, keys], accumulate=True)


class Keys(nl.NKIObject):
    """Gathered blocks, ready for the products: K^T, and which keys each query must not see."""

    def __init__(self, blocks, queries, tile, listed, mask, dk):
        self.blocks, self.dk = blocks, dk
        self.turned = blocks.turned(0, dk, mask.room)
        self.hidden = mask.hide(self.turned, queries.visible(tile, listed, blocks.tokens))


def product(out, stationary, moving, rows, keys):
    """out = sum over parts of stationary[:, rows].T @ moving[:, keys]."""
    for i in range(len(stationary)):
        nisa.nc_matmul(out, stationary[i][:, rows], moving[i][:, keys], accumulate=i > 0)


def runs_of(blocks):
    """(first tile, banks, tiles of a bank): as much as one instruction on two PSUM banks takes."""
    per_bank = BANK // blocks.size
    found = []
    whole = len(blocks.tiles) // per_bank
    for start, banks in spans(whole, 2):
        found.append((start * per_bank, banks, per_bank))
    if whole * per_bank < len(blocks.tiles):
        found.append((whole * per_bank, 1, len(blocks.tiles) - whole * per_bank))
    return found


def turned_tiles(matrix, size, engine):
    """[rows, keys] of SBUF as [size, tiles, rows] in SBUF: each `size` keys below each other."""
    rows, keys = matrix.shape
    out = sbuf((size, keys // size, rows), matrix.dtype)
    for first, some in spans(keys // size, tiles_per_bank(matrix.dtype)):
        bank = psum((size, some, nl.tile_size.pmax), matrix.dtype)
        for i in range(some):
            start = (first + i) * size
            nisa.nc_transpose(
                bank[:, i, 0:rows], matrix[:, start : start + size], engine=nisa.engine.tensor
            )
        nisa.tensor_copy(out[:, first : first + some, :], bank[:, :, 0:rows], engine=engine)
    return out
