"""Launches `nki_kernels/decode`: new tokens against paged KV caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_neuron.backends.neuron.launch.ranges import positive_scale

if TYPE_CHECKING:
    from nsa_neuron.backends.neuron.plans import Plan
    from nsa_neuron.backends.neuron.run import Kernels

PARTITIONS = 128
MIN_BLOCKS = 8
"""What VectorE's search for the largest wants at least."""

ROW_BYTES = 12_288
"""Of the keys of a row on a partition: long rows need few descriptors, several tiles overlap."""

HELD_BYTES = 100_000
"""Of 212,984 bytes per partition, what logits and ranks of one sequence may take."""

OVERLAP_BYTES = 72_000
"""The same where two sequences overlap, whose keys and values fill the rest."""

BLOCK_BYTES = 50_000
"""Of a partition for the keys that all kv heads of a program have in 128 rows of chosen blocks."""


def forward(
    kernels: Kernels,
    plan: Plan,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    seqlens: Tensor,
    cmp_table: Tensor,
    slc_table: Tensor,
    win_table: Tensor,
    *,
    block: int,
    stride: int,
    select_block: int,
    num_selected: int,
    num_initial: int,
    num_local: int,
    window: int,
    scale: float,
) -> Tensor:
    """o [B, S, Hq, Dv] of q [B, S, Hq, Dk] against pools [pages, page, Hkv, D].

    As many queries at a time as 128 partitions hold with all heads of a group.
    """
    q, scale = positive_scale(q, scale)
    queries, heads = q.shape[1:3]
    kv_heads = k_cmp.shape[2]
    step = PARTITIONS // (heads // kv_heads)
    found = []
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        rows = Rows.of(q[:, start:stop], kv_heads, kernels.cores)
        far = Cache.of(k_cmp, v_cmp, cmp_table, rows.per_group)
        near = Cache.of(k_win, v_win, win_table, rows.per_group)
        blocks = Cache.of_blocks(
            k_slc, v_slc, slc_table, select_block, num_selected, rows.per_group
        )
        position = seqlens.long()[:, None] + torch.arange(
            start - queries, stop - queries, device=q.device
        )
        last_block = torch.div(position + 1 - block, stride, rounding_mode="floor")
        compressed = far.seen(far.numbers, torch.zeros_like(position), last_block)
        window_rows = near.of_window(position, window)
        own = torch.div(position, select_block, rounding_mode="floor")
        table = blocks.at_least(MIN_BLOCKS)
        base = torch.arange(len(table), device=q.device)[:, None] * table.shape[1]
        base = base.expand_as(position)
        gates_of_rows = rows.by_group(gates[:, start:stop].float())
        bounds = rows.per_row(torch.cat((compressed.bounds, window_rows.bounds), -1))
        bounds = bounds[:, None].expand(-1, gates_of_rows.shape[1], -1, -1)
        taken = min(num_selected, blocks.numbers.shape[1])
        parts = select_block // blocks.tokens
        (o,) = kernels.decode(
            rows.columns(q[:, start:stop]),
            torch.cat((compressed.index, window_rows.index), -1),
            torch.cat((compressed.kept, window_rows.kept), -1),
            torch.cat((gates_of_rows, bounds), -1).contiguous(),
            rows.per_pair(torch.stack((own, own - num_local, position + 1, base), -1)),
            table.view(-1, 1), rows.owners.to(q.device), rows.rows_of.to(q.device),
            torch.eye(taken, device=q.device).repeat_interleave(parts, 1),
            (torch.arange(PARTITIONS, device=q.device) % parts)[:, None].float(),
            far.k, far.v, blocks.k, blocks.v, near.k, near.v, step=blocks.step,
            apart=(far.apart, blocks.apart, near.apart), rows=(compressed.rows, window_rows.rows),
            length=block // stride, ratio=select_block // stride, chosen=taken,
            initial=num_initial, scale=scale,
            per_body=sequences_at_once(compressed.rows * far.tokens, table.shape[1], q),
        )  # fmt: skip
        found.append(rows.heads(o))
    return torch.cat(found, 1)


