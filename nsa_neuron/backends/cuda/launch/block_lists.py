"""Who selected each block: `block_indices` turned round, as CSR lists and work items.

Built with PyTorch's own device operations: a stable sort by block (on a GPU a radix sort, that is a
counting sort per digit), a binary search for where each block's list starts, and prefix sums. All
of them are deterministic and none waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockLists:
    """Queries sorted by the block that they selected, and the lists cut in work items.

    Blocks are numbered over batches, kv heads and (packed) sequences:
    `(batch * Hkv + head) * blocks_per_head + first block of the sequence + id`.

    Attributes:
        queries: int32 [entries], token number of each entry; ascending within a block.
        order: int64 [entries], position of each entry in the flattened `block_indices`.
        used: bool, shape of `block_indices`: the pairs that are in the lists.
        list_start: int64 [blocks + 1], first entry of each block.
        item_start: int32 [blocks + 1], first work item of each block; the last is their number.
        slot_start: int32 [blocks + 1], first workspace slot of each block of several items.
        item_block: int32 [items], block of each item.
        blocks, blocks_per_head: numbers of blocks. items, slots: bounds known from shapes alone.
    """

    queries: Tensor
    order: Tensor
    used: Tensor
    list_start: Tensor
    item_start: Tensor
    slot_start: Tensor
    item_block: Tensor
    blocks: int
    blocks_per_head: int
    items: int
    slots: int


def block_lists(
    block_indices: Tensor,
    first_token: int,
    tokens: int,
    keys: int,
    select_block: int,
    chunk: int,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> BlockLists:
    """Sorts the (query, block) pairs of some tokens by block.

    Args:
        block_indices: int32 [B, n_tokens, Hkv, n], rows of the tokens from `first_token` on.
        tokens, keys: S and T of the whole batch.
        chunk: most queries in one work item.

    Pairs with a negative id, or with a block that starts after the query, are left out.
    """
    batch, count, kv_heads, _ = block_indices.shape
    device = block_indices.device
    token = torch.arange(first_token, first_token + count, device=device)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), token, right=True)
        ends = cu_seqlens_k[1:].long() - cu_seqlens_q[1:]
        position = token + ends[sequence] - cu_seqlens_k[:-1][sequence]
        first_block = cu_seqlens_k[:-1][sequence] // select_block + sequence
        blocks_per_head = keys // select_block + cu_seqlens_q.shape[0] - 1
    else:
        position = token + (keys - tokens)
        first_block = torch.zeros_like(token)
        blocks_per_head = -(-keys // select_block)
    blocks = batch * kv_heads * blocks_per_head

    heads = torch.arange(batch * kv_heads, device=device).view(batch, 1, kv_heads, 1)
    number = heads * blocks_per_head + first_block.view(1, -1, 1, 1) + block_indices
    last = torch.div(position, select_block, rounding_mode="floor").view(1, -1, 1, 1)
    used = (block_indices >= 0) & (block_indices <= last)
    number = torch.where(used, number, blocks).to(torch.int32).flatten()
    number, order = torch.sort(number, stable=True)
    per_token = block_indices[0, 0].numel()
    queries = (order // per_token % count + first_token).to(torch.int32)

    edges = torch.arange(blocks + 1, device=device, dtype=torch.int32)
    list_start = torch.searchsorted(number, edges)
    lengths = list_start[1:] - list_start[:-1]
    item_counts = torch.div(lengths + (chunk - 1), chunk, rounding_mode="floor")
    item_start = _starts(item_counts)
    slot_start = _starts(torch.where(item_counts > 1, item_counts, 0))
    full_items = number.shape[0] // chunk
    items = blocks + full_items
    item_block = torch.searchsorted(
        item_start[1:].contiguous(),
        torch.arange(items, device=device, dtype=torch.int32),
        right=True,
        out_int32=True,
    )
    return BlockLists(
        queries, order, used, list_start, item_start, slot_start, item_block, blocks,
        blocks_per_head, items, 2 * full_items,
    )  # fmt: skip


def _starts(counts: Tensor) -> Tensor:
    """Exclusive prefix sums with the total at the end, int32."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
