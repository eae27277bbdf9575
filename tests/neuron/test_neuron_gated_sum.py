"""`gated_sum` kernels beyond the shared cases: many tiles, two cores, views."""

from __future__ import annotations

import pytest
import torch

from nsa_neuron.backends.neuron import run
from nsa_neuron.backends.neuron.launch import gated_sum as launch
from nsa_neuron.records import recording

pytestmark = pytest.mark.sim

CONSTANTS = {"rows_per_partition": 3, "looped_rows": 1}  # an iteration has 256 rows
PLAN = {"forward": CONSTANTS, "backward": CONSTANTS}


def inputs(rows: int, dv: int, dtype: torch.dtype) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(rows)
    branches = [torch.randn(1, rows, 1, dv, generator=gen).to(dtype) for _ in range(4)]
    # Gates as the module makes them: a transposed view, so not contiguous.
    gates = torch.rand(3, 1, rows, 1, generator=gen).to(dtype).permute(1, 2, 3, 0)
    return [*branches, gates]


@pytest.mark.parametrize("rows", [1, 127, 129, 385, 1001])
def test_any_number_of_rows_on_one_and_two_cores(rows):
    """A loop, whole tiles, tiles of fewer rows per partition, a rest; odd counts on two cores."""
    grad_o, *given = inputs(rows, 24, torch.float32)
    wanted = [x.double().requires_grad_() for x in given]
    o = sum(wanted[3][..., c, None] * wanted[c] for c in range(3))
    want = (o.detach(), *torch.autograd.grad(o, wanted, grad_o.double()))
    results = []
    for lnc in (1, 2):
        kernels = run.simulated("gated_sum", lnc)
        with recording() as launches:
            got = launch.forward(kernels, PLAN, *given)
            grads = launch.backward(kernels, PLAN, grad_o, *given)
        assert [len(each.cores) for each in launches] == [lnc, lnc]
        share = -(-rows // lnc)
        assert {len(core.loops) for each in launches for core in each.cores} == {share // 256}
        results.append((got, *grads))
        for mine, reference in zip(results[-1], want, strict=True):
            torch.testing.assert_close(mine.double(), reference, rtol=0, atol=3e-5)
    assert all(a.equal(b) for a, b in zip(*results, strict=True))
