"""Offsets past 2^31 elements along every axis of every tensor that a kernel reads.

The tensors have a few tokens, pages or heads, so far apart that the last lies past 2^31 elements.
Their memory is promised by the system and never touched but for the elements themselves. A wrapped
offset is a `KernelFault`, or other numbers than those of the same tensors without gaps.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from masked_oracle import promised
from torch import Tensor

pytest.importorskip("triton")

from nsa_neuron.backends.cuda import BACKEND
from nsa_neuron.cases import Case
from nsa_neuron.ops import OPS, get

pytestmark = pytest.mark.sim

FAR = 2**31 + 2**12
COMPOSED = ("nsa_attention", "nsa_attention_forward", "nsa_attention_backward")
NAMES = [spec.name for spec in OPS if spec.name not in COMPOSED]


def spread(x: Tensor, axis: int) -> Tensor:
    """A copy whose last element along an axis lies past 2^31 elements."""
    strides = list(x.contiguous().stride())
    strides[axis] = -(-FAR // (x.shape[axis] - 1))
    reach = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    return promised(reach, x.dtype).as_strided(x.shape, strides).copy_(x)


def values_of(op: str) -> dict:
    """A call of the op in which every axis of batch, tokens (or pages) and heads has two or more.

    The smallest case that the op has of that kind.
    """
    spec = get(op)
    names = ("batch2_kv2", "mean_kv2_pe_per_head", "two_sequences")
    case = next(case for case in spec.cases if case.name in names)
    if "S" in case.sizes and op != "decode" and "Dv" in case.sizes:
        case = replace(case, sizes={**case.sizes, "S": 5, "T": 24, "Dk": 16, "Dv": 16})
    return spec.arguments(case, torch.float16)


def run(op: str, values: dict) -> tuple[Tensor, ...]:
    """Straight to the kernels: the router would look at index tensors first."""
    bound = get(op).bind(values)
    out = BACKEND.lower(bound, BACKEND.supports(bound, "sim").plan)(**values)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("op", NAMES)
def test_offsets_past_two_to_the_31(op: str, axis: int) -> None:
    values = values_of(op)
    wanted = run(op, dict(values))
    far = {
        name: spread(x, axis)
        for name, x in values.items()
        if isinstance(x, Tensor) and x.dim() > max(2, axis) and x.shape[axis] > 1
    }
    assert far, "no tensor has such an axis"
    for got, near in zip(run(op, {**values, **far}), wanted, strict=True):
        assert got.isfinite().equal(near.isfinite())
        assert torch.equal(got.nan_to_num(), near.nan_to_num())


def packed_values_of(op: str) -> dict:
    """The same call packed: two sequences, of which the second begins far from the first."""
    spec = get(op)
    case = next(case for case in spec.cases if case.name in ("packed_tails", "packed_linear"))
    if op.startswith("compress_") or op == "compress":
        case = replace(case, lengths=((9, 9), (24, 24)))
    else:
        sizes = {**case.sizes, "Dk": 16, "Dv": 16}
        case = replace(case, sizes=sizes, lengths=((2, 12), (5, 40)))
    return spec.arguments(case, torch.float16)


PACKED = [name for name in NAMES if name != "decode" and not name.startswith("gated_sum")]


@pytest.mark.parametrize("op", PACKED)
def test_offsets_of_packed_sequences_past_two_to_the_31(op: str) -> None:
    values = packed_values_of(op)
    wanted = run(op, dict(values))
    far = {
        name: spread(x, 1)
        for name, x in values.items()
        if isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point() and x.shape[1] > 1
    }
    for got, near in zip(run(op, {**values, **far}), wanted, strict=True):
        assert torch.equal(got.nan_to_num(), near.nan_to_num())


def test_the_gaps_are_past_what_32_bits_hold() -> None:
    for axis in range(3):
        x = spread(torch.arange(24.0).view(2, 3, 4), axis)
        assert (x.shape[axis] - 1) * x.stride(axis) >= 2**31
        assert x.flatten().tolist() == list(range(24))


def test_the_cases_have_axes_to_spread() -> None:
    assert isinstance(values_of("attention")["q"], Tensor) and len(NAMES) >= 14
    assert all(isinstance(case, Case) for spec in OPS for case in spec.cases)
