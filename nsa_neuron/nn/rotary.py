"""Rotary position encoding, and the positions it is told."""

from __future__ import annotations

import torch
from torch import Tensor

Turn = tuple[Tensor, Tensor]
"""Cosines, once for each half of the channels, `[S, 1, D]` or `[B, S, 1, D]`, and sines, once,
`[S, 1, D / 2]` or `[B, S, 1, D / 2]`, of what channels are turned by."""


def turn_of(positions: Tensor, dim: int, base: float, dtype: torch.dtype) -> Turn | None:
    """What positions turn heads of `dim` channels by; None if the base is 0, which turns nothing.

    Args:
        positions: `[S]` or `[B, S]`, int64.
        dim: D, even.
        base: of the rates.
        dtype: of what is turned.
    """
    if base == 0:
        return None
    rates = base ** -(torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = positions.to(torch.float32)[..., None, None] * rates
    cos = angles.cos().to(dtype)
    return torch.cat([cos, cos], -1), angles.sin().to(dtype)


def turned(x: Tensor, turn: Turn | None) -> Tensor:
    """The halves of the channels of `[B, S, H, D]`, rotated against each other."""
    if turn is None:
        return x
    cos, sin = turn
    a, b = x.chunk(2, -1)
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Three passes over memory, not seven; autograd would copy what is written in place, and a
        # compiler makes one pass of either form. x.requires_grad would not tell: inside of vmap it
        # is False whatever autograd records outside.
        y = x * cos
        first, second = y.chunk(2, -1)
        first.addcmul_(b, sin, value=-1)
        second.addcmul_(a, sin)
        return y
    cos = cos[..., : a.shape[-1]]
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(a * sin, b, cos)], -1)


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary position encoding of `[B, S, H, D]`, D even; see `turn_of` and `turned`."""
    return turned(x, turn_of(positions, x.shape[-1], base, x.dtype))


def token_positions(count: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Position of each token in its own sequence, `[count]` int64."""
    rows = torch.arange(count, device=device)
    return rows if cu_seqlens is None else _within(rows, cu_seqlens.long())


def block_positions(
    blocks: int, block: int, stride: int, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """Position of the last token of each compressed block, as `compress` orders them.

    Args:
        blocks: Nc, of all sequences together.
        block, stride: l and d.
        cu_seqlens: offsets of packed sequences; None: one sequence.
        device: of the result.

    Returns:
        `[Nc]` int64; rows behind a packed call's blocks hold any position.
    """
    rows = torch.arange(blocks, device=device)
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
