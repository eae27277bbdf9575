"""8K, 64K and 1M tokens: rows sampled against a chunked float32 reference (rules 13 and 14)."""

from __future__ import annotations

import pytest
import torch
from conftest_hw import ON_CPU

from tools import own_stages
from tools.peers.adapters import Own
from tools.peers.measure import check_backward, check_forward
from tools.peers.problem import GRADS, Geometry, Heads, make_decode, make_problem

LENGTHS = (136, 200, 264) if ON_CPU else (8192, 65536, 1048576)
GEOM = Geometry(n=4, w=40) if ON_CPU else Geometry()
PAPER = Heads(2, 1, 24, 16) if ON_CPU else Heads(64, 4, 192, 128)
# All of NSA keeps four outputs for its backward; at 1M tokens that takes fewer heads.
FEWER = Heads(2, 1, 24, 16) if ON_CPU else Heads(16, 1, 192, 128)
FORWARD = ("dense", "nsa", "slc", "cmp", "select", "window")
BACKWARD = ("dense", "nsa", "slc", "cmp", "window")
CHECKED = 32


@pytest.fixture(scope="module")
def problems():
    """Makes problems, keeping the last one."""
    kept = {}

    def make(heads, tokens, rho, dtype, device):
        key = (heads, tokens, rho)
        if key not in kept:
            kept.clear()
            kept[key] = make_problem(heads, GEOM, tokens, rho, CHECKED, dtype, device)
        return kept[key]

    return make


@pytest.fixture
def own():
    return Own("tools.own_stages:STAGES")


def leaves_of(stage, p):
    return [getattr(p, name).detach().requires_grad_() for name in GRADS[stage]]


@pytest.mark.parametrize("rho", [0.0, 0.1], ids=["random", "correlated"])
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("stage", FORWARD)
@torch.no_grad()
def test_forward(stage, tokens, rho, problems, own, device, dtype):
    if stage == "dense" and tokens == LENGTHS[-1]:
        pytest.skip("quadratic: minutes at 1M tokens")
    p = problems(FEWER if tokens == LENGTHS[-1] else PAPER, tokens, rho, dtype, device)
    call = own.stages()[stage](p)
    out = call(*(getattr(p, name) for name in GRADS.get(stage, ())))
    right, errors = check_forward(stage, p, out)
    assert right, errors


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("stage", BACKWARD)
def test_backward_is_right_and_bit_equal(stage, tokens, problems, own, device, dtype):
    if stage == "dense" and tokens == LENGTHS[-1]:
        pytest.skip("quadratic: minutes at 1M tokens")
    p = problems(FEWER if tokens == LENGTHS[-1] else PAPER, tokens, 0.1, dtype, device)
    leaves = leaves_of(stage, p)
    out = own.stages()[stage](p)(*leaves)
    grad = torch.randn_like(out)
    right, errors = check_backward(stage, p, leaves, out, grad)
    assert right, errors
    first, second = (torch.autograd.grad(out, leaves, grad, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("tokens", (136, 264) if ON_CPU else (8192, 131072))
@torch.no_grad()
def test_decode(tokens, own, device, dtype):
    """At the longer one more than 2**31 elements in one pool: 32 sequences of 128K tokens."""
    batch = 2 if ON_CPU else 32
    p = make_decode(PAPER, GEOM, batch, tokens, dtype, device)
    call = own.stages()["decode"](p)
    right, errors = check_forward("decode", p, call())
    assert right, errors
    assert torch.equal(call(), call())


def test_addresses_past_two_to_the_31(device, dtype):
    """A window over a tensor whose last elements lie past 2**31: equal to the same rows alone."""
    if ON_CPU:
        tokens, heads = 300, 2
    else:
        tokens, heads = 2**20, 16  # 2**20 * 16 * 192 = 3.2e9 elements of q
    gen = torch.Generator(device).manual_seed(0)
    like = {"generator": gen, "device": device, "dtype": dtype}
    q = torch.randn(1, tokens, heads, 192, **like)
    k, v = (torch.randn(1, tokens, 1, dim, **like) for dim in (192, 128))
    with torch.no_grad():
        o = own_stages.window(q, k, v, GEOM)
        tail = slice(tokens - 4 * GEOM.w, tokens)
        alone = own_stages.window(*(x[:, tail].contiguous() for x in (q, k, v)), GEOM)
    torch.testing.assert_close(o[:, -GEOM.w :], alone[:, -GEOM.w :], rtol=2e-2, atol=2e-3)
