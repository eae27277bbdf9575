"""Rotary position encoding, and the positions it is told."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_neuron.ops.common import compressed_blocks


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary position encoding: the halves of the channels are rotated against each other.

    Args:
        x: `[B, S, H, D]`, D even.
        positions: `[S]` or `[B, S]`, int64.
        base: of the rates; 0: x comes back as it is.
    """
    if base == 0:
        return x
    dim = x.shape[-1]
    rates = base ** -(torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
    angles = positions.to(torch.float32)[..., None, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def token_positions(count: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Position of each token in its own sequence, `[count]` int64."""
    rows = torch.arange(count, device=device)
    return rows if cu_seqlens is None else _within(rows, cu_seqlens.long())


def block_positions(
    tokens: int, block: int, stride: int, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """Position of the last token of each compressed block, as `compress` orders them.

    Args:
        tokens: T, of all sequences together.
        block, stride: l and d.
        cu_seqlens: offsets of packed sequences; None: one sequence.
        device: of the result.

    Returns:
        `[Nc]` int64; rows behind a packed call's blocks hold any position.
    """
    rows = torch.arange(compressed_blocks(tokens, block, stride), device=device)
    if cu_seqlens is not None:
        counts = ((cu_seqlens.diff().long() - block).div(stride, rounding_mode="floor") + 1).clamp(
            min=0
        )
        rows = _within(rows, torch.nn.functional.pad(counts.cumsum(0), (1, 0)))
    return rows * stride + block - 1


def _within(rows: Tensor, edges: Tensor) -> Tensor:
    """Distance of each row from the start of the piece between two edges that holds it."""
    piece = torch.searchsorted(edges, rows, right=True) - 1
    return rows - edges[piece]
