"""Who selected each block: `block_indices` turned round, as CSR lists and work items.

Built with PyTorch's own device operations: a stable sort by block (on a GPU a radix sort, that is a
counting sort per digit), a binary search for where each block's list starts, and prefix sums. All
of them are deterministic and none waits for the device. Sorting takes about 50 bytes of memory per
pair, so long inputs are sorted a segment at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of a batch: all of some rows, or a part of one row.

    Attributes:
        rows: of the batch. tokens: of each of these rows.
    """

    rows: slice
    tokens: slice


@dataclass(frozen=True)
class Pairs:
    """The (query, block) pairs of a segment, sorted by block, and then by query.

    Blocks are numbered over the segment's rows of the batch, kv heads and (packed) sequences:
    `(row * Hkv + head) * blocks_per_head + first block of the sequence + id`.

    Attributes:
        queries: int32 [entries], token number (of its row of the batch) of each entry.
        order: int64 [entries], position of each entry in the segment's flattened `block_indices`.
        used: int8, flattened `block_indices`: 1 for the pairs that are in the lists.
        place: int64 [entries], ascending: block * tokens + token number in the segment.
        tokens: of all rows of the segment. first_token: of the segment, in the flattened batch.
        per_token: Hkv * n. blocks, blocks_per_head: numbers of blocks.
    """

    segment: Segment
    queries: Tensor
    order: Tensor
    used: Tensor
    place: Tensor
    tokens: int
    first_token: int
    per_token: int
    blocks: int
    blocks_per_head: int


@dataclass(frozen=True)
class WorkItems:
    """The lists cut in passes over the tokens, and each pass's part of a list in work items.

    Attributes:
        passes: first and last + 1 token of each pass, in the segment.
        list_start: int64 [passes + 1, columns], columns > blocks: first entry of each block from a
            pass on; where it ends in a pass is where it starts in the next one.
        item_start: int32 [passes, columns], first work item of each block; that of column `blocks`
            is their number.
        slot_start: int32 [passes, columns], first workspace slot of each block of several items.
        item_block: int32 [passes, bound], block of each item.
        bound, slots: most items and slots of a pass, known from shapes alone.
    """

    passes: tuple[tuple[int, int], ...]
    list_start: Tensor
    item_start: Tensor
    slot_start: Tensor
    item_block: Tensor
    bound: int
    slots: int


def segments(block_indices: Tensor, most_pairs: int, step: int) -> Iterator[Segment]:
    """Cuts a batch in segments of at most `most_pairs` pairs; parts of a row in multiples of `step`
    tokens, at least one."""
    batch, tokens, kv_heads, num_selected = block_indices.shape
    fit = max(1, most_pairs // max(1, kv_heads * num_selected))
    rows = max(1, fit // max(1, tokens))
    part = max(1, tokens) if fit >= tokens else max(1, fit // step) * step
    for row in range(0, batch, rows):
        for first in range(0, tokens, part):
            yield Segment(
                slice(row, min(row + rows, batch)), slice(first, min(first + part, tokens))
            )


def sort_pairs(
    block_indices: Tensor,
    segment: Segment,
    keys: int,
    select_block: int,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Pairs:
    """Sorts the (query, block) pairs of a segment by block.

    Args:
        block_indices: int32 [B, S, Hkv, n], contiguous. keys: T.

    Pairs with a negative id, or with a block that starts after the query, are left out.
    """
    all_tokens, device = block_indices.shape[1], block_indices.device
    first = segment.tokens.start
    ids = block_indices[segment.rows, segment.tokens]
    rows, count, kv_heads, num_selected = ids.shape
    token = torch.arange(first, first + count, device=device, dtype=torch.int32)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), token, right=True)
        ends = cu_seqlens_k[1:] - cu_seqlens_q[1:]
        position = token + ends[sequence] - cu_seqlens_k[:-1][sequence]
        first_block = cu_seqlens_k[:-1][sequence] // select_block + sequence
        blocks_per_head = keys // select_block + cu_seqlens_q.shape[0] - 1
    else:
        position = token + (keys - all_tokens)
        first_block = torch.zeros_like(token)
        blocks_per_head = -(-keys // select_block)
    blocks = rows * kv_heads * blocks_per_head

    heads = torch.arange(rows * kv_heads, device=device, dtype=torch.int32)
    heads = heads.view(rows, 1, kv_heads, 1) * blocks_per_head
    number = heads + first_block.to(torch.int32).view(1, -1, 1, 1) + ids
    last = torch.div(position, select_block, rounding_mode="floor").view(1, -1, 1, 1)
    used = (ids >= 0) & (ids <= last)
    # A radix sort passes over the pairs once per byte of the key.
    narrow = torch.int16 if blocks <= torch.iinfo(torch.int16).max else torch.int32
    number = torch.where(used, number, blocks).to(narrow).flatten()
    number, order = torch.sort(number, stable=True)
    per_token = kv_heads * num_selected
    owner = order // per_token
    return Pairs(
        segment,
        queries=(owner % count + first).to(torch.int32),
        order=order,
        used=used.view(torch.int8).flatten(),
        place=number.long() * (rows * count) + owner,
        tokens=rows * count,
        first_token=segment.rows.start * all_tokens + first,
        per_token=per_token,
        blocks=blocks,
        blocks_per_head=blocks_per_head,
    )


def cut(pairs: Pairs, chunk: int, tokens_per_pass: int) -> WorkItems:
    """Cuts the lists in passes of so many tokens, and these in items of at most `chunk` queries."""
    device, step = pairs.order.device, max(1, min(tokens_per_pass, pairs.tokens))
    starts = range(0, pairs.tokens, step)
    first = (torch.arange(len(starts) + 1, device=device) * step).clamp_(max=pairs.tokens)
    block = torch.arange(_aligned(pairs.blocks + 1), device=device) * pairs.tokens
    list_start = torch.searchsorted(pairs.place, block + first[:, None])
    items = torch.div(list_start.diff(dim=0) + (chunk - 1), chunk, rounding_mode="floor")
    item_end = items.cumsum(1, dtype=torch.int32)
    slots = torch.where(items > 1, items, 0)
    full_items = step * pairs.per_token // chunk
    bound = _aligned(pairs.blocks + full_items)
    item = torch.arange(bound, device=device, dtype=torch.int32).repeat(len(starts), 1)
    return WorkItems(
        passes=tuple((start, min(start + step, pairs.tokens)) for start in starts),
        list_start=list_start,
        item_start=item_end - items.to(torch.int32),
        slot_start=slots.cumsum(1, dtype=torch.int32) - slots.to(torch.int32),
        item_block=torch.searchsorted(item_end, item, right=True, out_int32=True),
        bound=bound,
        slots=2 * full_items,
    )


def _aligned(count: int) -> int:
    """`count` rounded up so that every row of a table begins on 16 bytes: Triton compiles a kernel
    once more for a pointer that does not."""
    return -(-count // 4) * 4
