"""Launches `nki_kernels/compressed_attention.py`: attention to complete compressed blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_neuron.backends.neuron.launch import ranges, reach
from nsa_neuron.backends.neuron.launch.packed import block_counts

if TYPE_CHECKING:
    from nsa_neuron.backends.neuron.plans import Plan
    from nsa_neuron.backends.neuron.run import Kernels


def complete(
    queries: int,
    kv_len: int,
    block: int,
    stride: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    device: torch.device,
) -> reach.Ranges:
    """The blocks that end at or before each query, among those of its sequence."""
    row = torch.arange(queries, device=device)
    past = kv_len - queries
    first = torch.zeros_like(row)
    position = row + past
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        lengths = cu_seqlens_k.diff()
        begins = F.pad(block_counts(lengths, block, stride).cumsum(0), (1, 0))
        sequence = torch.bucketize(row, cu_seqlens_q[1:].to(row.dtype), right=True)
        position = row - cu_seqlens_q[sequence] + (lengths - cu_seqlens_q.diff())[sequence]
        first = begins[sequence]
    seen = torch.div(position + 1 - block, stride, rounding_mode="floor") + 1
    bounds = torch.stack((first, first + seen.clamp(min=0)), 1).float()
    if cu_seqlens_q is None:
        return reach.Ranges(bounds, (past + 1 - block + stride, reach.UNLIMITED, stride, True))
    # Sequences of T_i tokens have at most T_i // stride blocks.
    return reach.Ranges(bounds, (past + 1, reach.UNLIMITED, stride, False))


def forward(
    kernels: Kernels,
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
    """o [B, S, Hq, Dv] in q's dtype and lse [B, S, Hq] float32; arguments as of the op."""
    if k_cmp.shape[1] == 0:
        o = q.new_zeros(*q.shape[:3], v_cmp.shape[3])
        return o, torch.full(q.shape[:3], -torch.inf, device=q.device)
    seen = complete(q.shape[1], kv_len, block, stride, cu_seqlens_q, cu_seqlens_k, q.device)
    return ranges.forward(kernels, plan, q, k_cmp, v_cmp, seen, scale)


def backward(
    kernels: Kernels,
    plan: Plan,
    grad_o: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    o: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    *,
    kv_len: int,
    block: int,
    stride: int,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk_cmp and dv_cmp in the inputs' dtype; arguments as of the op."""
    if k_cmp.shape[1] == 0:
        return q.new_zeros(q.shape), k_cmp.new_zeros(k_cmp.shape), v_cmp.new_zeros(v_cmp.shape)
    seen = complete(q.shape[1], kv_len, block, stride, cu_seqlens_q, cu_seqlens_k, q.device)
    return ranges.backward(kernels, plan, grad_o, q, k_cmp, v_cmp, o, lse, grad_lse, seen, scale)
