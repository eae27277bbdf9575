"""Where tiles begin and end: every offset of the diagonal, the window and the blocks around them.

Tiles of 16 rows and 16 keys, so that a sweep over one tile's offsets costs little; the edges are
computed by the same expressions at any size.
"""

from __future__ import annotations

from functools import partial

import masked_oracle as oracle
import pytest
import torch
from poisoned import poison  # noqa: F401

pytest.importorskip("triton")

from nsa_neuron.backends.cuda import plans
from nsa_neuron.backends.cuda.launch import (
    attention,
    compressed_attention,
    sliding_window_attention,
)
from nsa_neuron.toolchain import KernelPackage, triton_interpreter

pytestmark = pytest.mark.sim

TILE = 16
PACKAGE = KernelPackage("cuda_kernels", triton_interpreter)


def tiles(op: str, rows: int = TILE, keys: int = TILE) -> dict:
    found = plans.find("interpret", op, dk=16, dv=16, dtype="float32", group=1)
    for kernel in ("forward", "backward_dq", "backward_dkv"):
        found[kernel] |= {"BLOCK_M": rows, "BLOCK_N": keys}
    return found


def check(queries: int, past: int, window: int, group: int = 1, rows: int = TILE) -> None:
    module, name = (
        (sliding_window_attention, "sliding_window_attention")
        if window
        else (attention, "attention")
    )
    options = {"window": window} if window else {}
    kernels, plan = PACKAGE.load(name), tiles("attention", rows)
    problem = oracle.Problem.random(1, queries, queries + past, 1, group, 16, 16, seed=past)
    seen = oracle.causal(queries, queries + past, window)
    oracle.check(
        problem, [(slice(None), slice(None), seen)],
        partial(module.forward, kernels, plan, **options),
        partial(module.backward, kernels, plan, **options),
    )  # fmt: skip


@pytest.mark.parametrize("past", range(TILE + 2))
def test_where_the_diagonal_meets_a_tile(past: int) -> None:
    """One key too many in the unmasked tiles shows at one offset of 16 only."""
    check(3, past, 0)
    check(TILE + 1, past, 0)


@pytest.mark.parametrize("window", [1, 2, 3, *range(TILE - 1, TILE + 4), 2 * TILE, 2 * TILE + 2])
def test_where_a_window_meets_a_tile(window: int) -> None:
    """Whole sequences and a tail; dk and dv of a tile's last key lose a query at some windows."""
    check(2 * TILE + 3, 0, window)
    check(2, TILE + window, window)


@pytest.mark.parametrize("group", [3, 12])
def test_where_groups_of_heads_meet_a_tile_of_rows(group: int) -> None:
    """A tile of rows ends inside a token's heads; its first and last positions differ."""
    check(6, 0, 0, group)
    check(6, TILE - 1, 5, group)
    check(6, TILE - 2, 0, group)


def visible(queries: int, tokens: int, block: int, stride: int) -> torch.Tensor:
    position = torch.arange(tokens - queries, tokens)[:, None]
    count = max(0, (tokens - block) // stride + 1)
    return torch.arange(count) * stride + block - 1 <= position


@pytest.mark.parametrize("tokens", [*range(33, 40), 66, 67, 68, 69])
def test_where_complete_blocks_meet_a_tile(tokens: int) -> None:
    """15, 16 and 17 blocks of 4 tokens, two apart; and twice that."""
    block, stride = 4, 2
    kernels, plan = PACKAGE.load("compressed_attention"), tiles("compressed_attention")
    for queries in (1, 5, 18):
        seen = visible(queries, tokens, block, stride)
        problem = oracle.Problem.random(1, queries, seen.shape[1], 1, 1, 16, 16, seed=tokens)
        geometry = {"kv_len": tokens, "block": block, "stride": stride}
        oracle.check(
            problem, [(slice(None), slice(None), seen)],
            partial(compressed_attention.forward, kernels, plan, **geometry),
            partial(compressed_attention.backward, kernels, plan, **geometry),
        )  # fmt: skip
