"""What range attention refuses, and that its count of instructions is about right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nsa_neuron.backends import neuron
from nsa_neuron.backends.neuron import limits
from nsa_neuron.ops import get
from nsa_neuron.records import recording
from nsa_neuron.registry import Supported

pytestmark = pytest.mark.sim


def bound(op: str, tokens: int, heads: tuple[int, int] = (64, 4), device: str = "meta"):
    q = torch.empty(1, tokens, heads[0], 192, device=device, dtype=torch.bfloat16)
    k = torch.empty(1, tokens, heads[1], 192, device=device, dtype=torch.bfloat16)
    v = torch.empty(1, tokens, heads[1], 128, device=device, dtype=torch.bfloat16)
    spec = get(op)
    given = {"q": q, "k": k, "v": v}
    given |= {"grad_o": q[..., :128], "o": q[..., :128], "lse": q[..., 0].float()}
    values = {name: given.get(name, spec.defaults.get(name)) for name in spec.names}
    return spec.bind(values), values


@pytest.mark.parametrize("op", ["attention", "attention_backward"])
def test_a_program_too_long_for_the_compiler_is_refused_on_hardware(op):
    """One of hardware loops is long only for very many kv heads."""
    for tokens in (4096, 65536, 1_048_576):
        assert limits.refusal(bound(op, tokens)[0], "hw") is None
    many = bound(op, 65536, (1024, 1024))[0]
    found = limits.refusal(many, "hw")
    assert found and found.rule == "program" and "fewer kv heads" in found.reason
    assert limits.refusal(many, "sim") is None


def test_more_keys_than_float32_counts_are_refused():
    found = limits.refusal(bound("attention", 2**24)[0], "sim")
    assert found and found.rule == "length"


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_of_any_sign_is_taken(scale):
    of_call, _ = bound("attention", 64, (2, 1), "cpu")
    of_call = replace(of_call, scalars={"scale": scale})
    assert isinstance(neuron.BACKEND.supports(of_call, "sim"), Supported)


@pytest.mark.parametrize("op", ["attention", "attention_backward"])
def test_the_count_is_about_what_kernels_have(op):
    """Both ways of the forward are counted, as a program holds them: sharp logits take both."""
    of_call, values = bound(op, 256, (16, 1), "cpu")
    gen = torch.Generator().manual_seed(0)
    for name, x in values.items():
        if isinstance(x, torch.Tensor):
            sharp = 60 if name == "q" and op == "attention" else 1
            values[name] = (torch.randn(x.shape, generator=gen) * sharp).to(x.dtype)
    with recording() as runs:
        neuron.BACKEND.lower(of_call, "sim")(**values)
    longest = max(len(run.cores[0].instructions) for run in runs)
    assert 0.5 < limits.range_instructions(of_call) / longest < 2
