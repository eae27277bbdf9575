"""Launches `cuda_kernels/gated_sum.py`: the gated sum of the three branches and its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nsa_neuron.backends.cuda.launch.common import Plan


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of o_cmp, o_slc, o_win and gates, contiguous, in their dtypes."""
    inputs = [x.contiguous() for x in (o_cmp, o_slc, o_win, gates)]
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
    grid, arguments = _geometry(plan["backward"], inputs[0])
    kernels.backward[grid](grad_o.contiguous(), *inputs, *grads, **arguments)
    d_cmp, d_slc, d_win, d_gates = grads
    return d_cmp, d_slc, d_win, d_gates


def _geometry(constants: Any, o: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    rows, dv = o.shape[:-1].numel(), o.shape[-1]
    arguments = {"rows": rows, "DV": dv, "WIDTH": 1 << (dv - 1).bit_length(), **constants}
    return (-(-rows // constants["BLOCK_M"]),), arguments
