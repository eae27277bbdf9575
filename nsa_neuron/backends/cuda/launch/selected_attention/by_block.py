"""Launches blocks of keys over the lists of the queries that selected them.

Partial results, one per pair and head, are written and added up in passes over the tokens, which
bounds their memory. In all functions `grads` is grad_o, lse and delta, and where `chosen` says that
the other design runs, nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_neuron.backends.cuda.launch.block_lists import (
    Pairs,
    Segment,
    WorkItems,
    cut,
    segments,
    sort_pairs,
)
from nsa_neuron.backends.cuda.launch.common import key_tile, next_power_of_two, strides

if TYPE_CHECKING:
    from nsa_neuron.backends.cuda.launch.selected_attention.call import Call


def sort_segments(call: Call, whole: Pairs | None = None) -> Iterator[Pairs]:
    """The pairs in segments, each sorted when it is asked for. whole: all pairs, if sorted yet."""
    most = call.plan["dispatch"]["pairs_per_sort"]
    for segment in segments(call.block_indices, most, _tokens_per_pass(call)):
        known = whole is not None and whole.segment == segment
        yield whole if whole is not None and known else _sorted(call, segment)


def sort_all(call: Call) -> Pairs:
    """All pairs as one segment."""
    batch, tokens = call.block_indices.shape[:2]
    return _sorted(call, Segment(slice(0, batch), slice(0, tokens)))


def forward(
    call: Call, sorted_pairs: Iterable[Pairs], o: Tensor, lse: Tensor, chosen: Tensor | None
) -> None:
    """Writes o and lse."""
    for pairs in sorted_pairs:
        _forward_segment(call, pairs, o, lse, chosen)


def backward_dq(
    call: Call, sorted_pairs: Iterable[Pairs], grads: tuple[Tensor, ...], dq: Tensor,
    chosen: Tensor | None,
) -> None:  # fmt: skip
    """Writes dq."""
    for pairs in sorted_pairs:
        _backward_dq_segment(call, pairs, grads, dq, chosen)


def backward_dkv(call: Call, pairs: Pairs, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """dk and dv, contiguous, from all pairs."""
    q, k, v = call.q, call.k, call.v
    grad_o, lse, delta = grads
    constants = dict(call.plan["backward_dkv"])
    constants["BLOCK_N"] = key_tile(constants["BLOCK_N"], call.select_block)
    items = cut(pairs, constants["CHUNK"], pairs.tokens)
    d_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    d_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    workspace = lse.new_empty(items.slots, call.select_block, k.shape[3] + v.shape[3])
    cu_q, cu_k, num_seqs = call.packed
    shared = {"SELECT_BLOCK": call.select_block, "PACKED": num_seqs > 0, **call.head_dims}
    call.kernels.backward_dkv[(items.bound, -(-call.select_block // constants["BLOCK_N"]))](
        q, k, v, grad_o, lse, delta, d_k, d_v, workspace, pairs.queries, items.item_block[0],
        items.item_start[0], items.list_start[0], items.list_start[1], items.slot_start[0],
        pairs.blocks, cu_q, cu_k, num_seqs, q.shape[1], k.shape[1], pairs.blocks_per_head,
        k.shape[2], call.scale, *strides(q, k, v, grad_o), G=call.group, **shared, **constants,
    )  # fmt: skip
    constants = dict(call.plan["reduce_dkv"])
    constants["BLOCK_N"] = key_tile(constants["BLOCK_N"], call.select_block)
    call.kernels.reduce_dkv[(pairs.blocks, -(-call.select_block // constants["BLOCK_N"]))](
        workspace, d_k, d_v, items.item_start[0], items.slot_start[0], cu_k, num_seqs, k.shape[1],
        pairs.blocks_per_head, k.shape[2], **shared, **constants,
    )  # fmt: skip
    return d_k, d_v


def _forward_segment(
    call: Call, pairs: Pairs, o: Tensor, lse: Tensor, chosen: Tensor | None
) -> None:
    q, k, v = (x[pairs.segment.rows] for x in (call.q, call.k, call.v))
    constants, items = _planned(call, "forward_by_block", pairs)
    dims, (shared, flag), (cu_q, cu_k, num_seqs) = call.head_dims, call.flagged(chosen), call.packed
    partial_o = q.new_empty(_most_rows(call, pairs, items), v.shape[3])
    partial_lse = lse.new_empty(_most_rows(call, pairs, items))
    for number, (first, last) in enumerate(items.passes):
        call.kernels.forward_by_block[(items.bound,)](
            q, k, v, partial_o, partial_lse, flag, pairs.queries, pairs.order,
            items.item_block[number], items.item_start[number], items.list_start[number],
            items.list_start[number + 1], first * pairs.per_token, pairs.blocks, cu_q, cu_k,
            num_seqs, q.shape[1], k.shape[1], pairs.blocks_per_head, k.shape[2], call.scale,
            *strides(q, k, v), SELECT_BLOCK=call.select_block, PACKED=num_seqs > 0, **shared,
            **dims, **constants,
        )  # fmt: skip
        grid, rows, merge = _row_tiles(call, "combine", pairs, first, last)
        call.kernels.combine[grid](
            partial_o, partial_lse, pairs.used[first * pairs.per_token :],
            o.view(-1, v.shape[3])[rows], lse.view(-1)[rows], flag, rows.stop - rows.start,
            DV=dims["DV"], V0=dims["V0"], V1=dims["V1"],
            NUM_SELECTED=call.block_indices.shape[3], **shared, **merge,
        )  # fmt: skip


def _backward_dq_segment(
    call: Call, pairs: Pairs, grads: tuple[Tensor, ...], dq: Tensor, chosen: Tensor | None
) -> None:
    q, k, v = (x[pairs.segment.rows] for x in (call.q, call.k, call.v))
    grad_o, lse, delta = (x[pairs.segment.rows] for x in grads)
    constants, items = _planned(call, "backward_dq_by_block", pairs)
    dims, (shared, flag), (cu_q, cu_k, num_seqs) = call.head_dims, call.flagged(chosen), call.packed
    partial_dq = lse.new_empty(_most_rows(call, pairs, items), q.shape[3])
    for number, (first, last) in enumerate(items.passes):
        call.kernels.backward_dq_by_block[(items.bound,)](
            q, k, v, grad_o, lse, delta, partial_dq, flag, pairs.queries, pairs.order,
            items.item_block[number], items.item_start[number], items.list_start[number],
            items.list_start[number + 1], first * pairs.per_token, pairs.blocks, cu_q, cu_k,
            num_seqs, q.shape[1], k.shape[1], pairs.blocks_per_head, k.shape[2], call.scale,
            *strides(q, k, v, grad_o), SELECT_BLOCK=call.select_block, PACKED=num_seqs > 0,
            **shared, **dims, **constants,
        )  # fmt: skip
        grid, rows, total = _row_tiles(call, "sum_dq", pairs, first, last)
        call.kernels.sum_dq[grid](
            partial_dq, pairs.used[first * pairs.per_token :], dq.view(-1, q.shape[3])[rows],
            flag, rows.stop - rows.start, DK=dims["DK"], D0=dims["D0"], D1=dims["D1"],
            NUM_SELECTED=call.block_indices.shape[3], **shared, **total,
        )  # fmt: skip


def _sorted(call: Call, segment: Segment) -> Pairs:
    keys = call.k.shape[1]
    return sort_pairs(call.block_indices, segment, keys, call.select_block, *call.cu)


def _planned(call: Call, kernel: str, pairs: Pairs) -> tuple[dict[str, Any], WorkItems]:
    """Constants of a kernel that finishes its block in one tile of keys, and its work items."""
    constants = dict(call.plan[kernel])
    constants["BLOCK_N"] = max(16, next_power_of_two(call.select_block))
    return constants, cut(pairs, constants["CHUNK"], _tokens_per_pass(call))


def _tokens_per_pass(call: Call) -> int:
    """From the planned (token, query head) rows of a pass, each with a partial result per slot."""
    rows: int = call.plan["dispatch"]["rows_per_pass"]
    return max(1, rows // call.q.shape[2])


def _most_rows(call: Call, pairs: Pairs, items: WorkItems) -> int:
    """Rows of partial results, (pair, head), of the longest pass."""
    tokens = max((last - first for first, last in items.passes), default=0)
    return tokens * pairs.per_token * call.group


def _row_tiles(
    call: Call, kernel: str, pairs: Pairs, first: int, last: int
) -> tuple[tuple[int], slice, dict[str, Any]]:
    """Grid of a kernel over the (token, head) rows of a pass, these rows, and its constants.

    PROGRAMS of the plan is the most programs; it is no constant of the kernel.
    """
    constants, heads = dict(call.plan[kernel]), call.q.shape[2]
    rows = slice((pairs.first_token + first) * heads, (pairs.first_token + last) * heads)
    tiles = -(-(rows.stop - rows.start) // constants["BLOCK_M"])
    return (min(tiles, constants.pop("PROGRAMS")),), rows, constants
