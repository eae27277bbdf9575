"""Launches `cuda_kernels/selected_attention`: attention over selected blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_neuron.backends.cuda.launch.common import Plan, addressable, launch_delta
from nsa_neuron.backends.cuda.launch.selected_attention import by_block, by_query, dispatch, lists
from nsa_neuron.backends.cuda.launch.selected_attention.call import Call


def forward(
    kernels: Any,
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    select_block: int,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, S, Hq, Dk] over the selected blocks of k, v [B, T, Hkv, D].

    Args:
        kernels: the package `cuda_kernels.selected_attention`, compiled or interpreted.
        plan: constants of the kernels, and under `"dispatch"` which design runs, see `dispatch`.
        block_indices: int32 [B, S, Hkv, n], ids of blocks of `select_block` tokens, distinct within
            a row, -1 for none.

    Returns:
        o [B, S, Hq, Dv] in q's dtype and lse [B, S, Hq] float32 (natural logarithm).
    """
    q, k, v = addressable(q), addressable(k), addressable(v)
    cu = (cu_seqlens_q, cu_seqlens_k)
    call = Call(kernels, plan, q, k, v, block_indices.contiguous(), select_block, scale, cu)
    o = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    strategy, min_sharing = dispatch.decide(call, "forward")
    chosen = None
    if strategy != dispatch.BY_BLOCK:
        union = by_query.list_union(call, "forward")
        if strategy == dispatch.BY_OVERLAP:
            chosen = dispatch.measure(call, union, min_sharing)
        by_query.forward(call, union, o, lse, chosen)
    if strategy != dispatch.BY_QUERY:
        found = lists.build(call, by_block.cut_for(call, "forward_by_block"), chosen=chosen)
        by_block.forward(call, found, found.cuts[0], o, lse, chosen)
    return o, lse


def backward(
    kernels: Any,
    plan: Plan,
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    o: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None = None,
    *,
    select_block: int,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` with respect to q, k and v, contiguous, in their dtypes.

    dq by block reads the lists that dk and dv are made from.

    Args:
        grad_o: [B, S, Hq, Dv]; grad_lse: float32 [B, S, Hq] or None for zero.
        delta: what `backward_delta` would give, float32 [B, S, Hq], where it is known already.
    """
    q, k, v, grad_o = addressable(q), addressable(k), addressable(v), addressable(grad_o)
    lse = lse.contiguous()
    cu = (cu_seqlens_q, cu_seqlens_k)
    call = Call(kernels, plan, q, k, v, block_indices.contiguous(), select_block, scale, cu)
    if delta is None:
        delta = launch_delta(kernels, plan, grad_o, o, lse, grad_lse)
    grads = (grad_o, lse, delta)
    strategy, min_sharing = dispatch.decide(call, "backward_dq")
    needed = ["backward_dkv"] + ["backward_dq_by_block"] * (strategy != dispatch.BY_QUERY)
    found = lists.build(call, *(by_block.cut_for(call, kernel) for kernel in needed))
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    chosen = None
    if strategy != dispatch.BY_BLOCK:
        union = by_query.list_union(call, "backward_dq")
        if strategy == dispatch.BY_OVERLAP:
            chosen = dispatch.measure(call, union, min_sharing)
        by_query.backward_dq(call, union, grads, dq, chosen)
    if strategy != dispatch.BY_QUERY:
        by_block.backward_dq(call, found, found.cuts[1], grads, dq, chosen)
    return dq, *by_block.backward_dkv(call, found, found.cuts[0], grads)
