"""Selected attention where the device chooses the design: no waiting, one graph for all ids."""

from __future__ import annotations

import pytest
import torch
from conftest_hw import ON_CPU

from nsa_neuron.backends.cuda import kernel_package, plans
from nsa_neuron.backends.cuda.launch import selected_attention as launch

gpu_only = pytest.mark.gpu_only
TOKENS, GROUP, BLOCK = (24, 4, 16) if ON_CPU else (4096, 16, 64)
DK, DV = (24, 16) if ON_CPU else (192, 128)
SLOTS = 2 if ON_CPU else 8


@pytest.fixture
def run(dtype, device):
    """Forward and backward by a plan that measures both; ids are read from one tensor."""
    gen = torch.Generator(device).manual_seed(0)
    like = {"generator": gen, "device": device, "dtype": dtype}
    q = torch.randn(1, TOKENS, 2 * GROUP, DK, **like)
    k, v = (torch.randn(1, 2 * TOKENS, 2, dim, **like) for dim in (DK, DV))
    grad_o = torch.randn(1, TOKENS, 2 * GROUP, DV, **like)
    ids = torch.zeros(1, TOKENS, 2, SLOTS, dtype=torch.int32, device=device)
    mode, plan_device = ("sim", "interpret") if ON_CPU else ("hw", "h200")
    kernels = kernel_package(mode).load("selected_attention")
    name = str(dtype).removeprefix("torch.")
    shape = {"dk": DK, "dv": DV, "dtype": name, "group": GROUP}
    found = plans.find(plan_device, "selected_attention", **shape)
    rows = 2.0 * GROUP * 64 / BLOCK
    measured = {"strategy": "by_overlap", "forward_rows": rows, "backward_dq_rows": rows}
    limits = {"min_pairs": 1, "rows_per_pass": TOKENS * GROUP}
    options = {"select_block": BLOCK, "scale": DK**-0.5}

    def call(strategy: str = "by_overlap"):
        plan = {**found, "dispatch": {**measured, **limits, "strategy": strategy}}
        o, lse = launch.forward(kernels, plan, q, k, v, ids, **options)
        return o, lse, *launch.backward(kernels, plan, grad_o, q, k, v, ids, o, lse, **options)

    return call, ids


def fill(ids, kind):
    """Equal neighbours, or four that share nothing."""
    token = torch.arange(TOKENS, device=ids.device)
    tiles = 2 * TOKENS // BLOCK // SLOTS // 4
    first = 0 * token if kind == "equal" else token % 4 * SLOTS * (1 if tiles < 2 else tiles // 2)
    slots = first[:, None] + torch.arange(SLOTS, device=ids.device)
    visible = (TOKENS + token) // BLOCK
    ids.copy_(slots.where(slots <= visible[:, None], -1)[None, :, None])


@pytest.mark.parametrize(("kind", "design"), [("equal", "by_query"), ("disjoint", "by_block")])
def test_the_chosen_design_is_the_one_that_ran(run, kind, design):
    call, ids = run
    fill(ids, kind)
    assert all(torch.equal(a, b) for a, b in zip(call(), call(design), strict=True))


@gpu_only
def test_one_graph_serves_both_designs(run):
    call, ids = run
    fill(ids, "equal")
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for kind in ("disjoint", "equal", "disjoint"):
        fill(ids, kind)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, call(), strict=True)), kind


@gpu_only
def test_the_choice_never_waits_for_the_device(run):
    call, ids = run
    fill(ids, "disjoint")
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
