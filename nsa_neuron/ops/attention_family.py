"""Specs shared by the ops that are softmax attention under some mask.

`attention`, `sliding_window_attention`, `compressed_attention` and `selected_attention` differ in
which keys a query sees. Their backward specs take the same arguments after the gradients, and make
their inputs by running the forward reference in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nsa_neuron.cases import Case, attention_tensors, cast, exact_normal, packed_tensors
from nsa_neuron.numerics import Budget
from nsa_neuron.ops import common
from nsa_neuron.spec import Bound, Cost, OpSpec, Return, TensorArg

QKV = (
    TensorArg("q", "B S Hq Dk", differentiable=True),
    TensorArg("k", "B T Hkv Dk", differentiable=True),
    TensorArg("v", "B T Hkv Dv", differentiable=True),
)
COMPARE_FORWARD = {"o": Budget(), "lse": Budget()}


def derive_attention(bound: Bound) -> None:
    """Checks shared by ops over raw keys."""
    common.check_heads(bound)
    common.check_tokens(bound)


def qkv_inputs(case: Case, gen: torch.Generator) -> dict[str, Any]:
    """q, k, v and offsets of a case."""
    return {**attention_tensors(case, gen), **packed_tensors(case)}


def pairs_cost(pairs: Callable[[Bound], int], matmuls: int) -> Callable[[Bound], Cost]:
    """Cost of `matmuls` matmuls over the visible pairs (2 forward, 5 backward)."""

    def cost(bound: Bound) -> Cost:
        flops = common.attention_flops(bound, pairs(bound)) * matmuls // 2
        return Cost(flops, common.tensor_bytes(bound))

    return cost


def run_reference(spec: OpSpec, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Results of a spec's reference, by name."""
    out = spec.reference(**values)
    results = out if isinstance(out, tuple) else (out,)
    return dict(zip((item.name for item in spec.returns), results, strict=True))


def backward_spec(
    forward: OpSpec, reference: Callable[..., Any], pairs: Callable[[Bound], int]
) -> OpSpec:
    """The spec of a forward op's gradients.

    Its arguments are `grad_o`, the forward's tensors, `o`, `lse`, `grad_lse` (None: zero) and the
    forward's scalars; its results the gradients of the differentiable tensors, as `dq`, `dk`, ...
    """
    offsets = {"cu_seqlens_q", "cu_seqlens_k"}
    own = tuple(arg for arg in forward.args if arg.name not in offsets)
    tensors = tuple(arg for arg in own if isinstance(arg, TensorArg))
    scalars = tuple(arg for arg in own if not isinstance(arg, TensorArg))
    wanted = [arg.name for arg in tensors if arg.differentiable]

    def inputs(case: Case, gen: torch.Generator) -> dict[str, Any]:
        given = cast(forward.inputs(case, gen), torch.float64, ())
        results = run_reference(forward, {**given, **case.scalars})
        values = {**given, **results, "grad_o": exact_normal(gen, *results["o"].shape)}
        values["grad_lse"] = None
        if case.options.get("grad_lse", True):
            # Autograd through exp(lse) or lse - lse.max() gives NaN to rows that see nothing.
            values["grad_lse"] = exact_normal(gen, *results["lse"].shape).masked_fill(
                results["lse"].isneginf(), torch.nan
            )
        return values

    def check_values(bound: Bound, values: Mapping[str, Any]) -> None:
        forward.check_values(bound, values)

    return OpSpec(
        name=f"{forward.name}_backward",
        args=(
            TensorArg("grad_o", "B S Hq Dv"),
            *(TensorArg(arg.name, arg.dims, arg.dtype, arg.optional) for arg in tensors),
            TensorArg("o", "B S Hq Dv"),
            TensorArg("lse", "B S Hq", "stat"),
            TensorArg("grad_lse", "B S Hq", "stat", optional=True),
            *(arg for arg in forward.args if arg.name in offsets),
            *scalars,
        ),
        returns=tuple(Return(f"d{name}", like=name) for name in wanted),
        reference=reference,
        derive=forward.derive,
        check_values=check_values,
        compare={f"d{name}": Budget() for name in wanted},
        cases=forward.cases,
        inputs=inputs,
        cost=pairs_cost(pairs, 5),
    )
