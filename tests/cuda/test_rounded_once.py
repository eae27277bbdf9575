"""Results that are sums in float32 are rounded once: half a unit in the last place, not one.

Tolerances of whole ops allow for more, since attention rounds probabilities on the way. These ops
do not, and blocks of six tokens show what a power of two would hide. In float16: the interpreter
cuts bfloat16 results off.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from nsa_neuron.backends.cuda import kernel_package, plans
from nsa_neuron.backends.cuda.launch import compress, gated_sum

pytestmark = pytest.mark.sim

BLOCK, STRIDE = 6, 3


def loaded(op: str):
    found = plans.find("interpret", op, dk=16, dv=16, dtype="float16", group=1)
    return kernel_package("sim").load(op), found


def rounded_once(got: Tensor, exact: Tensor) -> None:
    """Float32 sums of a few dozen terms are off by far less than a hundredth of a unit."""
    unit = torch.finfo(got.dtype).eps * 2 ** exact.abs().clamp(min=1e-3).log2().floor()
    assert ((got.double() - exact).abs() <= 0.502 * unit + 1e-6 * exact.abs().max()).all()


@pytest.mark.parametrize("method", ["mean", "linear"])
def test_compression(method, dtype=torch.float16):
    gen = torch.Generator().manual_seed(4)
    x = torch.randn(1, 40, 2, 16, generator=gen).to(dtype)
    w = torch.randn(BLOCK * 16, 16, generator=gen).to(dtype) if method == "linear" else None
    inputs = [t.double().requires_grad_() for t in (x, w) if t is not None]
    rows = inputs[0].unfold(1, BLOCK, STRIDE).transpose(3, 4)
    exact = rows.mean(3) if w is None else rows.flatten(3) @ inputs[1]
    grad_y = torch.randn(exact.shape, generator=gen).to(dtype)
    exact_grads = torch.autograd.grad(exact, inputs, grad_y.double())

    arguments = (x, w, None, None, None, None)
    geometry = {"method": method, "block": BLOCK, "stride": STRIDE}
    kernels, plan = loaded("compress")
    rounded_once(compress.forward(kernels, plan, *arguments, **geometry), exact.detach())
    grads = compress.gradients(kernels, plan, grad_y, *arguments, **geometry)
    for got, grad in zip(grads, exact_grads, strict=False):
        rounded_once(got, grad)


def test_the_gated_sum(dtype=torch.float16):
    gen = torch.Generator().manual_seed(5)
    grad_o, *branches = torch.randn(4, 1, 20, 2, 16, generator=gen).to(dtype).unbind()
    gates = torch.rand(1, 20, 2, 3, generator=gen).to(dtype)
    inputs = [t.double().requires_grad_() for t in (*branches, gates)]
    exact = sum(inputs[3][..., c, None] * inputs[c] for c in range(3))
    exact_grads = torch.autograd.grad(exact, inputs, grad_o.double())
    kernels, plan = loaded("gated_sum")
    rounded_once(gated_sum.forward(kernels, plan, *branches, gates), exact.detach())
    grads = gated_sum.backward(kernels, plan, grad_o, *branches, gates)
    for got, grad in zip(grads, exact_grads, strict=True):
        rounded_once(got, grad)
