"""Launches `nki_kernels/selected_attention`: attention over selected blocks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_neuron.backends.neuron.launch import finite
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
    packed = (cu_seqlens_q, cu_seqlens_k)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _forward(kernels, plan, q, k, v, block_indices, select_block, scale, packed)
    spans = _spans(block_indices, k.shape[1], select_block, cu_seqlens_q, cu_seqlens_k)
    bad_k, bad_v = finite.spoiled(k), finite.spoiled(v)
    k, v = finite.cleaned(k, bad_k), finite.cleaned(v, bad_v)
    o, lse = _forward(kernels, plan, q, k, v, block_indices, select_block, scale, packed)
    in_keys = spans.seeing(bad_k)
    return finite.marked(o, in_keys | spans.seeing(bad_v)), finite.marked(lse, in_keys)


_Packed = tuple[Tensor | None, Tensor | None]


def _forward(
    kernels: Kernels, plan: Plan, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor,
    select_block: int, scale: float, packed: _Packed,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same where nothing that is not finite may reach what does not see it."""
    q, scale = positive_scale(q, scale)
    constants = plan["forward"]
    cut = _sizes(constants, q, k, v, block_indices, select_block, backward=False)
    grid = Grid.of(q, k, block_indices, select_block, *packed, cut)
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
    dead = lse == -torch.inf
    lse = lse.masked_fill(dead, 0.0)
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.masked_fill(dead, 0.0)
    packed = (cu_seqlens_q, cu_seqlens_k)
    given: tuple[Tensor, ...] = (grad_o, q, k, v, o, lse, grad_lse)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _backward(kernels, plan, given, dead, block_indices, select_block, scale, packed)
    spans = _spans(block_indices, k.shape[1], select_block, cu_seqlens_q, cu_seqlens_k)
    bad = finite.spoiled(q, grad_o, o, torch.stack((lse, grad_lse), -1))
    bad_k, bad_v = finite.spoiled(k), finite.spoiled(v)
    of_rows, of_keys = (grad_o, q), (k, v)
    given = (
        *(finite.cleaned(x, bad) for x in of_rows),
        *(finite.cleaned(x, rows) for x, rows in zip(of_keys, (bad_k, bad_v), strict=True)),
        *(finite.cleaned(x, bad) for x in (o, lse, grad_lse)),
    )  # fmt: skip
    dq, dk, dv = _backward(kernels, plan, given, dead, block_indices, select_block, scale, packed)
    reached = spans.seeing(bad_k | bad_v)
    seen = spans.seen(reached | finite.by_kv_head(bad, k.shape[2]))
    dq = finite.marked(finite.marked(dq, reached), bad)
    return dq, finite.marked(dk, seen), finite.marked(dv, seen)


def _spans(
    block_indices: Tensor, keys: int, select_block: int, cu_q: Tensor, cu_k: Tensor
) -> finite.Spans:
    """Which keys each query of a packed call sees, its chosen blocks up to itself."""
    row = torch.arange(block_indices.shape[1], device=block_indices.device)
    sequence = torch.searchsorted(cu_q[1:].contiguous(), row, right=True)
    end = row + 1 + (cu_k - cu_q)[1:].long()[sequence]
    begin = cu_k.long()[sequence][:, None, None]
    first = begin + block_indices.long() * select_block
    last = (first + select_block).minimum(end[:, None, None])
    chosen = (block_indices >= 0) & (last > first)
    first, last = (torch.where(chosen, x, 0) for x in (first, last))
    return finite.Spans(first, last, keys)


def _backward(
    kernels: Kernels, plan: Plan, given: tuple[Tensor, ...], dead: Tensor, block_indices: Tensor,
    select_block: int, scale: float, packed: _Packed,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same of (grad_o, q, k, v, o, lse, grad_lse), the last two zero where rows are dead."""
    grad_o, q, k, v, o, lse, grad_lse = given
    sign = (scale > 0) - (scale < 0)
    q, scale = positive_scale(q, scale)
    constants = plan["backward"]
    cut = _sizes(constants, q, k, v, block_indices, select_block, backward=True)
    grid = Grid.of(q, k, block_indices, select_block, *packed, cut)
    union = grid.union(kernels, cut.blocks)
    minus_lse = -lse
    shift = torch.where(dead, 0.0, math.log(scale) - lse)
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
