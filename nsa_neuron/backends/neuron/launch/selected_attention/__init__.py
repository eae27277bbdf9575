"""Launches `nki_kernels/selected_attention`: attention over selected blocks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_neuron.backends.neuron.launch.ranges import positive_scale
from nsa_neuron.backends.neuron.launch.selected_attention import sizes
from nsa_neuron.backends.neuron.launch.selected_attention.grid import Grid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nsa_neuron.backends.neuron.plans import Plan
    from nsa_neuron.backends.neuron.run import Kernels


def forward(
    kernels: Kernels,
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
        block_indices: int32 [B, S, Hkv, n], ids of blocks of `select_block` tokens, -1 for none.

    Returns:
        o [B, S, Hq, Dv] in q's dtype and lse [B, S, Hq] float32.
    """
    q, scale = positive_scale(q, scale)
    constants = plan["forward"]
    cut = _sizes(constants, q, k, v, block_indices, select_block, backward=False)
    grid = Grid.of(q, k, block_indices, select_block, cu_seqlens_q, cu_seqlens_k, cut)
    union = grid.union(kernels, cut.blocks)
    o, lse = kernels.forward(
        grid.bodies(grid.query_columns(q)), grid.pages(k, v),
        grid.bodies(grid.ids), grid.bodies(grid.place), grid.heads,
        grid.bodies(union.near), union.lists, union.starts, *grid.longer(union),
        dv=v.shape[3], queues=constants["queues"], scale=scale,
    )  # fmt: skip
    return grid.rows(o.flatten(0, 1)), grid.rows(lse.flatten(0, 1))[..., 0]


def backward(
    kernels: Kernels,
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
        grad_o: [B, S, Hq, Dv]. grad_lse: [B, S, Hq] float32 or None for zero.
    """
    sign = (scale > 0) - (scale < 0)
    q, scale = positive_scale(q, scale)
    constants = plan["backward"]
    cut = _sizes(constants, q, k, v, block_indices, select_block, backward=True)
    grid = Grid.of(q, k, block_indices, select_block, cu_seqlens_q, cu_seqlens_k, cut)
    union = grid.union(kernels, cut.blocks)
    dead = lse == -torch.inf
    minus_lse = torch.where(dead, 0.0, -lse)
    shift = torch.where(dead, 0.0, math.log(scale) - lse)
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.masked_fill(dead, 0.0)
    pages = grid.pages(k, v)
    stats = torch.stack((shift, minus_lse, grad_lse), -1)
    rows = (grid.by_tile(x) for x in (q, grad_o, o, stats))
    tiles = (grid.query_columns(q), grid.columns(grad_o), *rows)
    dq, *sums = kernels.backward(
        *(grid.bodies(x) for x in tiles), pages,
        grid.bodies(grid.ids), grid.bodies(grid.place), grid.heads,
        grid.bodies(union.near), union.lists, union.starts, *grid.longer(union),
        queues=constants["queues"], scale=scale,
    )  # fmt: skip
    keys = grid.null_page * grid.page
    dk, dv = kernels.backward_sum(*sums, keys=keys, dk=k.shape[3], dtype_of=pages)
    dq = grid.rows(dq.flatten(0, 1))
    return dq if sign > 0 else dq * sign, grid.tokens(dk, k.shape[1]), grid.tokens(dv, k.shape[1])


def _sizes(
    constants: Mapping[str, Any], q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor,
    select_block: int, *, backward: bool,
) -> sizes.Sizes:  # fmt: skip
    group, dims = q.shape[2] // k.shape[2], (k.shape[3], v.shape[3])
    per_query, item = block_indices.shape[3], q.element_size()
    return sizes.choose(constants, select_block, group, dims, per_query, item, backward=backward)
