"""`torch.library.opcheck` over representative cases of every op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_neuron.ops import BY_NAME, OPS

ATTENTION = ("one_token", "batch2_kv2", "prefill_tail", "packed_dead_rows")
CASES = {
    "compress": (
        "mean", "linear", "mlp", "too_short", "linear_per_head", "mlp_kv2", "packed_mean",
        "packed_mlp",
    ),
    "compressed_attention": (*ATTENTION, "packed_tails", "l8_d4"),
    "selected_attention": (*ATTENTION, "dead_rows", "blocks_after_query"),
    "sliding_window_attention": (*ATTENTION, "dims_odd_80_24"),
    "gated_sum": ("one_token", "batch2_kv2"),
    "nsa_attention": (*ATTENTION, "l_d_m_equal"),
    "select_blocks": (*ATTENTION, "no_initial_one_local"),
    "attention": (*ATTENTION, "custom_scale"),
    "decode": ("one_token", "edges", "more_queries_than_tokens", "odd_pages"),
}  # fmt: skip
UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor")
DYNAMIC = {
    "batch2_kv2", "packed_dead_rows", "mean", "too_short", "linear_per_head", "packed_mlp", "edges",
}  # fmt: skip
"""Cases whose graphs differ: the others change values, or sizes, which are symbols in a graph."""


def family(name: str) -> str:
    return name.removesuffix("_backward").removesuffix("_forward")


def problems() -> list[Any]:
    return [
        pytest.param(spec.name, case, id=f"{spec.name}-{case}")
        for spec in OPS
        for case in CASES[family(spec.name)]
    ]


def call(name: str, case: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional tensors (leaves where differentiable) and keyword scalars of a case."""
    spec = BY_NAME[name]
    chosen = next(item for item in spec.cases if item.name == case)
    values = spec.arguments(chosen, dtype)
    for arg in spec.tensors:
        if spec.backward and arg.differentiable and values[arg.name] is not None:
            values[arg.name].requires_grad_()
    return tuple(values[a.name] for a in spec.tensors), {
        a.name: values[a.name] for a in spec.scalars
    }


@pytest.mark.parametrize(("name", "case"), problems())
def test_opcheck(name: str, case: str) -> None:
    args, kwargs = call(name, case, torch.float32)
    op = getattr(torch.ops.nsa, name).default
    utilities = (*UTILITIES, "test_aot_dispatch_dynamic") if case in DYNAMIC else UTILITIES
    report = torch.library.opcheck(op, args, kwargs, test_utils=utilities)
    assert report == dict.fromkeys(utilities, "SUCCESS")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [spec.name for spec in OPS])
def test_opcheck_of_other_dtypes(name: str, dtype: torch.dtype) -> None:
    """Statistics change dtype with the call: fakes must follow."""
    args, kwargs = call(name, CASES[family(name)][1], dtype)
    op = getattr(torch.ops.nsa, name).default
    torch.library.opcheck(op, args, kwargs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("name", "case"), problems())
def test_fake_results_equal_real_ones_in_shape_dtype_and_stride(name: str, case: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    args, kwargs = call(name, case, torch.float32)
    args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
    op = getattr(torch.ops.nsa, name).default
    real = op(*args, **kwargs)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args), **kwargs)
    pairs = zip(*((x if isinstance(x, tuple) else (x,)) for x in (real, fake)), strict=True)
    for a, b in pairs:
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


def test_every_op_is_checked() -> None:
    assert {family(spec.name) for spec in OPS} == set(CASES)
    assert all(DYNAMIC & {*cases} for cases in CASES.values())
    assert all(hasattr(torch.ops.nsa, spec.name) for spec in OPS)
