"""Where the compressed blocks of a packed batch lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_neuron.backends.cuda.launch.common import count_tiles

if TYPE_CHECKING:
    from nsa_neuron.backends.cuda.launch.common import Plan


def compressed_offsets(
    kernels: Any, plan: Plan, cu_seqlens_k: Tensor, block: int, stride: int
) -> Tensor:
    """Where each sequence's compressed blocks begin: int32 [N + 1], computed on the device.

    Sequence i of T_i tokens has `max(0, (T_i - block) // stride + 1)` blocks, back to back.

    Args:
        cu_seqlens_k: int32 [N + 1], contiguous token offsets. block, stride: tokens.
    """
    offsets = torch.empty_like(cu_seqlens_k)
    kernels.count_compressed[(1,)](
        cu_seqlens_k, offsets, cu_seqlens_k.shape[0] - 1, BLOCK=block, STRIDE=stride,
        **plan["count_compressed"],
    )  # fmt: skip
    return offsets


def first_tokens(
    kernels: Any, plan: Plan, cu_seqlens_k: Tensor, offsets: Tensor, count: int, stride: int
) -> Tensor:
    """The first token of each compressed block: int32 [count], set for the blocks there are.

    Args:
        offsets: of `compressed_offsets`. count: the static bound of blocks. stride: tokens.
    """
    starts = torch.empty(count, dtype=torch.int32, device=offsets.device)
    constants = dict(plan["first_tokens"])
    num_seqs = offsets.shape[0] - 1
    if count:
        kernels.first_tokens[(count_tiles(count, 1, constants["BLOCK_I"], num_seqs),)](
            cu_seqlens_k, offsets, starts, num_seqs, STRIDE=stride, **constants
        )
    return starts


def count_blocks(tokens: int, block: int, stride: int) -> int:
    """Complete compressed blocks of `tokens` tokens; of a packed batch, their static bound."""
    return max(0, (tokens - block) // stride + 1)
