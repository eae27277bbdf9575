"""`gated_sum` kernels, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch

from nsa_neuron.backends.cuda import plans
from nsa_neuron.backends.cuda.launch import gated_sum as launch
from nsa_neuron.toolchain import KernelPackage, triton_interpreter

pytest.importorskip("triton")
pytestmark = pytest.mark.sim

KERNELS = KernelPackage("cuda_kernels", triton_interpreter).load("gated_sum")
PLAN = plans.find("interpret", "gated_sum", dk=64, dv=64, dtype="float32", group=1)


@pytest.mark.parametrize("shape", [(2, 37, 3, 80), (1, 1, 1, 8), (1, 130, 2, 128)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)],
)
def test_forward_and_backward(shape, dtype, tolerance):
    gen = torch.Generator().manual_seed(shape[1])
    grad_o, *branches = (torch.randn(shape, generator=gen).to(dtype) for _ in range(4))
    # Gates as the module makes them: a transposed view, so not contiguous.
    gates = torch.rand(3, *shape[:3], generator=gen).to(dtype).permute(1, 2, 3, 0)
    inputs = [x.double().requires_grad_() for x in (*branches, gates)]
    want = sum(inputs[3][..., c, None] * inputs[c] for c in range(3))
    want_grads = torch.autograd.grad(want, inputs, grad_o.double())

    o = launch.forward(KERNELS, PLAN, *branches, gates)
    grads = launch.backward(KERNELS, PLAN, grad_o, *branches, gates)
    assert o.dtype == dtype
    for got, reference in zip((o, *grads), (want.detach(), *want_grads), strict=True):
        assert got.dtype == dtype and got.shape == reference.shape
        bound = tolerance * max(1.0, reference.abs().max().item())
        torch.testing.assert_close(got.double(), reference, rtol=0, atol=bound)
