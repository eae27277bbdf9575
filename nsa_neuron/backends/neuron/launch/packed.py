"""Packed sequences laid out so that each begins at a multiple of a step.

Kernels work on one long row of chunks (of a compression stride, of a selection block). A packed
batch becomes one by giving every sequence a whole number of chunks; all sizes are static, the
positions are computed with torch on the device of `cu_seqlens`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Aligned:
    """Sequences of given lengths, each padded to whole steps, in one row.

    Attributes:
        starts: int64 [N + 1], where each sequence begins without padding.
        aligned: int64 [N + 1], where it begins with padding.
        size: rows of the padded layout, a static bound.
    """

    starts: Tensor
    aligned: Tensor
    size: int

    @staticmethod
    def of(lengths: Tensor, step: int, rows: int) -> Aligned:
        """Layout of sequences of `lengths` [N] with at most `rows` rows in all."""
        padded = torch.div(lengths + step - 1, step, rounding_mode="floor") * step
        bound = -(-(rows + lengths.shape[0] * (step - 1)) // step) * step
        starts, aligned = (F.pad(x.cumsum(0), (1, 0)).long() for x in (lengths, padded))
        return Aligned(starts, aligned, bound)

    def sequence(self, rows: int) -> tuple[Tensor, Tensor]:
        """Of each of the first `rows` unpadded rows: its sequence and its place there, [rows].

        Rows behind the last sequence count as rows of it.
        """
        return _places(self.starts, torch.arange(rows, device=self.starts.device))

    def padded_sequence(self) -> tuple[Tensor, Tensor]:
        """The same of each padded row, [size]."""
        return _places(self.aligned, torch.arange(self.size, device=self.aligned.device))


def _places(starts: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    last = starts.shape[0] - 2
    sequence = torch.searchsorted(starts[1:], index, right=True).clamp(max=last)
    return sequence, index - starts[sequence]


def block_counts(lengths: Tensor, block: int, stride: int) -> Tensor:
    """Complete compression blocks of sequences of `lengths` tokens."""
    return (torch.div(lengths - block, stride, rounding_mode="floor") + 1).clamp(min=0)


def take(x: Tensor, rows: Tensor, valid: Tensor | None = None) -> Tensor:
    """x [B, T, H, D] at `rows` of T; zero where not `valid`."""
    taken = x.index_select(1, rows)
    if valid is None:
        return taken
    return taken.masked_fill(~valid[None, :, None, None], 0.0)
