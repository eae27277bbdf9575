"""What a spec says of an op agrees with its reference's signature, its gradients, its results."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import nsa_neuron.library  # noqa: F401  registers torch.ops.nsa
from nsa_neuron.ops import OPS, get

if TYPE_CHECKING:
    from nsa_neuron.spec import OpSpec

each = pytest.mark.parametrize("spec", OPS, ids=[spec.name for spec in OPS])
# nsa_attention trains as nsa_attention_forward, which keeps what the gradients need.
DIFFERENTIABLE = [spec for spec in OPS if spec.backward and spec.name != "nsa_attention"]
with_gradients = pytest.mark.parametrize(
    "spec", DIFFERENTIABLE, ids=[spec.name for spec in DIFFERENTIABLE]
)
KINDS = {"int": "int", "float": "float", "str": "str"}


@each
def test_arguments_are_those_of_the_signature(spec: OpSpec) -> None:
    parameters = inspect.signature(spec.reference).parameters
    assert spec.names == tuple(parameters)
    for arg in spec.args:
        kind = KINDS[arg.kind] if arg in spec.scalars else "Tensor"
        said = f"{kind} | None" if arg.optional else kind
        assert parameters[arg.name].annotation == said, arg.name
        assert not arg.optional or spec.defaults.get(arg.name, None) is None


@with_gradients
def test_gradients_are_those_of_the_differentiable_arguments(spec: OpSpec) -> None:
    wanted = [arg.name for arg in spec.tensors if arg.differentiable]
    backward = get(spec.backward)
    assert [item.name for item in backward.returns] == [f"d{name}" for name in wanted]
    assert [item.like for item in backward.returns] == wanted
    assert not any(arg.differentiable for arg in backward.tensors), "there is no second derivative"


@with_gradients
def test_a_backward_op_takes_what_its_forward_op_takes_saves_and_returns(spec: OpSpec) -> None:
    backward = {arg.name: arg for arg in get(spec.backward).tensors}
    results = {item.name: item for item in spec.returns}
    for arg in spec.tensors:
        own = backward.pop(arg.name)
        assert (own.dims, own.dtype, own.optional) == (arg.dims, arg.dtype, arg.optional), arg.name
    for name in spec.saves:
        own = backward.pop(name)
        assert (own.dims, own.dtype) == (results[name].dims, results[name].dtype), name
        assert not own.optional
    for name, own in backward.items():
        item = results[name.removeprefix("grad_")]
        assert (own.dims.split()[0], own.dtype) == (item.dims.split()[0], item.dtype), name
        assert own.optional == (item.name != spec.returns[0].name), name
    assert get(spec.backward).scalars == spec.scalars
    assert (
        get(spec.backward).defaults.items()
        >= {name: value for name, value in spec.defaults.items() if name in spec.names}.items()
    )


@each
def test_the_reference_returns_what_the_spec_says(spec: OpSpec) -> None:
    """Shapes and dtypes that torch.compile sees before anything runs."""
    for dtype in (torch.bfloat16, torch.float64):
        case = next(case for case in spec.cases if "smoke" in case.tags)
        values: dict[str, Any] = spec.arguments(case, dtype)
        results = spec.reference(**values)
        results = results if isinstance(results, tuple) else (results,)
        got = [
            (item.name, tuple(x.shape), x.dtype)
            for item, x in zip(spec.returns, results, strict=True)
        ]
        assert got == spec.bind(values).returns()


@each
def test_fake_results_are_those_of_the_whole_call(spec: OpSpec) -> None:
    """What torch.compile sees depends on positional and named arguments alike."""
    case = next((case for case in spec.cases if case.scalars), spec.cases[0])
    values = spec.arguments(case, torch.float32)
    op = getattr(torch.ops.nsa, spec.name).default
    tensors = [x.to("meta") if isinstance(x := values[a.name], Tensor) else x for a in spec.tensors]
    scalars = {arg.name: values[arg.name] for arg in spec.scalars}
    results = op(*tensors, **scalars)
    results = results if isinstance(results, tuple) else (results,)
    wanted = [(shape, dtype) for _, shape, dtype in spec.bind(values).returns()]
    assert [(tuple(x.shape), x.dtype) for x in results] == wanted
    assert all(x.is_contiguous() and x.device.type == "meta" for x in results)
