"""Launches `cuda_kernels/select_blocks.py`: importance and top-n in one kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_neuron.backends.cuda.launch.common import (
    Plan,
    addressable,
    count_tiles,
    next_power_of_two,
    split_head_dim,
    strides,
)
from nsa_neuron.backends.cuda.launch.compressed_attention import packed_offsets

if TYPE_CHECKING:
    from collections.abc import Mapping

_LAUNCH_CONSTANTS = ("COLUMNS", "KEYS", "SCORES", "PROGRAMS")


def forward(
    kernels: Any,
    plan: Plan,
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    kv_len: int,
    block: int,
    stride: int,
    select_block: int,
    num_selected: int,
    num_initial: int,
    num_local: int,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """Selected blocks of each query and kv head.

    Args:
        kernels: the module `cuda_kernels.select_blocks`, compiled or interpreted.
        plan: constants of the kernel `forward`, and of the launch: COLUMNS (queries times padded
            heads per tile), KEYS (compressed blocks per tile), SCORES (block scores per tile that
            are kept at a time) and PROGRAMS (how many stay resident on the device).
        q: [B, S, Hq, Dk]; k_cmp: [B, Nc, Hkv, Dk]; lse: float32 [B, S, Hq] of compressed attention.
        kv_len: T; block, stride, select_block: tokens. num_selected: n, the forced ones included.

    Returns:
        Block ids int32 [B, S, Hkv, n], ascending, -1 padded, local to the sequence.
    """
    q, k_cmp, lse = addressable(q), addressable(k_cmp), lse.contiguous()
    batch, tokens, heads, dk = q.shape
    kv_heads = k_cmp.shape[2]
    group = heads // kv_heads
    selectable = -(-kv_len // select_block)
    constants = tile_constants(
        plan["forward"], group, select_block // stride, num_selected, selectable
    )
    per_tile, kept, slots = constants["TOKENS"], constants["NP"], constants["SLOTS"]

    cu_q, cu_k, cu_cmp, num_seqs = packed_offsets(
        kernels, plan, cu_seqlens_q, cu_seqlens_k, block, stride, lse
    )
    tiles = count_tiles(tokens, 1, per_tile, num_seqs)
    programs = min(plan["forward"]["PROGRAMS"], tiles * kv_heads * batch)
    indices = q.new_empty(batch, tokens, kv_heads, num_selected, dtype=torch.int32)
    scores = q.new_empty(programs, per_tile, slots, dtype=torch.float32)
    carried_ids = q.new_empty(programs, per_tile, kept, dtype=torch.int32)
    d0, d1 = split_head_dim(dk)
    kernels.forward[(programs,)](
        q, k_cmp, lse, indices, scores, carried_ids, cu_q, cu_k, cu_cmp, num_seqs,
        tokens, kv_len, heads, kv_heads * batch, tiles, scale, *strides(q, k_cmp),
        DK=dk, D0=d0, D1=d1, BLOCK=block, STRIDE=stride, SELECT=select_block, N=num_selected,
        INITIAL=num_initial, LOCAL=num_local, PACKED=num_seqs > 0, **constants,
    )  # fmt: skip
    return indices


def tile_constants(
    planned: Mapping[str, Any], group: int, ratio: int, num_selected: int, selectable: int
) -> dict[str, Any]:
    """The kernel's tile sizes, from the plan's COLUMNS, KEYS and SCORES.

    Args:
        group: query heads per kv head. ratio: strides per selection block.
        selectable: selection blocks of the longest sequence.
    """
    passed = {k: v for k, v in planned.items() if k not in _LAUNCH_CONSTANTS}
    padded_group, padded_ratio = next_power_of_two(group), next_power_of_two(ratio)
    tokens = max(1, planned["COLUMNS"] // padded_group)
    blocks = max(1, planned["KEYS"] // padded_ratio)
    kept = max(next_power_of_two(num_selected), blocks)
    slots = min(next_power_of_two(selectable + kept), planned["SCORES"] // tokens)
    return {
        "G": group, "GP": padded_group, "TOKENS": tokens, "BLOCKS": blocks, "RATIO": padded_ratio,
        "NP": kept, "SLOTS": max(slots, 2 * kept), **passed,
    }  # fmt: skip
