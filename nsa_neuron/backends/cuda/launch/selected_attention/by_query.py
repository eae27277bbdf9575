"""Launches tiles of adjacent queries over the union of their blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nsa_neuron.backends.cuda.launch.common import (
    count_tiles,
    next_power_of_two,
    query_tile_constants,
    strides,
)

if TYPE_CHECKING:
    from nsa_neuron.backends.cuda.launch.selected_attention.call import Call


@dataclass(frozen=True)
class Union:
    """The distinct blocks of each tile of queries, for the kernel that walks them.

    Attributes:
        constants: of that kernel; they say how large a tile is.
        entries, counts, pairs: see `union_blocks`. grid: the tiles they are for.
    """

    constants: dict[str, Any]
    entries: Tensor
    counts: Tensor
    pairs: Tensor
    grid: tuple[int, int, int]


def list_union(call: Call, kernel: str) -> Union:
    """Runs `union_blocks` for the tiles of `kernel`."""
    constants = query_tile_constants(call.plan[kernel], call.group, call.select_block)
    queries = constants["QUERIES"]
    batch, tokens, kv_heads, num_selected = call.block_indices.shape
    cu_q, cu_k, num_seqs = call.packed
    tiles = count_tiles(tokens, 1, queries, num_seqs)
    new_empty = call.block_indices.new_empty
    entries = new_empty(batch, kv_heads, tiles, queries * num_selected)
    counts, pairs = (new_empty(batch, kv_heads, tiles) for _ in range(2))
    grid = (tiles, kv_heads, batch)
    call.kernels.union_blocks[grid](
        call.block_indices, entries, counts, pairs, cu_q, cu_k, num_seqs, tokens, call.k.shape[1],
        NUM_SELECTED=num_selected, SELECTED_POW2=next_power_of_two(num_selected),
        SELECT_BLOCK=call.select_block, QUERIES=queries, PACKED=num_seqs > 0,
        **call.plan["union_blocks"],
    )  # fmt: skip
    return Union(constants, entries, counts, pairs, grid)


def forward(call: Call, union: Union, o: Tensor, lse: Tensor, chosen: Tensor | None) -> None:
    """Writes o and lse; nothing where `chosen` says that the other design does."""
    q, k, v = call.q, call.k, call.v
    (shared, flag), (cu_q, cu_k, num_seqs) = call.flagged(chosen), call.packed
    call.kernels.forward[union.grid](
        q, k, v, o, lse, union.entries, union.counts, flag, cu_q, cu_k, num_seqs, q.shape[1],
        k.shape[1], q.shape[2], call.scale, *strides(q, k, v),
        NUM_SELECTED=call.block_indices.shape[3], SELECT_BLOCK=call.select_block,
        PACKED=num_seqs > 0, **call.head_dims, **union.constants | shared,
    )  # fmt: skip


def backward_dq(
    call: Call, union: Union, grads: tuple[Tensor, ...], dq: Tensor, chosen: Tensor | None
) -> None:
    """Writes dq; nothing where `chosen` says that the other design does.

    Args:
        grads: grad_o, lse and delta.
    """
    q, k, v = call.q, call.k, call.v
    grad_o, lse, delta = grads
    (shared, flag), (cu_q, cu_k, num_seqs) = call.flagged(chosen), call.packed
    call.kernels.backward_dq[union.grid](
        q, k, v, grad_o, lse, delta, dq, union.entries, union.counts,
        flag, cu_q, cu_k, num_seqs, q.shape[1], k.shape[1], q.shape[2], call.scale,
        *strides(q, k, v, grad_o),
        NUM_SELECTED=call.block_indices.shape[3], SELECT_BLOCK=call.select_block,
        PACKED=num_seqs > 0, **call.head_dims, **union.constants | shared,
    )  # fmt: skip
