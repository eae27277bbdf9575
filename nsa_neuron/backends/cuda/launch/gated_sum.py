"""Launches `cuda_kernels/gated_sum.py`: the gated sum of the three branches and its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nsa_neuron.backends.cuda.launch.common import Plan

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def forward(
    kernels: Any, plan: Plan, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor
) -> Tensor:
    """`o = sum_c gates[..., c] * o_c` [B, S, Hq, Dv] in o_cmp's dtype; gates [B, S, Hq, 3]."""
    branches = [x.contiguous() for x in (o_cmp, o_slc, o_win)]
    o = torch.empty(o_cmp.shape, dtype=o_cmp.dtype, device=o_cmp.device)
    grid, arguments = _geometry(plan["forward"], o)
    kernels.forward[grid](*branches, gates.contiguous(), o, **arguments)
    return o


def backward(
    kernels: Any,
    plan: Plan,
    grad_o: Tensor,
    o_cmp: Tensor,
    o_slc: Tensor,
    o_win: Tensor,
    gates: Tensor,
) -> Four:
    """Gradients of o_cmp, o_slc, o_win and gates, contiguous, in their dtypes."""
    return _backward(kernels, plan, grad_o, (o_cmp, o_slc, o_win, gates), ())[0]


def backward_with_deltas(
    kernels: Any,
    plan: Plan,
    grad_o: Tensor,
    branches: tuple[Tensor, Tensor, Tensor],
    gates: Tensor,
    lses: tuple[Tensor, Tensor, Tensor],
) -> tuple[Four, list[Tensor]]:
    """What `backward` returns, and each branch's delta, float32 [B, S, Hq].

    Args:
        branches: o_cmp, o_slc, o_win [B, S, Hq, Dv]; lses: of the same, float32 [B, S, Hq].
    """
    return _backward(kernels, plan, grad_o, (*branches, gates), lses)


def add(kernels: Any, plan: Plan, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`a + b + c` in float32, rounded once to their dtype; contiguous tensors of one shape."""
    total = torch.empty_like(a)
    constants = dict(plan["add"])
    grid = (-(-total.numel() // constants["BLOCK_E"]),)
    kernels.add[grid](a, b, c, total, total.numel(), **constants)
    return total


def _backward(
    kernels: Any,
    plan: Plan,
    grad_o: Tensor,
    given: tuple[Tensor, ...],
    lses: tuple[Tensor, ...],
) -> tuple[Four, list[Tensor]]:
    inputs = [x.contiguous() for x in given]
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
    stats = [x.contiguous() for x in lses]
    deltas = [torch.empty_like(x) for x in stats]
    grid, arguments = _geometry(plan["backward"], inputs[0])
    unread = [inputs[0]] * 6  # of a kernel without DELTA
    kernels.backward[grid](
        grad_o.contiguous(), *inputs, *grads, *([*stats, *deltas] or unread),
        DELTA=bool(stats), **arguments,
    )  # fmt: skip
    d_cmp, d_slc, d_win, d_gates = grads
    return (d_cmp, d_slc, d_win, d_gates), deltas


def _geometry(constants: Any, o: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    rows, dv = o.shape[:-1].numel(), o.shape[-1]
    arguments = {"rows": rows, "DV": dv, "WIDTH": 1 << (dv - 1).bit_length(), **constants}
    return (-(-rows // constants["BLOCK_M"]),), arguments
