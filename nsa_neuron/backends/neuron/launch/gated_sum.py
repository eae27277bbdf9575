"""Launches `nki_kernels/gated_sum.py`: the gated sum of the three branches and its gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from nsa_neuron.backends.neuron.plans import Plan
    from nsa_neuron.backends.neuron.run import Kernels


def forward(
    kernels: Kernels, plan: Plan, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor
) -> Tensor:
    """`o = sum_c gates[..., c] * o_c` [B, S, Hq, Dv] in o_cmp's dtype; gates [B, S, Hq, 3]."""
    rows = [_rows(x) for x in (o_cmp, o_slc, o_win, gates)]
    (o,) = kernels.forward(*rows, **plan["forward"])
    return o.view(o_cmp.shape)


def backward(
    kernels: Kernels,
    plan: Plan,
    grad_o: Tensor,
    o_cmp: Tensor,
    o_slc: Tensor,
    o_win: Tensor,
    gates: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of o_cmp, o_slc, o_win and gates, contiguous, in their dtypes."""
    inputs = (o_cmp, o_slc, o_win, gates)
    grads = kernels.backward(_rows(grad_o), *(_rows(x) for x in inputs), **plan["backward"])
    d_cmp, d_slc, d_win, d_gates = (
        grad.view(x.shape) for grad, x in zip(grads, inputs, strict=True)
    )
    return d_cmp, d_slc, d_win, d_gates


def _rows(x: Tensor) -> Tensor:
    """[B, S, Hq, D] -> contiguous [B * S * Hq, D]."""
    return x.reshape(-1, x.shape[-1]).contiguous()
