"""Launches `cuda_kernels/selected_attention`: attention over selected blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_neuron.backends.cuda.launch.block_lists import block_lists
from nsa_neuron.backends.cuda.launch.common import (
    Plan,
    addressable,
    count_tiles,
    head_dim_constants,
    key_tile,
    launch_delta,
    next_power_of_two,
    packed_args,
    query_tile_constants,
    strides,
)


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
        plan: constants of the kernels; `plan["dispatch"]["strategy"]` is `"by_query"` or
            `"by_block"`, with the tokens per pass of the latter as `"tokens_per_pass"`.
        block_indices: int32 [B, S, Hkv, n], ids of blocks of `select_block` tokens, distinct within
            a row, -1 for none.

    Returns:
        o [B, S, Hq, Dv] in q's dtype and lse [B, S, Hq] float32 (natural logarithm).
    """
    q, k, v = addressable(q), addressable(k), addressable(v)
    o = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    cu = (cu_seqlens_q, cu_seqlens_k)
    run = _forward_by_block if plan["dispatch"]["strategy"] == "by_block" else _forward_by_query
    run(kernels, plan, q, k, v, block_indices.contiguous(), o, lse, select_block, scale, cu)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` with respect to q, k and v, contiguous, in their dtypes.

    Args:
        grad_o: [B, S, Hq, Dv]; grad_lse: float32 [B, S, Hq] or None for zero.
    """
    q, k, v, grad_o = addressable(q), addressable(k), addressable(v), addressable(grad_o)
    lse, block_indices = lse.contiguous(), block_indices.contiguous()
    cu = (cu_seqlens_q, cu_seqlens_k)
    delta = launch_delta(kernels, plan, grad_o, o, lse, grad_lse)
    inputs = (q, k, v, grad_o, lse, delta)
    by_block = plan["dispatch"]["strategy"] == "by_block"
    run_dq = _backward_dq_by_block if by_block else _backward_dq
    dq = run_dq(kernels, plan, inputs, block_indices, select_block, scale, cu)
    d_k, d_v = _backward_dkv(kernels, plan, inputs, block_indices, select_block, scale, cu)
    return dq, d_k, d_v


Lengths = tuple[Tensor | None, Tensor | None]


def _forward_by_query(
    kernels: Any, plan: Plan, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor,
    o: Tensor, lse: Tensor, select_block: int, scale: float, cu: Lengths,
) -> None:  # fmt: skip
    constants = query_tile_constants(plan["forward"], q.shape[2] // k.shape[2], select_block)
    entries, counts, grid = _union(
        kernels, plan, block_indices, k.shape[1], select_block, constants["QUERIES"], cu
    )
    cu_q, cu_k, num_seqs = packed_args(*cu, lse)
    kernels.forward[grid](
        q, k, v, o, lse, entries, counts, cu_q, cu_k, num_seqs, q.shape[1], k.shape[1],
        q.shape[2], scale, *strides(q, k, v), **head_dim_constants(q.shape[3], v.shape[3]),
        NUM_SELECTED=block_indices.shape[3], SELECT_BLOCK=select_block, PACKED=num_seqs > 0,
        **constants,
    )  # fmt: skip


def _forward_by_block(
    kernels: Any, plan: Plan, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor,
    o: Tensor, lse: Tensor, select_block: int, scale: float, cu: Lengths,
) -> None:  # fmt: skip
    """Runs in passes over the tokens, which bounds the memory of the partial outputs."""
    constants = dict(plan["forward_by_block"])
    constants["BLOCK_N"] = max(16, next_power_of_two(select_block))
    batch, tokens, heads, dk = q.shape
    kv_heads, dv = v.shape[2:]
    num_selected = block_indices.shape[3]
    group = heads // kv_heads
    dims = head_dim_constants(dk, dv)
    cu_q, cu_k, num_seqs = packed_args(*cu, lse)
    step = plan["dispatch"]["tokens_per_pass"]
    for first in range(0, tokens, step):
        ids = block_indices[:, first : first + step]
        lists = block_lists(ids, first, tokens, k.shape[1], select_block, constants["CHUNK"], *cu)
        partial_o = q.new_empty(ids.numel() * group, dv)
        partial_lse = lse.new_full((ids.numel() * group,), float("-inf"))
        kernels.forward_by_block[(lists.items,)](
            q, k, v, partial_o, partial_lse, lists.queries, lists.order, lists.item_block,
            lists.item_start, lists.list_start, lists.blocks, cu_q, cu_k, num_seqs, tokens,
            k.shape[1], lists.blocks_per_head, kv_heads, scale, *strides(q, k, v),
            G=group, SELECT_BLOCK=select_block, PACKED=num_seqs > 0, **dims, **constants,
        )  # fmt: skip
        merge = dict(plan["combine"])
        rows = batch * ids.shape[1] * heads
        kernels.combine[(-(-rows // merge["BLOCK_M"]),)](
            partial_o, partial_lse, o, lse, ids.shape[1], first, tokens, kv_heads, rows,
            G=group, DV=dv, V0=dims["V0"], V1=dims["V1"], NUM_SELECTED=num_selected, **merge,
        )  # fmt: skip


def _backward_dq(
    kernels: Any, plan: Plan, inputs: tuple[Tensor, ...], block_indices: Tensor,
    select_block: int, scale: float, cu: Lengths,
) -> Tensor:  # fmt: skip
    q, k, v, grad_o, lse, delta = inputs
    constants = query_tile_constants(plan["backward_dq"], q.shape[2] // k.shape[2], select_block)
    entries, counts, grid = _union(
        kernels, plan, block_indices, k.shape[1], select_block, constants["QUERIES"], cu
    )
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    cu_q, cu_k, num_seqs = packed_args(*cu, lse)
    kernels.backward_dq[grid](
        q, k, v, grad_o, lse, delta, dq, entries, counts, cu_q, cu_k, num_seqs, q.shape[1],
        k.shape[1], q.shape[2], scale, *strides(q, k, v, grad_o),
        **head_dim_constants(q.shape[3], v.shape[3]), NUM_SELECTED=block_indices.shape[3],
        SELECT_BLOCK=select_block, PACKED=num_seqs > 0, **constants,
    )  # fmt: skip
    return dq


def _backward_dq_by_block(
    kernels: Any, plan: Plan, inputs: tuple[Tensor, ...], block_indices: Tensor,
    select_block: int, scale: float, cu: Lengths,
) -> Tensor:  # fmt: skip
    q, k, v, grad_o, lse, delta = inputs
    constants = dict(plan["backward_dq_by_block"])
    constants["BLOCK_N"] = max(16, next_power_of_two(select_block))
    batch, tokens, heads, dk = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    dims = head_dim_constants(dk, v.shape[3])
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    cu_q, cu_k, num_seqs = packed_args(*cu, lse)
    step = plan["dispatch"]["tokens_per_pass"]
    for first in range(0, tokens, step):
        ids = block_indices[:, first : first + step]
        lists = block_lists(ids, first, tokens, k.shape[1], select_block, constants["CHUNK"], *cu)
        partial_dq = q.new_empty(ids.numel() * group, dk, dtype=torch.float32)
        kernels.backward_dq_by_block[(lists.items,)](
            q, k, v, grad_o, lse, delta, partial_dq, lists.queries, lists.order, lists.item_block,
            lists.item_start, lists.list_start, lists.blocks, cu_q, cu_k, num_seqs, tokens,
            k.shape[1], lists.blocks_per_head, kv_heads, scale, *strides(q, k, v, grad_o),
            G=group, SELECT_BLOCK=select_block, PACKED=num_seqs > 0, **dims, **constants,
        )  # fmt: skip
        total = dict(plan["sum_dq"])
        rows = batch * ids.shape[1] * heads
        kernels.sum_dq[(-(-rows // total["BLOCK_M"]),)](
            partial_dq, lists.used.view(torch.int8), dq, ids.shape[1], first, tokens, kv_heads,
            rows, G=group, DK=dk, D0=dims["D0"], D1=dims["D1"], NUM_SELECTED=ids.shape[3], **total,
        )  # fmt: skip
    return dq


def _backward_dkv(
    kernels: Any, plan: Plan, inputs: tuple[Tensor, ...], block_indices: Tensor,
    select_block: int, scale: float, cu: Lengths,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v, grad_o, lse, delta = inputs
    constants = dict(plan["backward_dkv"])
    constants["BLOCK_N"] = key_tile(constants["BLOCK_N"], select_block)
    lists = block_lists(
        block_indices, 0, q.shape[1], k.shape[1], select_block, constants["CHUNK"], *cu
    )
    d_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    d_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    dims = head_dim_constants(q.shape[3], v.shape[3])
    workspace = lse.new_empty(lists.slots, select_block, k.shape[3] + v.shape[3])
    cu_q, cu_k, num_seqs = packed_args(*cu, lse)
    kv_heads = k.shape[2]
    shared = {"SELECT_BLOCK": select_block, "PACKED": num_seqs > 0, **dims}
    kernels.backward_dkv[(lists.items, -(-select_block // constants["BLOCK_N"]))](
        q, k, v, grad_o, lse, delta, d_k, d_v, workspace, lists.queries, lists.item_block,
        lists.item_start, lists.list_start, lists.slot_start, lists.blocks, cu_q, cu_k, num_seqs,
        q.shape[1], k.shape[1], lists.blocks_per_head, kv_heads, scale, *strides(q, k, v, grad_o),
        G=q.shape[2] // kv_heads, **shared, **constants,
    )  # fmt: skip
    constants = dict(plan["reduce_dkv"])
    constants["BLOCK_N"] = key_tile(constants["BLOCK_N"], select_block)
    kernels.reduce_dkv[(lists.blocks, -(-select_block // constants["BLOCK_N"]))](
        workspace, d_k, d_v, lists.item_start, lists.slot_start, cu_k, num_seqs, k.shape[1],
        lists.blocks_per_head, kv_heads, **shared, **constants,
    )  # fmt: skip
    return d_k, d_v


def _union(
    kernels: Any, plan: Plan, block_indices: Tensor, keys: int, select_block: int, queries: int,
    cu: Lengths,
) -> tuple[Tensor, Tensor, tuple[int, int, int]]:  # fmt: skip
    """Runs `union_blocks`: entries, counts, and the grid of tiles they are for."""
    batch, tokens, kv_heads, num_selected = block_indices.shape
    cu_q, cu_k, num_seqs = packed_args(*cu, block_indices)
    tiles = count_tiles(tokens, 1, queries, num_seqs)
    entries = block_indices.new_empty(batch, kv_heads, tiles, queries * num_selected)
    counts = block_indices.new_empty(batch, kv_heads, tiles)
    grid = (tiles, kv_heads, batch)
    kernels.union_blocks[grid](
        block_indices, entries, counts, cu_q, cu_k, num_seqs, tokens, keys,
        NUM_SELECTED=num_selected, SELECTED_POW2=next_power_of_two(num_selected),
        SELECT_BLOCK=select_block, QUERIES=queries, PACKED=num_seqs > 0, **plan["union_blocks"],
    )  # fmt: skip
    return entries, counts, grid
