"""Launches `cuda_kernels/compressed_attention.py`: attention over compressed blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_neuron.backends.cuda.launch.blocks import compressed_offsets
from nsa_neuron.backends.cuda.launch.common import (
    Plan,
    addressable,
    count_tiles,
    head_dim_constants,
    launch_delta,
    packed_args,
    strides,
)


def forward(
    kernels: Any,
    plan: Plan,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    kv_len: int,
    block: int,
    stride: int,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, S, Hq, Dk] over k_cmp [B, Nc, Hkv, Dk], v_cmp [B, Nc, Hkv, Dv].

    Args:
        kernels: the module `cuda_kernels.compressed_attention`, compiled or interpreted.
        plan: constants of the kernel `forward`.
        kv_len: T, raw tokens that the blocks were made of (total tokens of a packed batch).
        block, stride: tokens per compressed block and between two of them.
        cu_seqlens_k: int32 [N + 1], offsets of the raw tokens.

    Returns:
        o [B, S, Hq, Dv] in q's dtype and lse [B, S, Hq] float32 (natural logarithm).
    """
    constants = dict(plan["forward"])
    q, k_cmp, v_cmp = addressable(q), addressable(k_cmp), addressable(v_cmp)
    batch, tokens, heads, dk = q.shape
    kv_heads, dv = v_cmp.shape[2:]
    o = q.new_empty(batch, tokens, heads, dv)
    lse = q.new_empty(batch, tokens, heads, dtype=torch.float32)
    cu_q, cu_k, cu_cmp, num_seqs = packed_offsets(
        kernels, plan, cu_seqlens_q, cu_seqlens_k, block, stride, lse
    )
    group = heads // kv_heads
    grid = (count_tiles(tokens, group, constants["BLOCK_M"], num_seqs), kv_heads, batch)
    kernels.forward[grid](
        q, k_cmp, v_cmp, o, lse, cu_q, cu_k, cu_cmp, num_seqs, tokens, kv_len, heads, scale,
        *strides(q, k_cmp, v_cmp), G=group, BLOCK=block, STRIDE=stride, PACKED=num_seqs > 0,
        **head_dim_constants(dk, dv), **constants,
    )  # fmt: skip
    return o, lse


def backward(
    kernels: Any,
    plan: Plan,
    grad_o: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    o: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None = None,
    *,
    kv_len: int,
    block: int,
    stride: int,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` with respect to q, k_cmp and v_cmp, contiguous, in their dtypes.

    Args:
        plan: constants of `backward_delta`, `backward_dq`, `backward_dkv` (with SPLITS, see the
            kernel) and `reduce_splits`.
        grad_o: [B, S, Hq, Dv]; grad_lse: float32 [B, S, Hq] or None for zero.
        delta: what `backward_delta` would give, float32 [B, S, Hq], where it is known already.
    """
    q, k_cmp, v_cmp, grad_o = (addressable(x) for x in (q, k_cmp, v_cmp, grad_o))
    lse = lse.contiguous()
    batch, tokens, heads, dk = q.shape
    blocks, kv_heads, dv = v_cmp.shape[1:]
    if delta is None:
        delta = launch_delta(kernels, plan, grad_o, o, lse, grad_lse)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    cu_q, cu_k, cu_cmp, num_seqs = packed_offsets(
        kernels, plan, cu_seqlens_q, cu_seqlens_k, block, stride, lse
    )
    group = heads // kv_heads
    shared = {"G": group, "BLOCK": block, "STRIDE": stride, "PACKED": num_seqs > 0}
    shared |= head_dim_constants(dk, dv)

    constants = dict(plan["backward_dq"])
    grid = (count_tiles(tokens, group, constants["BLOCK_M"], num_seqs), kv_heads, batch)
    kernels.backward_dq[grid](
        q, k_cmp, v_cmp, grad_o, lse, delta, dq, cu_q, cu_k, cu_cmp, num_seqs, tokens, kv_len,
        heads, scale, *strides(q, k_cmp, v_cmp, grad_o), **shared, **constants,
    )  # fmt: skip

    constants = dict(plan["backward_dkv"])
    splits = constants["SPLITS"]
    # The rows behind the last block of a packed batch belong to no sequence: nobody writes them.
    allocate = torch.zeros if num_seqs else torch.empty
    parts = [
        allocate(splits, *x.shape, device=x.device, dtype=x.dtype if splits == 1 else torch.float32)
        for x in (k_cmp, v_cmp)
    ]
    if blocks > 0:
        tiles = count_tiles(blocks, 1, constants["BLOCK_N"], num_seqs)
        kernels.backward_dkv[(tiles * splits, kv_heads, batch)](
            q, k_cmp, v_cmp, grad_o, lse, delta, *parts, cu_q, cu_k, cu_cmp, num_seqs, tokens,
            kv_len, blocks, heads, scale, *strides(q, k_cmp, v_cmp, grad_o), **shared, **constants,
        )  # fmt: skip
    d_k, d_v = (
        _reduce(kernels, plan, part, x) for part, x in zip(parts, (k_cmp, v_cmp), strict=True)
    )
    return dq, d_k, d_v


def packed_offsets(
    kernels: Any,
    plan: Plan,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block: int,
    stride: int,
    placeholder: Tensor,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """cu_q, cu_k, cu_cmp and the number of sequences (`placeholder`s and 0 when not packed)."""
    cu_q, cu_k, num_seqs = packed_args(cu_seqlens_q, cu_seqlens_k, placeholder)
    if not num_seqs:
        return cu_q, cu_k, placeholder, 0
    return cu_q, cu_k, compressed_offsets(kernels, plan, cu_k, block, stride), num_seqs


def _reduce(kernels: Any, plan: Plan, parts: Tensor, like: Tensor) -> Tensor:
    """Adds parts [SPLITS, ...] in order into a contiguous tensor of `like`'s dtype."""
    if len(parts) == 1 or parts.numel() == 0:
        return parts[0].to(like.dtype)
    total = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    constants = dict(plan["reduce_splits"])
    grid = (-(-total.numel() // constants["BLOCK_E"]),)
    kernels.reduce_splits[grid](parts, total, total.numel(), SPLITS=len(parts), **constants)
    return total
