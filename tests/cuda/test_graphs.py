"""`graphs.graphed`, with a stand-in for the capture: nothing here has been run on a GPU.

The stand-in replays as a graph does, by copying inputs into its own and results out of the same
memory, but runs the function where a graph would run recorded kernels.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import nsa_neuron
from nsa_neuron import graphs
from nsa_neuron.errors import BackendUnavailable, InvalidArgument, InvalidType
from nsa_neuron.registry import use_backend

SIZES = {"block": 8, "stride": 4, "select_block": 16, "num_selected": 3, "window": 12}


def stand_in(function, samples, num_warmup_iters):
    """What `torch.cuda.make_graphed_callables` promises, without a GPU."""
    results: list[torch.Tensor] = []
    for _ in range(num_warmup_iters):
        function(*samples)

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            with torch.no_grad():
                for held, given in zip(samples, inputs, strict=True):
                    held.copy_(given)
            with torch.enable_grad():
                ctx.out = function(*samples)
            if not results:
                results.append(torch.empty_like(ctx.out))
            return results[0].copy_(ctx.out.detach()).view_as(results[0])

        @staticmethod
        def backward(ctx, grad):
            wanted = [x for x in samples if x.requires_grad]
            found = iter(torch.autograd.grad(ctx.out, wanted, grad))
            return tuple(next(found) if x.requires_grad else None for x in samples)

    return Replay.apply


@pytest.fixture
def captured(monkeypatch):
    monkeypatch.setattr(graphs, "_gpu_there", lambda: True)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    monkeypatch.setattr(graphs, "_on_gpu", lambda x: True)


def step(q, k, v, gates):
    """All of NSA on our kernels, interpreted."""
    with use_backend("cuda", "sim"):
        k_cmp, v_cmp = (nsa_neuron.compress(x, block=8, stride=4) for x in (k, v))
        return nsa_neuron.nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, **SIZES)


def inputs(seed: int, tokens: int = 24) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    shapes = ((1, tokens, 2, 16), (1, tokens, 1, 16), (1, tokens, 1, 16), (1, tokens, 2, 3))
    return [torch.rand(shape, generator=gen).requires_grad_() for shape in shapes]


def test_forward_and_backward_of_other_values(captured):
    run = graphs.graphed(step, *inputs(0))
    for seed in (1, 2):
        mine = inputs(seed)
        out, want = run(*mine), step(*mine)
        grad = torch.rand_like(want)
        assert out.equal(want)
        graphed_grads = torch.autograd.grad(out, mine, grad)
        assert all(a.equal(b) for a, b in zip(graphed_grads, torch.autograd.grad(want, mine, grad),
                                              strict=True))  # fmt: skip


def test_samples_are_left_alone_and_results_are_overwritten(captured):
    samples = inputs(0)
    before = [x.detach().clone() for x in samples]
    run = graphs.graphed(step, *samples)
    first = run(*inputs(1))
    kept = first.detach().clone()
    run(*inputs(2))
    assert all(a.equal(b) for a, b in zip(samples, before, strict=True))
    assert not first.equal(kept), "documented: copy results that must outlive the next call"


def test_other_inputs_than_captured_ones_are_refused(captured):
    """torch would broadcast some of them into the captured ones without a word."""
    run = graphs.graphed(step, *inputs(0))
    q, k, v, gates = inputs(1)
    for changed, said in (
        ((q, k, v), "3 tensors"),
        ((q[:, :1], k, v, gates), r"inputs\[0\]' is float32 \[1, 1, 2, 16\].*\[1, 24, 2, 16\]"),
        ((q, k.half(), v, gates), r"inputs\[1\]' is float16"),
        ((q, k, v, gates.detach()), r"inputs\[3\].*requires_grad, as captured"),
        ((q, k, v.to("meta"), gates), r"inputs\[2\]' is .* on meta.* on cpu, requires_grad"),
        ((q, k, v, gates, q), "5 tensors; it must be 4, as captured"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            run(*changed)


def test_what_cannot_be_captured_is_refused_by_name(captured, monkeypatch):
    with pytest.raises(InvalidArgument, match="empty"):
        graphs.graphed(step)
    with pytest.raises(InvalidType, match=r"samples\[1\]' is int"):
        graphs.graphed(step, torch.ones(1), 2)
    monkeypatch.setenv("NSA_CHECK_VALUES", "0")
    assert torch.equal(graphs.graphed(torch.neg, torch.ones(2))(torch.zeros(2)), -torch.zeros(2))
    monkeypatch.setenv("NSA_CHECK_VALUES", "1")
    with pytest.raises(InvalidArgument, match="wait for the device"):
        graphs.graphed(step, *inputs(0))


def test_without_a_gpu(monkeypatch):
    with pytest.raises(BackendUnavailable, match="no CUDA device"):
        graphs.graphed(step, torch.ones(1))
    monkeypatch.setattr(graphs, "_gpu_there", lambda: True)
    with pytest.raises(InvalidArgument, match="on cpu; it must be on a GPU"):
        graphs.graphed(step, torch.ones(1))
