"""`compress` kernels beyond the shared cases: shapes, sizes past one tile, two cores, bits."""

from __future__ import annotations

import functools
from typing import Any

import judged
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreted import examples

from nsa_neuron.backends.neuron import plans, run
from nsa_neuron.backends.neuron.launch import compress as launch
from nsa_neuron.cases import cumulative, exact_normal

pytestmark = pytest.mark.sim

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def problem(
    method: str,
    tokens: int,
    block: int,
    stride: int,
    *,
    dim: int = 16,
    hidden: int = 24,
    heads: int = 1,
    batch: int = 1,
    per_head: bool = False,
    pe: bool = True,
    lengths: list[int] | None = None,
) -> dict[str, Any]:
    """Arguments of `compress_backward`; `compress` takes all but grad_y."""
    gen = torch.Generator().manual_seed(tokens)
    normal = functools.partial(exact_normal, gen)
    lead = (heads,) if per_head else ()
    width = dim if method == "linear" else hidden
    values: dict[str, Any] = {"method": method, "block": block, "stride": stride}
    values["x"] = normal(batch, tokens, heads, dim)
    values["grad_y"] = normal(batch, max(0, (tokens - block) // stride + 1), heads, dim)
    if method != "mean":
        values["w1"] = normal(*lead, block * dim, width, scale=(block * dim) ** -0.5)
        values["b1"] = normal(*lead, width)
    if method == "mlp":
        values["w2"] = normal(*lead, hidden, dim, scale=hidden**-0.5)
        values["b2"] = normal(*lead, dim)
    if pe:
        values["pe"] = normal(*lead, block, dim)
    if lengths:
        values["cu_seqlens_k"] = cumulative(lengths)
    return values


def check(values: dict[str, Any], dtype: torch.dtype) -> None:
    forward = {name: x for name, x in values.items() if name != "grad_y"}
    judged.judge("compress", forward, dtype)
    judged.judge("compress_backward", values, dtype)


@pytest.mark.parametrize("method", ["mean", "linear", "mlp"])
@pytest.mark.parametrize(
    ("tokens", "block", "stride", "dim"),
    [
        (1100, 8, 4, 16),  # several tiles of blocks and of tokens, the last one begins early
        (700, 256, 256, 8),  # chunks longer than 128 tokens, an incomplete last one
        (331, 9, 3, 136),  # 3 does not divide 128; channels in two parts
        (140, 128, 1, 8),  # 128 blocks over every token
    ],
)
def test_sizes_past_one_tile(method, tokens, block, stride, dim):
    check(problem(method, tokens, block, stride, dim=dim), torch.bfloat16)


def test_wide_hidden_layer():
    """More than 512 features: two banks of sums, and of accumulators."""
    check(problem("mlp", 60, 8, 4, hidden=600, heads=2, per_head=True), torch.float32)


def test_weights_that_do_not_stay():
    """Plans too small for the weights and tokens: everything streams, with the same bits."""
    values = problem("mlp", 90, 16, 8, heads=2)
    given_ = judged.complete("compress_backward", values, torch.float16)
    kernels = run.simulated("compress")
    small = {
        "linear_forward": {"tile_bytes": 600, "weight_bytes": 200},
        "input_gradient": {"out_bytes": 64, "weight_bytes": 200},
    }
    forward = {name: x for name, x in given_.items() if name != "grad_y"}
    for direction, arguments in ((launch.forward, forward), (launch.backward, given_)):
        whole, streamed = (
            judged.results(direction(kernels, plan, **arguments))
            for plan in (plans.load("compress"), small)
        )
        assert all(torch.equal(a, b) for a, b in zip(whole, streamed, strict=True))


def test_paper_sizes():
    check(problem("mlp", 180, 32, 16, dim=192, hidden=192), torch.bfloat16)


def test_weights_of_many_shifts_stream_too():
    """More shifts than the weights of one token's places may take: they come in parts."""
    values = judged.complete("compress_backward", problem("linear", 70, 32, 2), torch.float32)
    small = {**plans.load("compress"), "input_gradient": {"out_bytes": 64, "weight_bytes": 256}}
    kernels = run.simulated("compress")
    whole, parts = (launch.backward(kernels, p, **values) for p in (plans.load("compress"), small))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_what_does_not_fit_is_refused_by_rule():
    x = torch.zeros(1, 1, 1, 1)
    large = {"x": x, "method": "mean", "block": 8193, "stride": 8193}
    assert judged.refused("compress", large) == "block"
    mlp = {
        "w1": torch.zeros(1, 8193), "b1": torch.zeros(8193), "w2": torch.zeros(8193, 1),
        "b2": torch.zeros(1),
    }  # fmt: skip
    wide = {"x": x, "method": "mlp", "block": 1, "stride": 1, **mlp}
    assert judged.refused("compress", wide) == "hidden"


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    stride = draw(st.integers(1, 20))
    block = stride * draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=3))
    packed = draw(st.booleans())
    return problem(
        draw(st.sampled_from(["mean", "linear", "mlp"])),
        sum(lengths),
        block,
        stride,
        dim=draw(st.sampled_from([1, 7, 16])),
        heads=draw(st.integers(1, 3)),
        batch=1 if packed else draw(st.integers(1, 2)),
        per_head=draw(st.booleans()),
        pe=draw(st.booleans()),
        lengths=lengths if packed else None,
    )


@given(values=problems(), dtype=st.sampled_from(sorted(DTYPES)))
@examples(25)
def test_any_shape(values, dtype):
    check(values, DTYPES[dtype])
