"""Launches `cuda_kernels/select_blocks.py`: importance and top-n in one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_neuron.backends.cuda.launch.common import (
    Plan,
    addressable,
    count_tiles,
    split_head_dim,
    strides,
)
from nsa_neuron.backends.cuda.launch.compressed_attention import packed_offsets


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
    constants = dict(plan["forward"])
    columns, keys = constants.pop("COLUMNS"), constants.pop("KEYS")
    capacity, programs = constants.pop("SCORES"), constants.pop("PROGRAMS")
    q, k_cmp, lse = addressable(q), addressable(k_cmp), lse.contiguous()
    batch, tokens, heads, dk = q.shape
    kv_heads = k_cmp.shape[2]
    group = heads // kv_heads
    padded_group = _next_power_of_two(group)
    per_tile = max(1, columns // padded_group)
    ratio = _next_power_of_two(select_block // stride)
    blocks = max(1, keys // ratio)
    kept = max(_next_power_of_two(num_selected), blocks)
    slots = _next_power_of_two(-(-kv_len // select_block) + kept)
    slots = max(min(slots, capacity // per_tile), 2 * kept)

    cu_q, cu_k, cu_cmp, num_seqs = packed_offsets(cu_seqlens_q, cu_seqlens_k, block, stride, lse)
    tiles = count_tiles(tokens, 1, per_tile, num_seqs)
    programs = min(programs, tiles * kv_heads * batch)
    indices = q.new_empty(batch, tokens, kv_heads, num_selected, dtype=torch.int32)
    scores = q.new_empty(programs, per_tile, slots, dtype=torch.float32)
    carried_ids = q.new_empty(programs, per_tile, kept, dtype=torch.int32)
    d0, d1 = split_head_dim(dk)
    kernels.forward[(programs,)](
        q, k_cmp, lse, indices, scores, carried_ids, cu_q, cu_k, cu_cmp, num_seqs,
        tokens, kv_len, heads, kv_heads * batch, tiles, scale, *strides(q, k_cmp),
        G=group, GP=padded_group, DK=dk, D0=d0, D1=d1, BLOCK=block, STRIDE=stride,
        SELECT=select_block, N=num_selected, NP=kept, INITIAL=num_initial, LOCAL=num_local,
        PACKED=num_seqs > 0, TOKENS=per_tile, BLOCKS=blocks, RATIO=ratio, SLOTS=slots, **constants,
    )  # fmt: skip
    return indices


def _next_power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()
