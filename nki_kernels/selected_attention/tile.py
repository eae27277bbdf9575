"""What the kernels of selected attention share: query tiles, gathered blocks, masks."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.spans import spans

HIDDEN = -3.0e38
"""What hides a key: added to its logit, and exactly what is left, since no logit reaches 2**100."""

BANK = 512
"""float32 columns of a PSUM bank."""


COMPARED = 4096
"""Pairs of a listed and a chosen block compared by one instruction, per query."""


def load_transposed(source, index, dtype):
    """[D, N] of `source` [_, D, N] at a run-time index, as one tile per 128 of D."""
    _, size, width = source.shape
    found = []
    for start, length in spans(size, nl.tile_size.pmax):
        tile = sbuf((length, width), dtype)
        nisa.dma_copy(tile, source[:, start : start + length, :].select(0, index))
        found.append(tile)
    return found


class Queries(nl.NKIObject):
    """What says which keys the queries of a tile see.

    Attributes:
        ids: [TQ, n] float32, chosen blocks.
        place: [TQ, 2] float32: the query's own block; tokens of it up to the query.
    """

    def __init__(self, ids, place, index):
        self.count, self.per_query = ids.shape[1:]
        raw = sbuf((self.count, self.per_query), nl.int32)
        nisa.dma_copy(raw, ids.select(0, index))
        self.ids = sbuf((self.count, self.per_query), nl.float32)
        nisa.tensor_copy(self.ids, raw)
        self.place = sbuf((self.count, 2), nl.float32)
        nisa.dma_copy(self.place, place.select(0, index))

    def visible(self, blocks, tokens):
        """How many tokens of each of `blocks` [TQ, U] (float32 ids) each query sees, [TQ, U].

        A block that starts after the query, or that it did not choose: 0; its own: up to itself.
        """
        shape = blocks.shape
        count, slots = shape
        chosen, part = sbuf(shape, nl.float32), sbuf(shape, nl.float32)
        near, seen = sbuf(shape, nl.float32), sbuf(shape, nl.float32)
        nisa.memset(chosen, 0.0)
        for start, length in spans(self.per_query, max(1, COMPARED // slots)):
            same = sbuf((count, slots, length), nl.bfloat16)
            own = self.ids[:, start : start + length]
            nisa.tensor_tensor(
                same,
                blocks.expand_dim(2).broadcast(2, length),
                own.expand_dim(1).broadcast(1, slots),
                nl.equal,
            )
            nisa.tensor_reduce(part, nl.maximum, same, axis=2)
            nisa.tensor_tensor(chosen, chosen, part, nl.maximum)
        # (own block - block) * m + tokens of the own block up to the query, between 0 and m.
        nisa.tensor_scalar(
            near, blocks, nl.subtract, self.place[:, 0:1], op1=nl.multiply,
            operand1=-float(tokens),
        )  # fmt: skip
        nisa.tensor_scalar(
            near, near, nl.add, self.place[:, 1:2], op1=nl.minimum, operand1=float(tokens)
        )
        nisa.scalar_tensor_tensor(seen, near, nl.maximum, 0.0, nl.multiply, chosen)
        return seen


def counted(queries, tokens):
    """0 .. tokens - 1 on each of `queries` partitions, [TQ, m] float32."""
    numbers = sbuf((queries, tokens), nl.float32)
    nisa.iota(numbers, [[1, tokens]], offset=0, channel_multiplier=0)
    return numbers


def hidden_keys(numbers, seen):
    """1 where a query does not see a key, else 0: [TQ, U, m] bfloat16, from `Queries.visible`."""
    (count, tokens), slots = numbers.shape, seen.shape[1]
    hidden = sbuf((count, slots, tokens), nl.bfloat16)
    nisa.tensor_tensor(
        hidden,
        numbers.expand_dim(1).broadcast(1, slots),
        seen.expand_dim(2).broadcast(2, tokens),
        nl.greater_equal,
    )
    return hidden


class Trip(nl.NKIObject):
    """Blocks of one trip over a union list: where the next trip's entries are, and what they say.

    Attributes:
        numbers: [1, U] int32, run-time addresses of blocks.
        blocks: [TQ, U] float32, the same on every query's partition.
    """

    def __init__(self, lists, pointer, queries):
        slots = lists.shape[1]
        row = lists.select(0, pointer)
        self.numbers = sbuf((1, slots), nl.int32)
        nisa.dma_copy(self.numbers, row.expand_dim(0))
        raw = sbuf((queries, slots), nl.int32)
        nisa.dma_copy(raw, row.expand_dim(0).broadcast(0, queries))
        self.blocks = sbuf((queries, slots), nl.float32)
        nisa.tensor_copy(self.blocks, raw)
        nisa.tensor_scalar(pointer, pointer, nl.add, 1)


def gather_columns(pages, numbers):
    """Blocks [D, m] of `pages` [_, D, m] side by side: [D, U, m], one tile per 128 of D."""
    _, size, tokens = pages.shape
    slots = numbers.shape[1]
    found = []
    for start, length in spans(size, nl.tile_size.pmax):
        tile = sbuf((length, slots, tokens), pages.dtype)
        for s in range(slots):
            page = pages[:, start : start + length, :].select(0, numbers[0:1, s : s + 1])
            nisa.dma_copy(tile[:, s, :], page)
        found.append(tile)
    return found


def gather_rows(pages, numbers):
    """Blocks [m, D] of `pages` [_, m, D] below each other: [keys, D] tiles of whole blocks."""
    _, tokens, size = pages.shape
    slots, per = numbers.shape[1], nl.tile_size.pmax // tokens
    found = []
    for start, length in spans(slots, per):
        tile = sbuf((length * tokens, size), pages.dtype)
        for s in range(length):
            page = pages.select(0, numbers[0:1, start + s : start + s + 1])
            nisa.dma_copy(tile[s * tokens : (s + 1) * tokens, :], page)
        found.append(tile)
    return found


def product(out, stationary, moving, rows, columns, mask=()):
    """out = sum over parts of stationary[:, rows].T @ moving[:, columns], and of a mask's pair."""
    for i in range(len(stationary)):
        nisa.nc_matmul(out, stationary[i][:, rows], moving[i][:, columns], accumulate=i > 0)
    if len(mask) > 0:
        nisa.nc_matmul(out, mask[0], mask[1], accumulate=True)


def transposed(tile):
    """[rows, keys] of SBUF as [keys, rows] in SBUF, by way of PSUM."""
    rows, keys = tile.shape
    turned = psum((keys, rows), tile.dtype)
    nisa.nc_transpose(turned, tile, engine=nisa.engine.tensor)
    out = sbuf((keys, rows), tile.dtype)
    nisa.tensor_copy(out, turned, engine=nisa.engine.scalar)
    return out
