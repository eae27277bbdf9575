"""The backward pass of the whole on Triton kernels: deltas and dq's sum where they are cheapest."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from recorder import Kernels

from nsa_neuron.backends.cuda import kernel_package, plans
from nsa_neuron.backends.cuda.launch import gated_sum
from nsa_neuron.backends.cuda.launch.common import launch_delta

DV = 24


def interpreted(op):
    found = plans.find("interpret", op, dk=DV, dv=DV, dtype="bfloat16", group=1)
    return kernel_package("sim").load(op), found


def inputs(dtype):
    gen = torch.Generator().manual_seed(3)
    grad, *branches = torch.randn(4, 2, 37, 3, DV, generator=gen).to(dtype).unbind()
    gates = torch.rand(2, 37, 3, 3, generator=gen).to(dtype)
    lses = list(torch.randn(3, 2, 37, 3, generator=gen).unbind())
    lses[0][:, :5] = -torch.inf
    branches[0][:, :5] = 0
    return grad, tuple(branches), gates, tuple(lses)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_deltas_are_those_of_the_branches_own_kernels(dtype):
    grad, branches, gates, lses = inputs(dtype)
    kernels, plan = interpreted("gated_sum")
    grads, deltas = gated_sum.backward_with_deltas(kernels, plan, grad, branches, gates, lses)
    plain = gated_sum.backward(kernels, plan, grad, *branches, gates)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))
    own_kernels, own_plan = interpreted("attention")
    for o, lse, d_o, delta in zip(branches, lses, grads, deltas, strict=False):
        own = launch_delta(own_kernels, own_plan, d_o, o, lse, None)
        torch.testing.assert_close(delta, own, rtol=1e-5, atol=1e-5)


def test_dead_rows_have_delta_zero_whatever_the_gradient():
    grad, branches, gates, lses = inputs(torch.float32)
    grad[:, :5] = torch.nan
    kernels, plan = interpreted("gated_sum")
    _, deltas = gated_sum.backward_with_deltas(kernels, plan, grad, branches, gates, lses)
    assert (deltas[0][:, :5] == 0).all() and deltas[1][:, :5].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_sum_is_rounded_once(dtype):
    gen = torch.Generator().manual_seed(4)
    a, b, c = torch.randn(3, 1000, generator=gen).to(dtype).unbind()
    kernels, plan = interpreted("gated_sum")
    expected = (a.float() + b.float() + c.float()).to(dtype)
    assert torch.equal(gated_sum.add(kernels, plan, a, b, c), expected)


def test_the_whole_backward_launches_no_delta_kernel(monkeypatch):
    """One pass over grad_o instead of four, and one kernel for the sum of dq."""
    import nsa_neuron
    from nsa_neuron.backends import cuda

    launched = []

    class Counting(Kernels):
        def __getattr__(self, name):
            kernel = getattr(kernel_package("sim").load(self.stem), name)

            class Launch:
                def __getitem__(self, grid):
                    launched.append(name)
                    return kernel[grid]

            return Launch()

    class Package:
        def load(self, stem):
            return Counting(stem)

    monkeypatch.setattr(cuda, "kernel_package", lambda mode: Package())
    q = torch.randn(1, 40, 2, 16, requires_grad=True)
    k, v = torch.randn(2, 1, 40, 1, 16).unbind()
    k_cmp, v_cmp = (nsa_neuron.compress(x, block=8, stride=8) for x in (k, v))
    gates = torch.rand(1, 40, 2, 3)
    with nsa_neuron.use_backend("cuda:sim"):
        sizes = {"block": 8, "stride": 8, "select_block": 8, "num_selected": 4, "window": 9}
        o = nsa_neuron.nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, **sizes)
        launched.clear()
        o.sum().backward()
    assert "backward_delta" not in launched
    assert launched.count("add") == 1 and q.grad is not None
