"""Launches `nki_kernels/attention.py`: causal attention, forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from nsa_neuron.backends.neuron.launch import ranges

if TYPE_CHECKING:
    from nsa_neuron.backends.neuron.plans import Plan
    from nsa_neuron.backends.neuron.run import Kernels


def forward(
    kernels: Kernels,
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """Causal attention of q [B, S, Hq, Dk] over k, v [B, T, Hkv, D], last `window` keys if > 0.

    Returns:
        o [B, S, Hq, Dv] in q's dtype and lse [B, S, Hq] float32 (natural logarithm).
    """
    seen = ranges.causal(q.shape[1], k.shape[1], window, cu_seqlens_q, cu_seqlens_k, q.device)
    return ranges.forward(kernels, plan, q, k, v, seen, scale)


def backward(
    kernels: Kernels,
    plan: Plan,
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None = None,
    *,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` with respect to q, k and v, contiguous, in their dtypes.

    Args:
        grad_o: [B, S, Hq, Dv]; grad_lse: float32 [B, S, Hq] or None for zero.
    """
    seen = ranges.causal(q.shape[1], k.shape[1], window, cu_seqlens_q, cu_seqlens_k, q.device)
    return ranges.backward(kernels, plan, grad_o, q, k, v, o, lse, grad_lse, seen, scale)
