"""Padded batches as packed sequences, so that padding is never computed and never seen."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_neuron.errors import InvalidArgument, InvalidType


def pack(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The real tokens of a padded batch, back to back.

    Args:
        x: `[B, S, ...]`.
        mask: `[B, S]` bool; the real tokens of a row are next to each other.

    Returns:
        `[1, N, ...]` and the offsets of the sequences, `[B + 1]` int32.

    Raises:
        InvalidArgument, InvalidType: another shape, an empty row, or padding between tokens.
    """
    if mask.dtype != torch.bool:
        raise InvalidType("pack", "mask", str(mask.dtype), "torch.bool")
    if mask.shape != x.shape[:2]:
        found = f"of shape {list(mask.shape)}"
        raise InvalidArgument("pack", "mask", found, f"of shape {list(x.shape[:2])}")
    counts = mask.sum(1)
    if (counts == 0).any():
        raise InvalidArgument("pack", "mask", "empty in some row", "true somewhere in each")
    changes = (mask[:, 1:] != mask[:, :-1]).sum(1) + mask[:, 0].long() + mask[:, -1].long()
    if (changes > 2).any():
        found = "padding between tokens"
        raise InvalidArgument("pack", "mask", found, "with each row's tokens next to each other")
    edges = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return x[mask][None], edges.int()


def unpack(packed: Tensor, mask: Tensor) -> Tensor:
    """The inverse of `pack`: `[1, N, ...]` -> `[B, S, ...]`, zero at padding."""
    out = packed.new_zeros(*mask.shape, *packed.shape[2:])
    return out.masked_scatter(mask.view(*mask.shape, *(1,) * (out.dim() - 2)), packed[0])
