"""What the launchers share: head-dim tiles, strides, grids over packed batches, dtype switches.

A launcher allocates outputs, computes the grid from shapes and calls the kernel. It holds no policy
(that is the tile plan's) and no validation (that is the op spec's), and it never waits for the
device: nothing here reads a tensor's values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Plan = Mapping[str, Mapping[str, Any]]
"""Kernel name -> its constants (`BLOCK_M`, ..., `num_warps`, `num_stages`)."""

_IN_TILE_OFFSET_LIMIT = 2**31 // 512


def split_head_dim(dim: int) -> tuple[int, int]:
    """Column tiles (D0, D1) of a head dim: powers of two >= 16 with D0 + D1 >= dim, or D1 = 0.

    192 gives (128, 64), 80 gives (64, 16), 128 gives (128, 0). Two tiles are used only where they
    are narrower than the next power of two.
    """
    single = max(16, next_power_of_two(dim))
    first = single // 2
    if dim <= first or first < 16:
        return single, 0
    second = max(16, next_power_of_two(dim - first))
    return (first, second) if first + second < single else (single, 0)


def next_power_of_two(value: int) -> int:
    """The smallest power of two >= value (1 for 0)."""
    return 1 << max(0, value - 1).bit_length()


def head_dim_constants(dk: int, dv: int) -> dict[str, int]:
    """The constants DK, D0, D1, DV, V0, V1 of a kernel."""
    d0, d1 = split_head_dim(dk)
    v0, v1 = split_head_dim(dv)
    return {"DK": dk, "D0": d0, "D1": d1, "DV": dv, "V0": v0, "V1": v1}


def key_tile(planned: int, select_block: int) -> int:
    """The planned tile of keys, or a smaller one where a whole selection block is smaller."""
    return min(planned, max(16, next_power_of_two(select_block)))


def query_tile_constants(
    planned: Mapping[str, Any], group: int, select_block: int
) -> dict[str, Any]:
    """The plan of a kernel over QUERIES tokens x G heads, with G, BLOCK_M and BLOCK_N filled in."""
    rows = max(16, next_power_of_two(planned["QUERIES"] * group))
    tile = key_tile(planned["BLOCK_N"], select_block)
    return {**planned, "G": group, "BLOCK_M": rows, "BLOCK_N": tile}


def addressable(x: Tensor) -> Tensor:
    """`x` [B, S, H, D] itself, or a contiguous copy where a kernel cannot address it as it is.

    Kernels want the last dim contiguous, and offsets inside one tile (up to 512 tokens) in 32 bits.
    """
    if x.stride(-1) != 1 or max(x.stride(1), x.stride(2)) >= _IN_TILE_OFFSET_LIMIT:
        return x.contiguous()
    return x


def strides(*tensors: Tensor) -> list[int]:
    """Batch, token and head strides of each [B, S, H, D] tensor, in order."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def count_tiles(tokens: int, rows_per_token: int, block: int, num_seqs: int) -> int:
    """Bound of tiles of `block` rows over `tokens` tokens, packed (num_seqs > 0) or not."""
    rows = tokens * rows_per_token
    return rows // block + num_seqs if num_seqs else -(-rows // block)


def packed_args(
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, placeholder: Tensor
) -> tuple[Tensor, Tensor, int]:
    """cu_q, cu_k and the number of sequences; `placeholder` (never read) and 0 when not packed."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return placeholder, placeholder, 0
    return cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), cu_seqlens_q.shape[0] - 1


def launch_delta(
    kernels: Any, plan: Plan, grad_o: Tensor, o: Tensor, lse: Tensor, grad_lse: Tensor | None
) -> Tensor:
    """Runs `backward_delta`: float32 [B, S, Hq], see the kernel."""
    constants = dict(plan["backward_delta"])
    batch, tokens, heads, dv = o.shape
    v0, v1 = split_head_dim(dv)
    o, grad_o, lse = addressable(o), addressable(grad_o), lse.contiguous()
    delta = torch.empty_like(lse)
    rows = batch * tokens * heads
    kernels.backward_delta[(-(-rows // constants["BLOCK_M"]),)](
        o, grad_o, lse, lse if grad_lse is None else grad_lse.contiguous(), delta,
        rows, heads, tokens, *strides(o, grad_o),
        DV=dv, V0=v0, V1=v1, HAS_GRAD_LSE=grad_lse is not None, **constants,
    )  # fmt: skip
    return delta
