"""A contiguous key-value cache for decoding with NSA.

Raw keys and values of the three branches, and the compressed blocks, in buffers of fixed capacity.
A compressed block is appended exactly when its last token arrives (rule 12). Positions are plain
ints that the caller passes, so a compiled step takes them as dynamic sizes and is not recompiled as
the sequence grows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_neuron.errors import InvalidArgument
from nsa_neuron.ops.common import compressed_blocks

BRANCHES = ("cmp", "slc", "win")


@dataclass
class LayerCache:
    """One layer's buffers.

    Attributes:
        k: raw keys of the compressed, selected and window branch, each `[B, capacity, Hkv, Dk]`.
        v: raw values, each `[B, capacity, Hkv, Dv]`.
        k_cmp: compressed keys `[B, blocks(capacity), Hkv, Dk]`.
        v_cmp: compressed values `[B, blocks(capacity), Hkv, Dv]`.
        block: l.
        stride: d.
    """

    k: tuple[Tensor, Tensor, Tensor]
    v: tuple[Tensor, Tensor, Tensor]
    k_cmp: Tensor
    v_cmp: Tensor
    block: int
    stride: int

    @classmethod
    def empty(
        cls,
        batch: int,
        capacity: int,
        kv_heads: int,
        dims: tuple[int, int],
        *,
        block: int = 32,
        stride: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> LayerCache:
        """Zeroed buffers for up to `capacity` tokens; dims are (Dk, Dv)."""
        blocks = compressed_blocks(capacity, block, stride)

        def buffer(rows: int, dim: int) -> Tensor:
            return torch.zeros(batch, rows, kv_heads, dim, dtype=dtype, device=device)

        dk, dv = dims
        k = (buffer(capacity, dk), buffer(capacity, dk), buffer(capacity, dk))
        v = (buffer(capacity, dv), buffer(capacity, dv), buffer(capacity, dv))
        return cls(k, v, buffer(blocks, dk), buffer(blocks, dv), block, stride)

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.k[0].shape[1]

    def append(
        self,
        k: tuple[Tensor, Tensor, Tensor],
        v: tuple[Tensor, Tensor, Tensor],
        position: int,
        compress_k: Callable[[Tensor], Tensor],
        compress_v: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """Stores new tokens and the compressed blocks that they complete.

        Args:
            k: new keys of each branch, `[B, S, Hkv, Dk]`.
            v: new values of each branch.
            position: tokens stored so far.
            compress_k: phi of the keys, `[B, n, Hkv, Dk] -> [B, blocks(n), Hkv, Dk]`.
            compress_v: phi of the values.

        Returns:
            `k_cmp, v_cmp, k_slc, v_slc, k_win, v_win` of the whole sequence: views of the buffers.

        Raises:
            InvalidArgument: the cache is full.
        """
        total = position + k[0].shape[1]
        if total > self.capacity:
            found = f"holding {position} tokens and given {total - position} more"
            raise InvalidArgument("LayerCache.append", "k", found, f"within {self.capacity} tokens")
        for buffers, new in ((self.k, k), (self.v, v)):
            for buffer, x in zip(buffers, new, strict=True):
                buffer[:, position:total] = x
        had = compressed_blocks(position, self.block, self.stride)
        has = compressed_blocks(total, self.block, self.stride)
        # A decode step completes no block or one, and torch.compile would specialise on those
        # sizes. So the last blocks are written again, with the same values: never 0 or 1.
        had = max(0, had - 2)
        fresh = slice(had * self.stride, total)
        for raw, store, phi in (
            (self.k[0], self.k_cmp, compress_k),
            (self.v[0], self.v_cmp, compress_v),
        ):
            store[:, had:has] = phi(raw[:, fresh])
        return {
            "k_cmp": self.k_cmp[:, :has],
            "v_cmp": self.v_cmp[:, :has],
            "k_slc": self.k[1][:, :total],
            "v_slc": self.v[1][:, :total],
            "k_win": self.k[2][:, :total],
            "v_win": self.v[2][:, :total],
        }
