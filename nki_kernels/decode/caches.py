"""Keys and values gathered from pools, some tokens of a page at a time.

A pool is cut in rows of `t` neighbouring tokens, as its layout has them in memory:

- tokens first: [rows, t, Hkv, D]; a row holds all kv heads.
- heads first: [rows, t, D]; the rows of a page's kv heads lie `apart` rows from each other.

One DMA puts a row on each of up to 128 partitions. Its row numbers are data, which GpSimd makes
descriptors of, 14 ns for each row; so rows are long.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import sbuf


class Tile(nl.NKIObject):
    """Keys and values of up to 128 rows.

    Column j * rows + r of logits is token j of row r: of keys that PE has turned, each token of all
    rows is contiguous.

    Attributes:
        first: number of the first row in its sequence. rows, tokens: of the tile; t.
        k, v: [rows, t, heads, D] once loaded.
        kept: [rows, t] or [rows, heads, t], all bits of a token that may be used, none of others.
    """

    def __init__(self, first, index, tokens, kept):
        self.first, self.index, self.tokens, self.kept = first, index, tokens, kept
        self.rows = index.shape[0]
        self.columns = self.rows * tokens
        self.k, self.v = None, None


class Cache(nl.NKIObject):
    """A branch's pools, and the kv heads that one program serves."""

    def __init__(self, k, v, apart, first_head, heads):
        self.k, self.v, self.apart = k, v, apart
        self.first_head, self.heads = first_head, heads
        self.tokens = k.shape[1]

    def bytes(self, pool):
        """Of a partition, what `gather` takes."""
        heads = pool.shape[2] if self.apart == 0 else self.heads
        return self.tokens * heads * pool.shape[-1] * (4 if pool.dtype == nl.float32 else 2)

    def gather(self, pool, index):
        """Rows for all heads: [rows, t, heads, D]."""
        first, heads = self.first_head, self.heads
        if self.apart == 0:
            found = sbuf((index.shape[0], self.tokens, pool.shape[2], pool.shape[3]), pool.dtype)
            nisa.dma_copy(found, pool.vector_select(0, index))
            return found[:, :, first : first + heads, :]
        found = sbuf((index.shape[0], heads, self.tokens, pool.shape[2]), pool.dtype)
        for h in range(heads):
            own = pool[(first + h) * self.apart :]
            nisa.dma_copy(found[:, h], own.vector_select(0, index))
        return found.permute((0, 2, 1, 3))

    def gather_by_head(self, pool, index):
        """The same where each head has rows of its own, a column of `index` [rows, heads]."""
        views, rows = [], index.shape[0]
        whole = None
        if self.apart > 0:
            whole = sbuf((rows, self.heads, self.tokens, pool.shape[2]), pool.dtype)
        for h in range(self.heads):
            column, head = index[:, h : h + 1], self.first_head + h
            if self.apart == 0:  # all heads of a row come along
                found = sbuf((rows, self.tokens, pool.shape[2], pool.shape[3]), pool.dtype)
                nisa.dma_copy(found, pool.vector_select(0, column))
                views.append(found[:, :, head, :])
            else:
                own = pool[head * self.apart :]
                nisa.dma_copy(whole[:, h], own.vector_select(0, column))
                views.append(whole[:, h])
        return views
