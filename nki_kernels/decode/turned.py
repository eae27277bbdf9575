"""Keys of 128 gathered rows with channels on the partitions, and queries beside them.

A row is t neighbouring tokens of one kv head. Where DMA can, it turns them on the way (16-bit
numbers, DK a multiple of 32, whole chunks): the row's t * DK numbers are cut at multiples of 128,
and a token's channels lie in one, two or three of these chunks, wherever their part of the
partitions begins. Else PE turns each token of all rows.

Queries are laid out as the keys they meet: [128, places, pitch], the query again and again until a
token begins at the first partition, or its parts of 128 channels where PE turns keys.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.spans import spans
from nki_kernels.decode.caches import Cache

PARTITIONS = 128

BANK = 2048
"""Bytes of a partition of a PSUM bank."""

HEIGHTS = (128, 64, 32)
"""Rows of PE that a matmul may take a part of, from a multiple of their number on."""


def gather_keys(cache, pool, index, by_dma):
    """Asks for rows of a pool: chunks [128, places, rows] if DMA turns them, which then hold other
    heads' channels, too, where a row has them; else [rows, t, heads, DK].

    index: [rows, 1] int32, a multiple of 16 of them if DMA turns.
    """
    if not by_dma:
        return cache.gather(pool, index)
    wide, own = pool.shape[-1] * cache.tokens, pool
    if cache.apart > 0:
        own = pool[cache.first_head * cache.apart :]
    else:
        wide *= pool.shape[2]
    own = own.reshape((own.shape[0], wide // PARTITIONS, PARTITIONS))
    chunks = sbuf((PARTITIONS, wide // PARTITIONS, index.shape[0]), own.dtype)
    nisa.dma_transpose(chunks, own.vector_select(0, index.view(nl.uint32)))
    return chunks


def may_turn(caches):
    """Whether DMA can turn the keys of all caches: 16-bit numbers, DK a multiple of 32, whole
    chunks."""
    for cache in caches:
        heads = cache.k.shape[2] if cache.apart == 0 else 1
        wide = cache.tokens * heads * cache.k.shape[-1]
        if cache.k.dtype == nl.float32 or cache.k.shape[-1] % 32 > 0 or wide % PARTITIONS > 0:
            return False
    return True


def load_chunks(q_t):
    """q^T [DK, rows] as keys of `Chunks` want it, [128, places, rows]."""
    dk, rows = q_t.shape
    tile = sbuf((PARTITIONS, every(dk) * dk // PARTITIONS, rows), q_t.dtype)
    for k in range(every(dk)):
        for place, start, height, channel in cut(k * dk, dk):
            own = tile[start : start + height, place, :]
            nisa.dma_copy(own, q_t[channel : channel + height, :])
    return tile


class Chunks(nl.NKIObject):
    """Keys of several kv heads, turned by DMA, each in rows of its own or all in the same ones.

    index: [rows, 1] int32, or a column for each head.
    """

    def __init__(self, cache, index):
        self.tokens, self.dk, self.heads = cache.tokens, cache.k.shape[-1], []
        for h in range(cache.heads):
            head = cache.first_head + h
            own = Cache(cache.k, cache.v, cache.apart, head, 1)
            in_row = cache.k.shape[2] if cache.apart == 0 else 1
            if h == 0 or cache.apart > 0 or index.shape[1] > 1:
                column = index[:, h : h + 1] if index.shape[1] > 1 else index
                chunks = gather_keys(own, cache.k, column, True)
            self.heads.append((chunks, in_row, head if cache.apart == 0 else 0))

    def multiply(self, lanes, queries, rows, first, count):
        """Logits as `lanes.multiply` has them, [rows of lanes, count, rows] in PSUM.

        queries: from `load_chunks`. Tokens whose channels lie alike go through PE together.
        """
        logits, period = psum((lanes.rows, count, rows)), every(self.dk)
        for h in range(lanes.heads):
            chunks, in_row, head = self.heads[h]
            step = 1
            while step * in_row % period > 0:
                step += 1
            apart = step * in_row * self.dk // PARTITIONS
            for j in range(min(step, count)):
                number = (first + j) * in_row + head
                alike = (count - j + step - 1) // step
                out = logits[lanes.of(h), j:count:step, :]
                phase, pieces = number % period * self.dk, cut(number * self.dk, self.dk)
                for i in range(len(pieces)):
                    place, row, height, _ = pieces[i]
                    query = cut(phase, self.dk)[i][0]
                    moving = chunks[
                        row : row + height, place : place + (alike - 1) * apart + 1 : apart, 0:rows
                    ]
                    own = queries[row : row + height, query, lanes.of(h)]
                    lanes.matmul(out, own, moving, h, i > 0, row, height)
        return logits


class Turned(nl.NKIObject):
    """Keys of one kv head in rows of a pool.

    Attributes:
        tokens: t. rows: how many.
        pieces: of each token a list of (chunks, place among them, first partition, height, place
            among the queries); chunks [128, places, rows].
    """

    def __init__(self, cache, keys, rows, by_dma):
        """cache: of the one head. keys: from `gather_keys`, maybe of more heads."""
        self.tokens, self.rows, self.pieces, self.keys = cache.tokens, rows, [], None
        shared = cache.apart == 0
        if not by_dma:
            self.keys = keys[:, :, cache.first_head if keys.shape[2] > 1 else 0, :]
            return
        dk = cache.k.shape[-1]
        heads, head = (cache.k.shape[2], cache.first_head) if shared else (1, 0)
        for j in range(self.tokens):
            first, found = (j * heads + head) * dk, []
            for place, start, height, _ in cut(first, dk):
                query = place - first // dk // every(dk) * every(dk) * dk // PARTITIONS
                found.append((keys, place, start, height, query))
            self.pieces.append(found)

    def turn(self, by_scalar):
        """By PE, once gathered, if DMA has not. by_scalar: whether ScalarE makes all copies; else
        VectorE makes every other one."""
        if self.keys is None:
            return
        keys, parts = self.keys, spans(self.keys.shape[2], PARTITIONS)
        most = BANK // ((4 if keys.dtype == nl.float32 else 2) * self.rows)
        for _ in range(self.tokens):
            self.pieces.append([])
        copies = 0
        for part in range(len(parts)):
            channel, height = parts[part]
            chunks = sbuf((height, self.tokens, self.rows), keys.dtype)
            for first, count in spans(self.tokens, most):
                bank = psum((height, count, self.rows), keys.dtype)
                for i in range(count):
                    some = keys[:, first + i, channel : channel + height]
                    nisa.nc_transpose(bank[:, i, :], some, engine=nisa.engine.tensor)
                scalar = by_scalar or copies % 2 == 0
                engine = nisa.engine.scalar if scalar else nisa.engine.vector
                nisa.tensor_copy(chunks[:, first : first + count, :], bank, engine=engine)
                copies += 1
            for j in range(self.tokens):
                self.pieces[j].append((chunks, j, 0, height, part))
        self.keys = None


def cut(start, length):
    """Pieces of `length` numbers from `start` on, none across a chunk, each on rows of PE that a
    matmul may take: (chunk, first partition, height, first of the numbers)."""
    found, done = [], 0
    while done < length:
        partition = (start + done) % PARTITIONS
        left = min(length - done, PARTITIONS - partition)
        height = 0
        for size in HEIGHTS:
            if height == 0 and size <= left and partition % size == 0:
                height = size
        found.append(((start + done) // PARTITIONS, partition, height, done))
        done += height
    return found


def every(dk):
    """After how many tokens a key begins at the first partition again."""
    count = 1
    while count * dk % PARTITIONS > 0:
        count += 1
    return count
