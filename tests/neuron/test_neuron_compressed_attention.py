"""`compressed_attention` on the simulated NeuronCore beyond the shared cases."""

from __future__ import annotations

from typing import Any

import judged
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreted import examples

from nsa_neuron.cases import cumulative, exact_normal
from nsa_neuron.ops.compressed_attention import compressed_attention

pytestmark = pytest.mark.sim

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def problem(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int] = (2, 1),
    geometry: tuple[int, int] = (8, 4),
    *,
    dims: tuple[int, int] = (8, 12),
    batch: int = 1,
    packed: bool = False,
    sharp: float = 1.0,
) -> dict[str, Any]:
    """Arguments of `compressed_attention`; several lengths only if packed."""
    queries, tokens = (sum(pair[i] for pair in lengths) for i in (0, 1))
    gen = torch.Generator().manual_seed(queries + tokens)
    rows = max(0, (tokens - geometry[0]) // geometry[1] + 1)
    values: dict[str, Any] = {
        "q": exact_normal(gen, batch, queries, heads[0], dims[0], scale=sharp),
        "k_cmp": exact_normal(gen, batch, rows, heads[1], dims[0]),
        "v_cmp": exact_normal(gen, batch, rows, heads[1], dims[1]),
        "kv_len": tokens,
        "block": geometry[0],
        "stride": geometry[1],
    }
    if packed:
        values["cu_seqlens_q"] = cumulative([s for s, _ in lengths])
        values["cu_seqlens_k"] = cumulative([t for _, t in lengths])
    return values


def check(values: dict[str, Any], dtype: torch.dtype) -> None:
    """Forward, and backward with gradients of o and of lse."""
    judged.judge("compressed_attention", values, dtype)
    exact = {
        name: x.double() if name in ("q", "k_cmp", "v_cmp") else x for name, x in values.items()
    }
    o, lse = compressed_attention(**exact)
    gen = torch.Generator().manual_seed(7)
    grads = {"grad_o": exact_normal(gen, *o.shape), "grad_lse": exact_normal(gen, *lse.shape)}
    judged.judge("compressed_attention_backward", {**values, "o": o, "lse": lse, **grads}, dtype)


@pytest.mark.parametrize("geometry", [(1, 1), (4, 1), (96, 32)])
def test_many_and_few_blocks(geometry):
    """More than one tile of keys; fewer blocks than a tile, and rows that see none."""
    values = problem([(210, 300)], geometry=geometry)
    check(values, torch.bfloat16)


@pytest.mark.parametrize("sharp", [30.0, 300.0])
def test_large_logits(sharp):
    values = problem([(100, 160)], sharp=sharp, dims=(64, 32))
    check(values, torch.float32)


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    stride = draw(st.integers(1, 8))
    packed = draw(st.booleans())
    pairs = []
    for _ in range(draw(st.integers(1, 3)) if packed else 1):
        queries = draw(st.integers(1, 70))
        pairs.append((queries, queries + draw(st.sampled_from([0, 0, 1, 50]))))
    kv_heads = draw(st.integers(1, 2))
    return problem(
        pairs,
        (kv_heads * draw(st.integers(1, 5)), kv_heads),
        (stride * draw(st.integers(1, 4)), stride),
        dims=(draw(st.sampled_from([1, 8, 130])), draw(st.sampled_from([1, 12]))),
        batch=1 if packed else draw(st.integers(1, 2)),
        packed=packed,
        sharp=draw(st.sampled_from([0.25, 1.0, 8.0])),
    )


@given(values=problems(), dtype=st.sampled_from(sorted(DTYPES)))
@examples(20)
def test_any_shape(values, dtype):
    check(values, DTYPES[dtype])
