"""What calls cost: multiplications counted by going through every query and key."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nsa_neuron.ops import get

if TYPE_CHECKING:
    from nsa_neuron.spec import Cost

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


def cost_of(op: str, sizes: dict[str, int], **scalars: Any) -> Cost:
    """The cost of a call whose floating tensors are bfloat16."""
    spec = get(op)
    given: dict[str, Any] = {**dict.fromkeys(spec.names), **spec.defaults, **scalars}
    for arg in spec.tensors:
        if not arg.optional:
            kind = {"stat": torch.float32, "i32": torch.int32}.get(arg.dtype, torch.bfloat16)
            size = [sizes[s] if s in sizes else int(s) for s in arg.forms[0]]
            given[arg.name] = torch.empty(size, dtype=kind, device="meta")
    return spec.cost(spec.bind(given))


@pytest.mark.parametrize("direction", ["", "_backward"])
@pytest.mark.parametrize(
    ("method", "operations"),
    [("mean", 8 * 6), ("linear", 2 * 8 * 6 * 6), ("mlp", 2 * 8 * 6 * 10 + 2 * 10 * 6)],
)
def test_compression_costs_its_products(method: str, operations: int, direction: str) -> None:
    """Operations of a block of 8 tokens of 6 channels; backward: of inputs, weights, and again."""
    wide = 10 if method == "mlp" else 6
    shapes = {"w1": (48, wide), "b1": (wide,), "w2": (wide, 6), "b2": (6,)}
    weights = {"mean": (), "linear": ("w1",), "mlp": ("w1", "b1", "w2", "b2")}[method]
    spec = get(f"compress{direction}")
    given: dict[str, Any] = {**dict.fromkeys(spec.names), **spec.defaults}
    given |= {"method": method, "block": 8, "stride": 4, "x": torch.empty(3, 23, 2, 6)}
    given |= {name: torch.empty(shapes[name]) for name in weights}
    if direction:
        given["grad_y"] = torch.empty(3, 4, 2, 6)
    found = spec.cost(spec.bind(given))
    blocks = 3 * 4 * 2  # of 23 tokens: 0-7, 4-11, 8-15, 12-19
    assert found.flops == blocks * operations * (3 if direction else 1)
    elements = 3 * 23 * 2 * 6 + blocks * 6 + sum(torch.empty(shapes[w]).numel() for w in weights)
    twice = elements - blocks * 6 if direction else 0  # gradients of inputs and weights
    assert found.bytes == 4 * (elements + twice)


def test_the_gated_sum_costs_six_operations_an_element_and_its_gradient_twelve() -> None:
    sizes = {"B": 3, "S": S, "Hq": HQ, "Dv": DV}
    elements, gates = 3 * S * HQ * DV, 3 * S * HQ * 3
    ahead, back = cost_of("gated_sum", sizes), cost_of("gated_sum_backward", sizes)
    assert (ahead.flops, back.flops) == (6 * elements, 12 * elements)
    assert ahead.bytes == 2 * (4 * elements + gates), "three branches, gates and the sum"
    assert back.bytes == 2 * (7 * elements + 2 * gates)


GEOMETRY = {"block": BLOCK, "stride": STRIDE, "select_block": SELECT, "num_selected": CHOSEN}
FORCED = {"num_initial": 1, "num_local": 1}
SIZES = {
    "B": 3, "S": S, "T": T, "Hq": HQ, "Hkv": HKV, "Dk": DK, "Dv": DV, "Nc": COMPLETE, "n": CHOSEN,
}  # fmt: skip


def pairs_of(op: str) -> int:
    """Of the last S queries, three sequences."""
    _, keys, sees = SEEN[op]
    return 3 * sum(sees(t, j) for t in range(T - S, T) for j in range(keys))


CHOSEN_PAIRS = 3 * sum(min(t + 1, CHOSEN * SELECT) for t in range(T - S, T))


def test_selection_costs_the_scores_of_every_head() -> None:
    found = cost_of("select_blocks", SIZES, kv_len=T, **GEOMETRY, **FORCED)
    assert found.flops == 2 * pairs_of("compressed_attention") * HQ * DK
    q, k_cmp, lse = 3 * S * HQ * DK, 3 * COMPLETE * HKV * DK, 3 * S * HQ
    assert found.bytes == 2 * (q + k_cmp) + 2 * lse + 4 * 3 * S * HKV * CHOSEN


def test_ids_are_four_bytes_in_any_dtype() -> None:
    found = cost_of("selected_attention", SIZES, select_block=SELECT)
    floats = 3 * (S * HQ * (DK + DV) + T * HKV * (DK + DV))
    # lse is float32; ids are int32.
    assert found.bytes == 2 * floats + 4 * 3 * S * HQ + 4 * 3 * S * HKV * CHOSEN
    assert found.flops == 2 * CHOSEN_PAIRS * HQ * (DK + DV)


def test_the_whole_costs_its_branches_and_the_scores_once_more() -> None:
    scalars = {**GEOMETRY, **FORCED, "window": WINDOW}
    branches = (
        pairs_of("compressed_attention") + pairs_of("sliding_window_attention") + CHOSEN_PAIRS
    )
    scores = 2 * pairs_of("compressed_attention") * HQ * DK
    products = 2 * branches * HQ * (DK + DV)
    for op in ("nsa_attention", "nsa_attention_forward"):
        assert cost_of(op, SIZES, **scalars).flops == products + scores
    assert cost_of("nsa_attention_backward", SIZES, **scalars).flops == 5 * products // 2


@pytest.mark.parametrize(
    ("pages", "seen"),
    [(1, 1 + 8 + 5), (2, 3 + 16 + 5), (9, 17 + 16 + 5)],
    ids=["one page", "all chosen", "long"],
)
def test_a_decode_step_reads_what_full_tables_show(pages: int, seen: int) -> None:
    """`pages` of 8 tokens: blocks, two blocks of 8 chosen, a window of 5."""
    sizes = {**SIZES, "S": 2, "page_cmp": 2, "pages_cmp": 30, "most_cmp": 9}
    for name in ("slc", "win"):
        sizes |= {f"page_{name}": 8, f"pages_{name}": 30, f"most_{name}": pages}
    found = cost_of("decode", sizes, **GEOMETRY, **FORCED, window=WINDOW)
    assert found.flops == 2 * 3 * 2 * seen * HQ * (DK + DV)
    own = 3 * 2 * HQ * (DK + DV + 3)
    assert found.bytes == 2 * (3 * seen * HKV * (DK + DV) + own)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 30, 2**31 - 1])
def test_pairs_are_counted_without_going_through_them(tokens: int) -> None:
    """Near 2^31 a list of queries would take 16 GB."""
    sizes = {"B": 1, "S": 1, "T": tokens, "Hq": 1, "Hkv": 1, "Dk": 1, "Dv": 1}
    scalars = {"kv_len": tokens, "block": 9, "stride": 3}
    sizes["Nc"] = max(0, (tokens - 9) // 3 + 1)
    assert cost_of("compressed_attention", sizes, **scalars).flops == 4 * sizes["Nc"]
    assert cost_of("sliding_window_attention", sizes, window=7).flops == 4 * min(tokens, 7)
    all_ask = {**sizes, "S": tokens}
    assert cost_of("attention", all_ask).flops == 2 * tokens * (tokens + 1)
