"""Launches `cuda_kernels/attention.py`: causal attention, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """Causal attention of q [B, S, Hq, Dk] over k, v [B, T, Hkv, D], last `window` keys if > 0.

    Args:
        kernels: the module `cuda_kernels.attention`, compiled or interpreted.
        plan: constants of the kernel `forward`.

    Returns:
        o [B, S, Hq, Dv] in q's dtype and lse [B, S, Hq] float32 (natural logarithm).
    """
    constants = dict(plan["forward"])
    q, k, v = addressable(q), addressable(k), addressable(v)
    batch, tokens, heads, dk = q.shape
    _, keys, kv_heads, dv = v.shape
    o = q.new_empty(batch, tokens, heads, dv)
    lse = q.new_empty(batch, tokens, heads, dtype=torch.float32)
    cu_q, cu_k, num_seqs = packed_args(cu_seqlens_q, cu_seqlens_k, lse)
    group = heads // kv_heads
    grid = (count_tiles(tokens, group, constants["BLOCK_M"], num_seqs), kv_heads, batch)
    kernels.forward[grid](
        q, k, v, o, lse, cu_q, cu_k, num_seqs, tokens, keys, heads, scale, *strides(q, k, v),
        G=group, WINDOW=window, PACKED=num_seqs > 0, **head_dim_constants(dk, dv), **constants,
    )  # fmt: skip
    return o, lse


def backward(
    kernels: Any,
    plan: Plan,
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None = None,
    *,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    delta: Tensor | None = None,
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` with respect to q, k and v, contiguous, in their dtypes.

    Args:
        plan: constants of the kernels `backward_delta`, `backward_dq` and `backward_dkv`.
        grad_o: [B, S, Hq, Dv]; grad_lse: float32 [B, S, Hq] or None for zero.
        delta: what `backward_delta` would give, float32 [B, S, Hq], where it is known already.
    """
    q, k, v, grad_o = addressable(q), addressable(k), addressable(v), addressable(grad_o)
    lse = lse.contiguous()
    batch, tokens, heads, dk = q.shape
    _, keys, kv_heads, dv = v.shape
    if delta is None:
        delta = launch_delta(kernels, plan, grad_o, o, lse, grad_lse)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    d_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    cu_q, cu_k, num_seqs = packed_args(cu_seqlens_q, cu_seqlens_k, lse)
    group = heads // kv_heads
    shared = {"G": group, "WINDOW": window, "PACKED": num_seqs > 0, **head_dim_constants(dk, dv)}

    constants = dict(plan["backward_dq"])
    grid = (count_tiles(tokens, group, constants["BLOCK_M"], num_seqs), kv_heads, batch)
    kernels.backward_dq[grid](
        q, k, v, grad_o, lse, delta, dq, cu_q, cu_k, num_seqs, tokens, keys, heads, scale,
        *strides(q, k, v, grad_o), **shared, **constants,
    )  # fmt: skip
    constants = dict(plan["backward_dkv"])
    grid = (count_tiles(keys, 1, constants["BLOCK_N"], num_seqs), kv_heads, batch)
    kernels.backward_dkv[grid](
        q, k, v, grad_o, lse, delta, d_k, d_v, cu_q, cu_k, num_seqs, tokens, keys, heads, scale,
        *strides(q, k, v, grad_o), **shared, **constants,
    )  # fmt: skip
    return dq, d_k, d_v
