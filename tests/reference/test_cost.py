"""What calls cost: multiplications counted by going through every query and key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsa_neuron.ops import get

S, T, HQ, HKV, DK, DV = 9, 23, 4, 2, 8, 6
BLOCK, STRIDE, SELECT, CHOSEN, WINDOW = 8, 4, 8, 2, 5
COMPLETE = (T - BLOCK) // STRIDE + 1
SEEN: dict[str, tuple[dict[str, int], int, Callable[[int, int], bool]]] = {
    "attention": ({}, T, lambda t, j: j <= t),
    "sliding_window_attention": ({"window": WINDOW}, T, lambda t, j: t - WINDOW < j <= t),
    "compressed_attention": (
        {"kv_len": T, "block": BLOCK, "stride": STRIDE}, COMPLETE,
        lambda t, i: i * STRIDE + BLOCK - 1 <= t,
    ),
}  # fmt: skip


@pytest.mark.parametrize("tokens", [S, T])
@pytest.mark.parametrize("op", SEEN)
def test_attention_multiplies_what_queries_see(op: str, tokens: int) -> None:
    """`T` queries: the first see no complete block, which is no less than none."""
    scalars, keys, sees = SEEN[op]
    pairs = sum(sees(t, j) for t in range(T - tokens, T) for j in range(keys))
    flops = 2 * pairs * HQ * (DK + DV)  # a multiplication and an addition; q k^T and p v
    for direction, products in (("", 2), ("_backward", 5)):
        spec = get(op + direction)
        shapes = {"Hq": HQ, "Hkv": HKV, "Dk": DK, "Dv": DV, "S": tokens, "T": T, "B": 3}
        shapes["Nc"] = COMPLETE
        given: dict[str, Any] = {**dict.fromkeys(spec.names), **spec.defaults, **scalars}
        for arg in spec.tensors:
            if not arg.optional:
                dtype = torch.float32 if arg.dtype == "stat" else torch.bfloat16
                size = [shapes[symbol] for symbol in arg.forms[0]]
                given[arg.name] = torch.empty(size, dtype=dtype, device="meta")
        assert spec.cost(spec.bind(given)).flops == 3 * flops * products // 2
