"""Launches `cuda_kernels/sliding_window_attention.py`: the kernels of attention with a window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nsa_neuron.backends.cuda.launch import attention

if TYPE_CHECKING:
    from torch import Tensor

    from nsa_neuron.backends.cuda.launch.common import Plan


def forward(
    kernels: Any,
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, S, Hq, Dk] over the last `window` keys, each query's own included.

    Arguments and results as `attention.forward`.
    """
    return attention.forward(
        kernels, plan, q, k, v, scale=scale, window=window,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip


def backward(
    kernels: Any,
    plan: Plan,
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None = None,
    *,
    window: int,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` with respect to q, k and v. As `attention.backward`."""
    return attention.backward(
        kernels, plan, grad_o, q, k, v, o, lse, grad_lse, scale=scale, window=window,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, delta=delta,
    )  # fmt: skip