def sequences_at_once(keys: int, blocks: int, q: Tensor) -> int:
    """Sequences that overlap in one program: what SBUF has room for; 0: not even for the logits of
    one.

    Args:
        keys: of the compressed branch. blocks: that are ranked.
    """
    # Logits, exponentials in two forms, and ranks twice; the next one's logits.
    one = keys * (8 + q.element_size()) + 8 * blocks
    if one > HELD_BYTES:
        return 0
    return 4 if one + 4 * keys <= OVERLAP_BYTES // (2 if q.element_size() == 4 else 1) else 1


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
    def of(cls, k: Tensor, v: Tensor, table: Tensor, heads: int) -> Cache:
        """Pools [pages, page, Hkv, D] and a table of pages [B, most pages].

        Args:
            heads: kv heads that a program serves.
        """
        together = _heads_first(k) and _heads_first(v)
        size = max(k.shape[3], v.shape[3]) * k.element_size()
        at_once = size * (heads if together else k.shape[2])
        if at_once > ROW_BYTES and not together:
            return cls._cut(k, v, table, 1, k.shape[1], 1, single=True)
        tokens = _divisor(k.shape[1], max(1, ROW_BYTES // at_once))
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


@dataclass(frozen=True)
class Rows:
    """How rows lie on partitions: kv heads on `pitch` partitions each, `per_group` at a time.

    Attributes:
        queries, kv_heads, group: S, Hkv, G.
    """

    queries: int
    kv_heads: int
    group: int
    pitch: int
    per_group: int

    @classmethod
    def of(cls, q: Tensor, kv_heads: int, cores: int) -> Rows:
        """For q [B, S, Hq, Dk]; heads in two groups at least where two cores must share them."""
        queries, group = q.shape[1], q.shape[2] // kv_heads
        pitch = next(size for size in (32, 64, PARTITIONS) if size >= queries * group)
        most = PARTITIONS // pitch
        if q.shape[0] % cores and kv_heads % cores == 0:
            most = min(most, kv_heads // cores)
        per_group = next(size for size in range(most, 0, -1) if kv_heads % size == 0)
        return cls(queries, kv_heads, group, pitch, per_group)

    def by_group(self, x: Tensor) -> Tensor:
        """[B, S, Hq, C] as [B, groups, rows, C], zero where a partition has no row."""
        heads: Tensor = x.unflatten(2, (self.kv_heads, self.group))
        rows = heads.transpose(1, 2).flatten(2, 3)
        rows = F.pad(rows, (0, 0, 0, self.pitch - rows.shape[2]))
        return rows.reshape(x.shape[0], -1, self.per_group * self.pitch, x.shape[3]).contiguous()

    def columns(self, x: Tensor) -> Tensor:
        """The same as [B, groups, C, rows]."""
        return self.by_group(x).mT.contiguous()

    def per_row(self, x: Tensor) -> Tensor:
        """Numbers of queries [B, S, C] as float32 [B, rows, C], -1 where there is no row."""
        rows = x.repeat_interleave(self.group, 1).float()
        rows = F.pad(rows, (0, 0, 0, self.pitch - rows.shape[1]), value=-1.0)
        return rows.repeat(1, self.per_group, 1)

    def per_pair(self, x: Tensor) -> Tensor:
        """Numbers of queries [B, S, C] as float32 [B, kv heads of a group * S, C]."""
        return x.float().repeat(1, self.per_group, 1)

    def heads(self, o: Tensor) -> Tensor:
        """[B, groups, rows, Dv] as [B, S, Hq, Dv]."""
        rows = o.reshape(o.shape[0], self.kv_heads, self.pitch, o.shape[3])
        live = rows[:, :, : self.queries * self.group]
        heads: Tensor = live.unflatten(2, (self.queries, self.group))
        return heads.transpose(1, 2).flatten(2, 3).contiguous()

    @property
    def owners(self) -> Tensor:
        """float32 [rows, pairs]: 1 where a row is one of the heads of a (kv head, query) pair."""
        own = torch.zeros(self.per_group, self.pitch, self.per_group, self.queries)
        for head in range(self.per_group):
            for query in range(self.queries):
                rows = slice(query * self.group, (query + 1) * self.group)
                own[head, rows, head, query] = 1.0
        return own.flatten(2, 3).flatten(0, 1)

    @property
    def rows_of(self) -> Tensor:
        """float32 [pairs, S, rows]: the same for pairs of one query at a time."""
        own = self.owners.T
        query = torch.arange(len(own)) % self.queries
        return own[:, None, :] * (query[:, None] == torch.arange(self.queries))[..., None]
