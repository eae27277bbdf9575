"""Bytes that context parallelism moves, in closed form: for the planner, and to test what is sent.

For one sequence of `ranks * tokens` tokens per batch row. Every rank receives, for the forward
pass, the keys and values before its own tokens: halos of the compression and the window, the
compressed blocks, and, if they are gathered, all raw rows of the selected branch. The backward pass
receives them again and sends as many bytes of gradients back.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Of a call.

    Attributes:
        ranks: R. tokens: C, of each rank.
        block, stride, window: l, d, w.
        row: bytes of a token's (or a compressed block's) keys and values in one branch, of all kv
            heads that a rank holds and the whole batch.
    """

    ranks: int
    tokens: int
    block: int
    stride: int
    window: int
    row: int


def received(sizes: Sizes, rank: int) -> dict[str, int]:
    """Bytes that a rank receives in a forward pass, by purpose."""
    before = rank * sizes.tokens
    incomplete = before - blocks(sizes, before) * sizes.stride
    return {
        "halo": (incomplete + min(before, sizes.window - 1)) * sizes.row,
        "compressed": blocks(sizes, before) * sizes.row,
        "selected": before * sizes.row,
    }


def blocks(sizes: Sizes, tokens: int) -> int:
    """Compressed blocks that end within the first tokens."""
    return max(0, (tokens - sizes.block) // sizes.stride + 1)


def training(sizes: Sizes, rank: int, replays: int = 0) -> int:
    """Bytes that a rank receives of others' rows, and sends as their gradients, in a layer's step.

    Args:
        sizes: of the call.
        rank: r.
        replays: forward passes that activation checkpointing adds.
    """
    return (3 + replays) * sum(received(sizes, rank).values())
