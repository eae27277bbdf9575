"""Offsets past 2^31 elements in every tensor that a kernel reads, in batches, tokens and pages.

The memory of such tensors is promised by the system and never touched but for the elements
themselves. A wrapped offset is a `KernelFault`, or other numbers than those of the same tensors
without gaps. Launchers copy tensors whose tokens lie 2^22 elements apart or more (`addressable`),
so it takes 514 tokens to get past 2^31 within a sequence, and 600 for a whole tile to begin there;
every far tensor is one that they take.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from masked_oracle import promised
from torch import Tensor

pytest.importorskip("triton")

from nsa_neuron.backends.cuda import BACKEND
from nsa_neuron.backends.cuda.launch.common import addressable
from nsa_neuron.ops import OPS, get

pytestmark = pytest.mark.sim

FAR = 2**31 + 2**12
TOKEN_STRIDE = 2**22 - 64
COMPOSED = ("nsa_attention", "nsa_attention_forward", "nsa_attention_backward")
NAMES = [spec.name for spec in OPS if spec.name not in COMPOSED]
SEQUENCES = [name for name in NAMES if name != "decode" and not name.startswith("gated_sum")]


def spread(x: Tensor, axis: int, stride: int = 0) -> Tensor:
    """A copy whose last element along an axis lies past 2^31 elements."""
    strides = list(x.contiguous().stride())
    strides[axis] = stride or -(-FAR // (x.shape[axis] - 1))
    reach = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    return promised(reach, x.dtype).as_strided(x.shape, strides).copy_(x)


def values_of(op: str) -> dict:
    """A small call of three batches (or some pages) and two kv heads: with two, a batch would be
    2^31 elements long itself, and such a stride is a 64-bit argument."""
    spec = get(op)
    names = ("batch2_kv2", "mean_kv2_pe_per_head", "two_sequences")
    case = next(case for case in spec.cases if case.name in names)
    if op != "decode":
        tokens = 72 if "block" in spec.names else 24  # three compressed blocks
        short = {"S": 5, "T": tokens, "Dk": 16, "Dv": 16} if "Dv" in case.sizes else {}
        case = replace(case, sizes={**case.sizes, "B": 3, **short})
    values = spec.arguments(case, torch.float16)
    assert all(x.numel() for x in values.values() if isinstance(x, Tensor))
    return values


def long_values_of(op: str, packed: bool) -> dict:
    """Few queries of 600 keys (or compressed blocks); packed: and a sequence behind."""
    spec = get(op)
    blocks = op.startswith("compressed_attention") or op == "select_blocks"
    tokens = 2400 if blocks else 600
    if op.startswith("compress") and not blocks:
        case = next(case for case in spec.cases if case.name == "linear_per_head")
        sizes, lengths = {**case.sizes, "B": 1, "T": tokens, "S": tokens}, ((tokens,) * 2, (24, 24))
    else:
        wanted = "l8_d4" if op.startswith("compressed_attention") else "batch2_kv2"
        case = next(case for case in spec.cases if case.name == wanted)
        sizes = {"B": 1, "S": 3, "T": tokens, "Hq": 2, "Hkv": 1, "Dk": 16, "Dv": 16}
        lengths = ((3, tokens), (5, 40))
    case = replace(case, sizes=sizes, lengths=lengths if packed else None)
    return spec.arguments(case, torch.float16)


def run(op: str, values: dict) -> tuple[Tensor, ...]:
    """Straight to the kernels: the router would look at index tensors first."""
    bound = get(op).bind(values)
    out = BACKEND.lower(bound, BACKEND.supports(bound, "sim").plan)(**values)
    return out if isinstance(out, tuple) else (out,)


def same(op: str, values: dict, far: dict) -> None:
    assert far, "no tensor has such an axis"
    for got, near in zip(run(op, {**values, **far}), run(op, dict(values)), strict=True):
        assert got.isfinite().equal(near.isfinite())
        assert torch.equal(got.nan_to_num(), near.nan_to_num())


@pytest.mark.parametrize(("op", "axis"), [*((op, 0) for op in NAMES), ("decode", 1), ("decode", 2)])
def test_batches_pages_and_heads_past_two_to_the_31(op: str, axis: int) -> None:
    """Within a sequence only `decode` reads tensors of any stride; see the next test."""
    values = values_of(op)
    far = {
        name: spread(x, axis)
        for name, x in values.items()
        if isinstance(x, Tensor) and x.dim() > max(2, axis) and x.shape[axis] > 1
    }
    same(op, values, far)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("op", SEQUENCES)
def test_tokens_past_two_to_the_31(op: str, packed: bool) -> None:
    values = long_values_of(op, packed)
    far = {
        name: spread(x, 1, TOKEN_STRIDE)
        for name, x in values.items()
        if isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point() and x.shape[1] > 513
    }
    assert all(addressable(x) is x for x in far.values()), "a copy would have no gaps"
    same(op, values, far)


@pytest.mark.parametrize(
    ("op", "group", "scalars"),
    [
        ("sliding_window_attention", 3, {"window": 9}),
        ("sliding_window_attention", 4, {"window": 9}),
        ("sliding_window_attention_backward", 3, {"window": 9}),
        ("selected_attention", 1, {"select_block": 32}),
    ],
)
def test_queries_past_two_to_the_31(op: str, group: int, scalars: dict) -> None:
    """With groups that do and do not divide a tile, and listed by the blocks that they chose."""
    spec = get(op)
    case = next(c for c in spec.cases if c.name in ("batch2_kv2", "one_id"))
    sizes = {"B": 1, "S": 600, "T": 600, "Hq": group, "Hkv": 1, "Dk": 16, "Dv": 16}
    case = replace(case, sizes=sizes, scalars=scalars, options={"chosen": 1})
    values = spec.arguments(case, torch.float16)
    far = {n: spread(values[n], 1, TOKEN_STRIDE) for n in ("q", "grad_o", "o") if n in values}
    assert all(addressable(x) is x for x in far.values())
    same(op, values, far)


def test_the_gaps_are_past_what_32_bits_hold() -> None:
    for axis in range(3):
        x = spread(torch.arange(24.0).view(2, 3, 4), axis)
        assert (x.shape[axis] - 1) * x.stride(axis) >= 2**31
        assert x.flatten().tolist() == list(range(24))
    assert 513 * TOKEN_STRIDE >= 2**31
