"""Caches cut in rows that one DMA gathers, and what of them queries see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PARTITIONS = 128

ROW_BYTES = 12_288
"""Of the keys of a row on a partition: long rows need few descriptors, several tiles overlap."""

BLOCK_BYTES = 50_000
"""Of a partition for the keys that all kv heads of a program have in 128 rows of chosen blocks."""


@dataclass(frozen=True)
class Seen:
    """Rows of a sequence that a branch reads, and what of them its queries see.

    Attributes:
        index: int32 [B, 128, tiles], row of the pool on each partition, 128 rows a tile.
        kept: [B, 128, tiles * t], -1 for tokens that some query sees, else 0.
        bounds: [B, S, 2 t]: for token j of a row the first and last row that shows it.
        rows: how many.
    """

    index: Tensor
    kept: Tensor
    bounds: Tensor
    rows: int


@dataclass(frozen=True)
class Cache:
    """A cache cut in rows of some neighbouring tokens; see `nki_kernels/decode/caches.py`.

    Caches whose pages hold a kv head's tokens together (the transpose of a contiguous
    [pages, Hkv, page, D]) are taken as they are, so that a chosen block of one head is one piece;
    of contiguous ones the chosen blocks of all heads are read, or single tokens of one head if
    that would be too much. Others are copied.

    Attributes:
        k, v: [rows, tokens, Hkv, D], or [rows, tokens, D] if a head's tokens lie together.
        apart: rows from a kv head to the next of a page; 0: a row holds all of them.
        tokens: of a row.
        numbers: int32 [B, rows of a sequence], of kv head 0; entries that may hold anything are
            some row. Of selection blocks: [B, blocks], the first row of each.
        step: from a row to the next of the same head.
    """

    k: Tensor
    v: Tensor
    apart: int
    tokens: int
    numbers: Tensor
    step: int

    @classmethod
    def of(cls, k: Tensor, v: Tensor, table: Tensor, heads: int, most: int | None = None) -> Cache:
        """Pools [pages, page, Hkv, D] and a table of pages [B, most pages].

        Args:
            heads: kv heads that a program serves.
            most: tokens of a row; None: what `ROW_BYTES` allows.
        """
        together = _heads_first(k) and _heads_first(v)
        size = max(k.shape[3], v.shape[3]) * k.element_size()
        at_once = size * (heads if together else k.shape[2])
        if at_once > ROW_BYTES and not together:
            return cls._cut(k, v, table, 1, k.shape[1], 1, single=True)
        limit = max(1, ROW_BYTES // at_once)
        tokens = _divisor(k.shape[1], limit if most is None else min(limit, most))
        return cls._cut(k, v, table, tokens, k.shape[1] // tokens, 1)

    @classmethod
    def of_blocks(
        cls, k: Tensor, v: Tensor, table: Tensor, block: int, chosen: int, heads: int
    ) -> Cache:
        """The same for selection blocks: the rows of all that a query chooses fill 128 partitions,
        if that is possible."""
        tokens = row_of_block(block, chosen)
        if not (_heads_first(k) and _heads_first(v)):
            size = max(k.shape[3], v.shape[3]) * k.element_size()
            if reads_single_tokens(tokens, k.shape[2], heads, size):
                return cls._cut(k, v, table, 1, k.shape[1] // block, block, single=True)
        return cls._cut(k, v, table, tokens, k.shape[1] // block, block // tokens)

    @classmethod
    def _cut(
        cls, k: Tensor, v: Tensor, table: Tensor, tokens: int, steps: int, rows: int,
        *, single: bool = False,
    ) -> Cache:  # fmt: skip
        """`steps` numbers for each page, `rows` rows from each to the next.

        single: a row is a token of one head, and a token's heads lie one after the other.
        """
        pages, page, kv_heads = k.shape[:3]
        per_page = page // tokens
        together = _heads_first(k) and _heads_first(v) and not single
        apart = 1 if single else per_page if together else 0
        at = torch.arange(steps, device=table.device) * rows * (kv_heads if single else 1)
        first = table.clamp(0, pages - 1).long() * per_page * (kv_heads if apart else 1)
        numbers = (first[..., None] + at).flatten(1).int()
        if apart:
            k, v = (x.transpose(1, 2) if together else x for x in (k, v))
            k, v = (x.reshape(-1, tokens, x.shape[3]) for x in (k, v))
        else:
            k, v = (x.reshape(-1, tokens, *x.shape[2:]) for x in (k, v))
        return cls(k, v, apart, tokens, numbers, kv_heads if single else 1)

    def at_least(self, count: int) -> Tensor:
        """`numbers` with at least `count` columns."""
        return F.pad(self.numbers, (0, max(0, count - self.numbers.shape[1])))

    def seen(self, numbers: Tensor, low: Tensor, high: Tensor) -> Seen:
        """Rows `numbers` [B, rows], of whose tokens queries see `low` .. `high` [B, S]."""
        batch, rows = numbers.shape
        token = torch.arange(self.tokens, device=low.device)
        bounds = torch.cat((
            torch.div(low[..., None] - token + self.tokens - 1, self.tokens, rounding_mode="floor"),
            torch.div(high[..., None] - token, self.tokens, rounding_mode="floor"),
        ), -1)  # fmt: skip
        tiles = -(-rows // PARTITIONS)
        place = torch.arange(tiles * PARTITIONS * self.tokens, device=low.device)
        kept = (place >= low[:, :1]) & (place <= high[:, -1:])
        whole = torch.int32 if self.k.element_size() == 4 else torch.int16
        bits = -kept.to(whole).view(batch, tiles, PARTITIONS, self.tokens).transpose(1, 2)
        index = F.pad(numbers, (0, tiles * PARTITIONS - rows)).view(batch, tiles, PARTITIONS)
        return Seen(index.mT.contiguous(), bits.flatten(2).contiguous(), bounds, rows)

    def of_window(self, position: Tensor, window: int) -> Seen:
        """Rows that hold the windows of queries at `position` [B, S]."""
        tokens, total = self.tokens, self.numbers.shape[1]
        count = min((window + position.shape[1] - 3) // tokens + 2, total)
        low = (position - window + 1).clamp(min=0)
        first = torch.div(low[:, :1], tokens, rounding_mode="floor")
        index = (first + torch.arange(count, device=first.device)).clamp(max=total - 1)
        rows = self.numbers.gather(1, index)
        return self.seen(rows, low - first * tokens, position - first * tokens)


def row_of_block(block: int, chosen: int) -> int:
    """Tokens of a row of a selection block: the fewest with which the rows of all chosen blocks fit
    128 partitions."""
    least = -(-min(chosen, PARTITIONS) * block // PARTITIONS)
    return next(size for size in range(min(least, block), block + 1) if block % size == 0)


def reads_single_tokens(tokens: int, kv_heads: int, heads: int, size: int) -> bool:
    """Whether rows of so many tokens of all kv heads are too much to read for each of `heads`.

    size: bytes of a key or value.
    """
    return heads * tokens * kv_heads * size > BLOCK_BYTES


def _heads_first(x: Tensor) -> bool:
    """Whether a pool [pages, page, Hkv, D] has the tokens of a page's kv head together."""
    return x.shape[2] > 1 and x.shape[1] > 1 and x.transpose(1, 2).is_contiguous()


def _divisor(count: int, most: int) -> int:
    """The largest divisor of `count` that is no larger than `most`."""
    return next(size for size in range(min(count, most), 0, -1) if count % size == 0)
