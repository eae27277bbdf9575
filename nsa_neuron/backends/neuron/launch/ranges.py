"""What attention over one range of keys per query shares: bounds, layout, sign of the scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nsa_neuron.backends.neuron.run import Kernels

UNLIMITED = -(2**30)


@dataclass(frozen=True)
class Ranges:
    """Which keys each query sees. See `nki_kernels/common/range_attention`.

    Attributes:
        bounds: [S, 2] float32, first key and one past the last.
        reach: (hi_add, lo_add, step, exact), the bounds as compile-time integers.
    """

    bounds: Tensor
    reach: tuple[int, int, int, bool]


def causal(
    queries: int,
    keys: int,
    window: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    device: torch.device,
) -> Ranges:
    """Keys up to each query's own, the last `window` of them if window > 0; packed or not."""
    row = torch.arange(queries, device=device)
    past = keys - queries
    if cu_seqlens_q is None or cu_seqlens_k is None:
        first = torch.zeros_like(row)
        last = row + past + 1
    else:
        sequence = torch.bucketize(row, cu_seqlens_q[1:].to(row.dtype), right=True)
        # Queries are the last of their sequence's keys, so both end together.
        last = row + 1 + (cu_seqlens_k - cu_seqlens_q)[1:].to(row.dtype)[sequence]
        first = cu_seqlens_k.to(row.dtype)[sequence]
    if window:
        first = torch.maximum(first, last - window)
    # A packed query's keys end between row + 1 and row + past + 1.
    exact = cu_seqlens_q is None
    oldest = (past if exact else 0) + 1 - window if window else UNLIMITED
    bounds = torch.stack((first, last), 1).float()
    return Ranges(bounds, (past + 1, oldest, 1, exact))


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """q and scale with the same products, but scale > 0."""
    if scale > 0:
        return q, scale
    return (q * 0, 1.0) if scale == 0 else (-q, -scale)


def turned(x: Tensor) -> Tensor:
    """[B, T, H, D] -> contiguous [B, H, D, T]."""
    return x.permute(0, 2, 3, 1).contiguous()


def forward(
    kernels: Kernels,
    constants: dict[str, Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Ranges,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o [B, S, Hq, Dv] in q's dtype and lse [B, S, Hq] float32.

    Args:
        kernels: with a kernel `forward`.
        constants: of that kernel's plan.
        q: [B, S, Hq, Dk]; k, v: [B, T, Hkv, D].
        scale: of the logits, any sign.
    """
    q, scale = positive_scale(q, scale)
    o, lse = kernels.forward(
        q.contiguous(), turned(k), v.contiguous(), ranges.bounds,
        reach=ranges.reach, scale=scale, **constants,
    )  # fmt: skip
    return o, lse.squeeze(-1)
