"""Packed sequences, of which one may hold NaN or infinity.

TensorE multiplies what a row does not see by zero, and 0 * NaN is NaN. Where rows of several
sequences share a tile, their keys, values and gradients lose what is not finite before a kernel
runs, and the results that it reaches are NaN afterwards. Positions are data, so all this is torch
operations on the device; it is for packed calls only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def spoiled(*tensors: Tensor) -> Tensor:
    """Where one of some [B, R, H, D] has a row that is not finite: bool [B, R, H]."""
    found = ~tensors[0].isfinite().all(-1)
    for x in tensors[1:]:
        found = found | ~x.isfinite().all(-1)
    return found


def cleaned(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, R, H, ...] with zeros in some rows [B, R, H]."""
    return x.masked_fill(rows.view(*rows.shape, *[1] * (x.ndim - 3)), 0.0)


def marked(x: Tensor, rows: Tensor) -> Tensor:
    """The same with NaN; of rows of kv heads, all their query heads."""
    rows = rows.repeat_interleave(x.shape[2] // rows.shape[2], 2)
    return x.masked_fill(rows.view(*rows.shape, *[1] * (x.ndim - 3)), torch.nan)


def by_kv_head(rows: Tensor, kv_heads: int) -> Tensor:
    """Where some query head of a kv head is marked: [B, S, Hq] as [B, S, Hkv]."""
    grouped: Tensor = rows.unflatten(2, (kv_heads, -1))
    return grouped.any(-1)


@dataclass(frozen=True)
class Spans:
    """What queries see: keys first .. end - 1, int64 [B, S, Hkv, N], N spans each; of `keys`."""

    first: Tensor
    end: Tensor
    keys: int

    @classmethod
    def of(cls, first: Tensor, end: Tensor, batch: int, kv_heads: int, keys: int) -> Spans:
        """One span per query, [S], for all batch rows and heads."""
        shape = (batch, len(first), kv_heads, 1)
        first, end = (x.long().clamp(0, keys)[None, :, None, None] for x in (first, end))
        return cls(first.expand(shape), end.maximum(first).expand(shape), keys)

    def seeing(self, bad: Tensor) -> Tensor:
        """Queries that see one of some keys [B, T, Hkv]: bool [B, S, Hkv]."""
        count = F.pad(bad.int().cumsum(1), (0, 0, 1, 0))
        before, after = (count.gather(1, self._flat(x)) for x in (self.first, self.end))
        shape = self.first.transpose(2, 3).shape
        return (after > before).view(shape).any(2)

    def seen(self, bad: Tensor) -> Tensor:
        """Keys that one of some queries [B, S, Hkv] sees: bool [B, T, Hkv]."""
        one = bad[..., None].expand(self.first.shape).int()
        edges = one.new_zeros(one.shape[0], self.keys + 1, one.shape[2])
        edges.scatter_add_(1, self._flat(self.first), self._flat(one))
        edges.scatter_add_(1, self._flat(self.end), -self._flat(one))
        return edges.cumsum(1)[:, : self.keys] > 0

    @staticmethod
    def _flat(x: Tensor) -> Tensor:
        """[B, S, Hkv, N] as [B, S * N, Hkv]."""
        return x.transpose(2, 3).flatten(1, 2)
