"""Launches blocks of keys over the lists of the queries that selected them.

Partial results, one per pair and head, are written and added up in passes over the tokens, which
bounds their memory. In all functions `grads` is grad_o, lse and delta, and where `chosen` says that
the other design runs, nothing is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_neuron.backends.cuda.launch.common import key_tile, next_power_of_two, strides
from nsa_neuron.backends.cuda.launch.selected_attention.lists import Cut, Lists, Pass, WorkItems

if TYPE_CHECKING:
    from nsa_neuron.backends.cuda.launch.selected_attention.call import Call


def cut_for(call: Call, kernel: str) -> Cut:
    """How lists are cut for `forward_by_block`, `backward_dq_by_block` or `backward_dkv`.

    The first two take so many tokens per pass as have the planned (token, query head) rows, each
    with a partial result per slot.
    """
    batch, tokens = call.block_indices.shape[:2]
    whole = max(1, batch * tokens)
    if kernel != "backward_dkv":
        whole = max(1, call.plan["dispatch"]["rows_per_pass"] // call.q.shape[2])
    return Cut(call.plan[kernel]["CHUNK"], whole)


def forward(
    call: Call, lists: Lists, items: WorkItems, o: Tensor, lse: Tensor, chosen: Tensor | None
) -> None:
    """Writes o and lse."""
    q, k, v = call.q, call.k, call.v
    constants = _planned(call, "forward_by_block")
    dims, (shared, flag), (cu_q, cu_k, num_seqs) = call.head_dims, call.flagged(chosen), call.packed
    rows = _most_rows(call, items)
    partial_o, partial_lse = q.new_empty(rows, v.shape[3]), lse.new_empty(rows)
    num_selected = call.block_indices.shape[3]
    for p in items.passes:
        call.kernels.forward_by_block[(items.bound, k.shape[2], p.rows)](
            q, k, v, partial_o, partial_lse, flag, lists.queries, lists.slots, items.table,
            p.first_token, items.lane_width, p.part_offset, cu_q, cu_k, num_seqs, q.shape[1],
            k.shape[1], lists.blocks_per_head, call.scale, *strides(q, k, v),
            NUM_SELECTED=num_selected, SELECT_BLOCK=call.select_block, PACKED=num_seqs > 0,
            **shared, **dims, **constants,
        )  # fmt: skip
        grid, merge = _row_tiles(call, "combine", p)
        call.kernels.combine[grid](
            partial_o, partial_lse, lists.used, o, lse, flag, p.first_token,
            p.tokens * q.shape[2], q.shape[2], DV=dims["DV"], V0=dims["V0"], V1=dims["V1"],
            NUM_SELECTED=num_selected, **shared, **merge,
        )  # fmt: skip


def backward_dq(
    call: Call, lists: Lists, items: WorkItems, grads: tuple[Tensor, ...], dq: Tensor,
    chosen: Tensor | None,
) -> None:  # fmt: skip
    """Writes dq."""
    q, k, v = call.q, call.k, call.v
    grad_o, lse, delta = grads
    constants = _planned(call, "backward_dq_by_block")
    dims, (shared, flag), (cu_q, cu_k, num_seqs) = call.head_dims, call.flagged(chosen), call.packed
    partial_dq = lse.new_empty(_most_rows(call, items), q.shape[3])
    num_selected = call.block_indices.shape[3]
    for p in items.passes:
        call.kernels.backward_dq_by_block[(items.bound, k.shape[2], p.rows)](
            q, k, v, grad_o, lse, delta, partial_dq, flag, lists.queries, lists.slots, items.table,
            p.first_token, items.lane_width, p.part_offset, cu_q, cu_k, num_seqs, q.shape[1],
            k.shape[1], lists.blocks_per_head, call.scale, *strides(q, k, v, grad_o),
            NUM_SELECTED=num_selected, SELECT_BLOCK=call.select_block, PACKED=num_seqs > 0,
            **shared, **dims, **constants,
        )  # fmt: skip
        grid, total = _row_tiles(call, "sum_dq", p)
        call.kernels.sum_dq[grid](
            partial_dq, lists.used, dq, flag, p.first_token, p.tokens * q.shape[2], q.shape[2],
            DK=dims["DK"], D0=dims["D0"], D1=dims["D1"], NUM_SELECTED=num_selected,
            **shared, **total,
        )  # fmt: skip


def backward_dkv(
    call: Call, lists: Lists, items: WorkItems, grads: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """dk and dv, contiguous, from lists that are cut in items of a single part."""
    q, k, v = call.q, call.k, call.v
    grad_o, lse, delta = grads
    d_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    d_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    batch, keys, kv_heads, dk = k.shape
    lane = (items.slots, call.select_block, dk + v.shape[3])
    workspace = lse.new_empty(batch, kv_heads, *lane)
    cu_q, cu_k, num_seqs = call.packed
    shared = {"SELECT_BLOCK": call.select_block, "PACKED": num_seqs > 0, **call.head_dims}
    sizes = (items.lane_width, items.slots)
    constants, tiles = _tiled(call, "backward_dkv")
    call.kernels.backward_dkv[(items.bound * tiles, kv_heads, batch)](
        q, k, v, grad_o, lse, delta, d_k, d_v, workspace, lists.queries, items.table, *sizes,
        cu_q, cu_k, num_seqs, q.shape[1], keys, lists.blocks_per_head, call.scale,
        *strides(q, k, v, grad_o), G=call.group, NUM_SELECTED=call.block_indices.shape[3],
        **shared, **constants,
    )  # fmt: skip
    constants, tiles = _tiled(call, "reduce_dkv")
    call.kernels.reduce_dkv[(lists.blocks_per_head * tiles, kv_heads, batch)](
        workspace, d_k, d_v, items.table, *sizes, cu_k, num_seqs, keys, lists.blocks_per_head,
        **shared, **constants,
    )  # fmt: skip
    return d_k, d_v


def _planned(call: Call, kernel: str) -> dict[str, Any]:
    """Constants of a kernel that finishes its block in one tile of keys."""
    return {**call.plan[kernel], "BLOCK_N": max(16, next_power_of_two(call.select_block))}


def _tiled(call: Call, kernel: str) -> tuple[dict[str, Any], int]:
    """Constants of a kernel that takes a block in tiles of keys, and how many those are."""
    constants = dict(call.plan[kernel])
    constants["BLOCK_N"] = key_tile(constants["BLOCK_N"], call.select_block)
    return constants, -(-call.select_block // constants["BLOCK_N"])


def _most_rows(call: Call, items: WorkItems) -> int:
    """Rows of partial results, (pair, head), of the longest pass."""
    tokens = max((p.tokens for p in items.passes), default=0)
    return tokens * call.block_indices.shape[3] * call.q.shape[2]


def _row_tiles(call: Call, kernel: str, p: Pass) -> tuple[tuple[int], dict[str, Any]]:
    """Grid of a kernel over the (token, head) rows of a pass, and its constants.

    PROGRAMS of the plan is the most programs; it is no constant of the kernel.
    """
    constants = dict(call.plan[kernel])
    tiles = -(-p.tokens * call.q.shape[2] // constants["BLOCK_M"])
    return (min(tiles, constants.pop("PROGRAMS")),), constants
