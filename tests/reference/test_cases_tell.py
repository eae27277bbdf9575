"""The cases that every backend is tried on would notice a scalar argument that is ignored.

For every op, forward and backward, and every scalar argument there is an edge case (all of which
every backend is tried on) with the argument off its default, and with results that its default, or
a constant, would not give.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from nsa_neuron.conformance.problems import TAGS
from nsa_neuron.ops import OPS, get

if TYPE_CHECKING:
    from nsa_neuron.cases import Case
    from nsa_neuron.spec import OpSpec

# What a backward op takes only because its forward does, and `kv_len`, which has no default.
UNUSED = {("nsa_attention_backward", f"num_{which}") for which in ("selected", "initial", "local")}
SCALARS = [
    (spec.name, arg.name) for spec in OPS for arg in spec.scalars
    if arg.name != "kv_len" and (spec.name, arg.name) not in UNUSED
]  # fmt: skip


def results(spec: OpSpec, values: dict[str, Any]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        out = spec.reference(**values)
    return out if isinstance(out, tuple) else (out,)


def differ(spec: OpSpec, case: Case, name: str, value: Any) -> bool:
    """Whether an argument of another value gives other results, or cannot be carried out."""
    given = spec.arguments(case, torch.float64)
    wanted = results(spec, given)
    try:
        other = results(spec, {**given, name: value})
    except (RuntimeError, AssertionError, ValueError, IndexError):
        return True
    return any(
        a.shape != b.shape or not torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True)
        for a, b in zip(wanted, other, strict=True)
    )


def edges(spec: OpSpec) -> list[Case]:
    return [case for case in spec.cases if "edge" in case.tags and case.size("B") <= 2]


@pytest.mark.parametrize(("op", "name"), SCALARS, ids=[f"{op}-{name}" for op, name in SCALARS])
def test_some_edge_case_tells_a_scalar_from_its_default(op: str, name: str) -> None:
    spec = get(op)
    default = spec.defaults[name]
    off = [c for c in edges(spec) if c.scalars.get(name, default) != default]
    assert off, f"no edge case of {op} sets {name}"
    assert any(differ(spec, case, name, default) for case in off)


@pytest.mark.parametrize(("op", "name"), SCALARS, ids=[f"{op}-{name}" for op, name in SCALARS])
def test_edge_cases_have_two_values_of_every_scalar(op: str, name: str) -> None:
    """A kernel with another constant in its place passes one of them only."""
    spec = get(op)
    values = {case.scalars.get(name, spec.defaults[name]) for case in edges(spec)}
    assert len(values) >= 2, f"{op}: {name} is always {values}"


def test_every_case_is_tried_or_timed() -> None:
    for spec in OPS:
        for case in spec.cases:
            assert set(case.tags) <= {*TAGS, "bench"} and case.tags, case


WITH_STATISTICS = [spec.name for spec in OPS if "grad_lse" in spec.names]


@pytest.mark.parametrize("op", WITH_STATISTICS)
def test_rows_that_see_nothing_have_nan_in_grad_lse(op: str) -> None:
    """As autograd gives it: exp(lse) of a dead row has no gradient that anyone may use."""
    spec, dead = get(op), 0
    for case in edges(spec):
        values = spec.arguments(case, torch.float32)
        if values["grad_lse"] is not None:
            assert torch.equal(values["grad_lse"].isnan(), values["lse"].isneginf()), case.name
            dead += int(values["lse"].isneginf().sum())
    assert dead or op != "compressed_attention_backward", "only there rows may see nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("op", WITH_STATISTICS)
def test_statistics_stay_wide_in_narrow_calls(op: str, dtype: torch.dtype) -> None:
    spec = get(op)
    values = spec.arguments(next(case for case in spec.cases if "smoke" in case.tags), dtype)
    for arg in spec.tensors:
        if arg.dtype != "i32" and values[arg.name] is not None:
            wide = torch.promote_types(dtype, torch.float32)
            assert values[arg.name].dtype == (wide if arg.dtype == "stat" else dtype), arg.name


def test_cases_of_different_names_have_different_numbers() -> None:
    names = {case.name: case.generator().initial_seed() for spec in OPS for case in spec.cases}
    assert len(set(names.values())) == len(names)
