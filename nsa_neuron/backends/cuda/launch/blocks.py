"""Offsets of the compressed blocks of a packed batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def compressed_offsets(cu_seqlens_k: Tensor, block: int, stride: int) -> Tensor:
    """Where each sequence's compressed blocks begin: int32 [N + 1], computed on the device.

    Sequence i of T_i tokens has `max(0, (T_i - block) // stride + 1)` blocks, back to back.

    Args:
        cu_seqlens_k: int32 [N + 1], token offsets. block, stride: tokens.
    """
    lengths = cu_seqlens_k.diff()
    counts = (torch.div(lengths - block, stride, rounding_mode="floor") + 1).clamp(min=0)
    return F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def count_blocks(tokens: int, block: int, stride: int) -> int:
    """Complete compressed blocks of `tokens` tokens; of a packed batch, their static bound."""
    return max(0, (tokens - block) // stride + 1)
