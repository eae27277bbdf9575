"""Ids of chosen blocks, and the masks that they mean, for the tests of `selected_attention`."""

from __future__ import annotations

import masked_oracle as oracle
import torch


def random_ids(
    queries: int, keys: int, kv_heads: int, slots: int, select_block: int, seed: int = 0
) -> torch.Tensor:
    """int32 [1, S, Hkv, n]: 0 to n distinct visible blocks, ascending, -1 on the right."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.full((1, queries, kv_heads, slots), -1, dtype=torch.int32)
    for s in range(queries):
        visible = (keys - queries + s) // select_block + 1
        for h in range(kv_heads):
            count = int(torch.randint(0, slots + 1, (), generator=gen))
            chosen = torch.randperm(visible, generator=gen)[:count].sort().values
            ids[0, s, h, : len(chosen)] = chosen
    return ids


def mask_of(ids: torch.Tensor, keys: int, select_block: int, group: int) -> torch.Tensor:
    """[1, Hq, S, keys]: tokens of a row's blocks, up to its own position."""
    blocks = torch.arange(keys) // select_block
    chosen = (ids[..., None] == blocks).any(-2)
    chosen = chosen.permute(0, 2, 1, 3).repeat_interleave(group, 1)
    return chosen & oracle.causal(ids.shape[1], keys)
