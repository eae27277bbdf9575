"""Calls of an op on the simulated NeuronCore, judged as the conformance suite judges them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nsa_neuron import cases
from nsa_neuron.backends.neuron import BACKEND, LNC
from nsa_neuron.ops import get
from nsa_neuron.registry import Supported, Unsupported


@contextlib.contextmanager
def cores(lnc: int) -> Iterator[None]:
    """Launches inside use `lnc` cores."""
    before = os.environ.get(LNC)
    os.environ[LNC] = str(lnc)
    try:
        yield
    finally:
        os.environ.pop(LNC)
        if before is not None:
            os.environ[LNC] = before


def results(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def call(op: str, values: Mapping[str, Any], lnc: int = 1) -> tuple[Tensor, ...]:
    """The results of an op on `neuron:sim`, past the router but not past its checks."""
    spec = get(op)
    bound = spec.bind(values)
    spec.check_values(bound, values)
    verdict = BACKEND.supports(bound, "sim")
    assert isinstance(verdict, Supported), verdict
    with cores(lnc), torch.no_grad():
        return results(BACKEND.lower(bound, verdict.plan)(**values))


def complete(op: str, values: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Every argument of an op, floating ones but statistics in `dtype`."""
    spec = get(op)
    stats = tuple(arg.name for arg in spec.tensors if arg.dtype == "stat")
    made = {**spec.defaults, **values}
    return cases.cast({name: made[name] for name in spec.names}, dtype, stats)


def judge(op: str, values: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Asserts that an op is within its budget, twice and on two cores with the same bits."""
    given = complete(op, values, dtype)
    runs = [call(op, given, lnc) for lnc in (1, 1, 2)]
    within_budget(op, given, runs[0])
    for other in runs[1:]:
        for item, a, b in zip(get(op).returns, runs[0], other, strict=True):
            assert torch.equal(a, b), f"{item.name}: other bits"


def within_budget(op: str, given: Mapping[str, Any], found: tuple[Tensor, ...]) -> None:
    """Asserts that results of a complete call are within the op's budget."""
    spec = get(op)
    oracle = results(spec.reference(**cases.cast(given, torch.float64, ())))
    eager = results(spec.reference(**given))
    for item, got, exact, plain in zip(spec.returns, found, oracle, eager, strict=True):
        assert (got.shape, got.dtype) == (plain.shape, plain.dtype), item.name
        diff = spec.compare[item.name](got, exact, plain, given)
        assert diff.ok, f"{item.name}: {diff.detail}"


def refused(op: str, values: Mapping[str, Any]) -> str:
    """The rule by which `neuron:sim` refuses a legal call."""
    verdict = BACKEND.supports(get(op).bind(complete(op, values, torch.float32)), "sim")
    assert isinstance(verdict, Unsupported), verdict
    return verdict.rule
