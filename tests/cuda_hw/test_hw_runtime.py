"""What only running shows: CUDA graphs, torch.compile, no waiting for the device, many models."""

from __future__ import annotations

import pytest
import torch
from conftest_hw import ON_CPU

import nsa_neuron
from nsa_neuron.graphs import graphed
from nsa_neuron.nn import NativeSparseAttention, NsaConfig
from nsa_neuron.registry import use_backend
from tools import own_stages
from tools.peers.adapters import Own
from tools.peers.measure import check_forward
from tools.peers.problem import Geometry, Heads, make_decode, make_problem

GEOM = Geometry(n=4, w=40)
HEADS = Heads(2, 1, 24, 16) if ON_CPU else Heads(32, 2, 192, 128)
TOKENS = 136 if ON_CPU else 2048
gpu_only = pytest.mark.gpu_only


def config(**change):
    sizes = dict(dim=64, heads=2, kv_heads=1, dk=16, dv=16, block=8, stride=4, select_block=16)
    return NsaConfig(**{**sizes, "num_selected": 4, "window": 20, "phi": "mean", **change})


@gpu_only
@torch.no_grad()
def test_decode_as_a_graph_follows_growing_sequences(dtype):
    """One capture serves every length: replays equal eager steps after `seqlens` has changed."""
    p = make_decode(HEADS, GEOM, 4, 1024, dtype, "cuda")
    state = own_stages.decode_setup(p)
    q, gates = p.q[:, None].contiguous(), p.gates[:, None].contiguous()
    for _ in range(2):  # compiles, and leaves the counters as a step leaves them
        own_stages.decode(q, state, gates, GEOM)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = own_stages.decode(q, state, gates, GEOM)
    for tokens in (1024, 700, 64, 33, 5):
        state.caches.seqlens.fill_(tokens)
        graph.replay()
        replayed = o.clone()
        assert torch.equal(replayed, own_stages.decode(q, state, gates, GEOM)), tokens
        assert replayed.isfinite().all()


@torch.no_grad()
def test_decode_is_right(dtype, device):
    p = make_decode(HEADS, GEOM, 2, TOKENS, dtype, device)
    right, errors = check_forward(
        "decode", p, Own("tools.own_stages:STAGES").stages()["decode"](p)()
    )
    assert right, errors


@gpu_only
def test_a_whole_step_as_a_graph(dtype):
    p = make_problem(HEADS, GEOM, TOKENS, 0.1, 8, dtype, "cuda")
    call = Own("tools.own_stages:STAGES").stages()["nsa"](p)
    with torch.no_grad():
        eager = call(p.q, p.k, p.v, p.gates)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = call(p.q, p.k, p.v, p.gates)
        graph.replay()
    assert torch.equal(o, eager)


@gpu_only
def test_forward_and_backward_as_graphs(dtype):
    """`graphed`: other values than those of the capture, and both passes."""
    problems = [make_problem(HEADS, GEOM, TOKENS, rho, 8, dtype, "cuda") for rho in (0.0, 0.1, 0.0)]
    given = [[x.detach().clone().requires_grad_() for x in (p.q, p.k, p.v, p.gates)]
             for p in problems]  # fmt: skip
    call = Own("tools.own_stages:STAGES").stages()["nsa"](problems[0])
    run = graphed(call, *given[0])
    for leaves in given[1:]:
        want = call(*leaves)
        grad = torch.randn_like(want)
        wanted = torch.autograd.grad(want, leaves, grad)
        out = run(*leaves)
        assert torch.equal(out, want)
        found = torch.autograd.grad(out, leaves, grad)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@gpu_only
@pytest.mark.parametrize("stage", ["dense", "window", "cmp", "select", "slc", "nsa"])
def test_the_hot_path_never_waits_for_the_device(stage, dtype):
    p = make_problem(HEADS, GEOM, TOKENS, 0.1, 8, dtype, "cuda")
    names = {"nsa": ("q", "k", "v", "gates"), "cmp": ("q", "k_cmp", "v_cmp"), "select": ()}
    leaves = [getattr(p, n).detach().requires_grad_() for n in names.get(stage, ("q", "k", "v"))]
    call = Own("tools.own_stages:STAGES").stages()[stage](p)

    def step():
        out = call(*leaves)
        if leaves:
            torch.autograd.grad(out, leaves, torch.ones_like(out))

    step()  # the first call compiles and loads modules
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_only
def test_packed_sequences_never_wait_for_the_device(dtype):
    gen = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(1, 512, 4, 64, generator=gen, device="cuda", dtype=dtype)
    k, v = (torch.randn(1, 512, 1, 64, generator=gen, device="cuda", dtype=dtype) for _ in "kv")
    cu = torch.tensor([0, 100, 101, 512], dtype=torch.int32, device="cuda")
    packed = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}

    def step():
        k_cmp, v_cmp = (nsa_neuron.compress(x, cu_seqlens_k=cu) for x in (k, v))
        o, lse = nsa_neuron.compressed_attention(q, k_cmp, v_cmp, kv_len=512, **packed)
        ids = nsa_neuron.select_blocks(q, k_cmp, lse, kv_len=512, num_selected=4, **packed)
        return o, nsa_neuron.selected_attention(q, k, v, ids, **packed)[0]

    with use_backend("cuda", "hw"):
        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_layer_equals_eager(fullgraph, target, device):
    """The torch.compile backend by function: the repository may be used without installation."""
    from nsa_neuron import compile as nsa_compile

    torch.manual_seed(0)
    layer = NativeSparseAttention(config()).to(device)
    x = torch.randn(1, 70, 64, device=device)
    rest = "eager" if ON_CPU else "inductor"
    options = {"target": "h200", "mode": target.split(":")[1], "rest": rest}
    compiled = torch.compile(
        layer, backend=nsa_compile.backend, options=options, fullgraph=fullgraph, dynamic=False
    )
    with use_backend(target):
        eager = layer(x)
        wanted = torch.autograd.grad(eager.sum(), list(layer.parameters()))
    got = compiled(x)
    grads = torch.autograd.grad(got.sum(), list(layer.parameters()))
    torch.testing.assert_close(got, eager, rtol=1e-4, atol=1e-5)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_models_of_different_geometry_share_a_process(target, device):
    """Interleaved, each gives what it gives alone."""
    torch.manual_seed(0)
    configs = (config(), config(block=16, stride=8, window=9, dk=32), config(heads=4, kv_heads=4))
    layers = [NativeSparseAttention(c).to(device) for c in configs]
    x = torch.randn(1, 50, 64, device=device)
    with use_backend(target), torch.no_grad():
        alone = [layer(x) for layer in layers]
        for _ in range(2):
            for layer, expected in zip(layers, alone, strict=True):
                assert torch.equal(layer(x), expected)


@gpu_only
def test_two_streams_at_once(dtype):
    """Nothing is shared between concurrent calls of one op."""
    problems = [make_problem(HEADS, GEOM, TOKENS, rho, 8, dtype, "cuda") for rho in (0.0, 0.1)]
    own = Own("tools.own_stages:STAGES")
    calls = [own.stages()["nsa"](p) for p in problems]
    inputs = [(p.q, p.k, p.v, p.gates) for p in problems]
    with torch.no_grad():
        alone = [call(*x) for call, x in zip(calls, inputs, strict=True)]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in calls]
        results = []
        for _ in range(5):
            for stream, call, x in zip(streams, calls, inputs, strict=True):
                with torch.cuda.stream(stream):
                    results.append(call(*x))
        torch.cuda.synchronize()
    assert all(torch.equal(r, alone[i % 2]) for i, r in enumerate(results))
