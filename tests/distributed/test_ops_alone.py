"""The ops of context parallelism on one rank, where no process has to start: every scalar off its
default, forward and backward, and each refusal."""

from __future__ import annotations

import pytest
import torch
from whole import GEOMETRY, HEADS, LEAVES, gradients, on_one_rank, problem, weight_of

from nsa_neuron import functional as nsa
from nsa_neuron.distributed.context_op import context_attention
from nsa_neuron.distributed.softmax_op import context_softmax
from nsa_neuron.errors import InvalidArgument

EDGES = (0, 5, 13, 52, 64)


def called(made, scalars=GEOMETRY, edges=None, base=100.0, fetch="auto"):
    cu = None if edges is None else torch.tensor(edges, dtype=torch.int32)
    return context_attention(*(made[n] for n in LEAVES), cu, *scalars.values(), base, "", "", fetch)


@pytest.mark.parametrize("edges", [None, EDGES], ids=["one", "packed"])
@pytest.mark.parametrize(
    "changes",
    [
        {"scale": 0.9}, {"scale": 0.05, "window": 1}, {"num_initial": 0, "num_local": 1},
        {"num_initial": 2, "num_local": 1, "select_block": 8}, {"stride": 8, "window": 64},
        {"stride": 2, "num_selected": 3}, {"method": "linear"}, {"method": "mean"},
    ],
    ids=str,
)  # fmt: skip
def test_one_rank_is_the_plain_call(changes, edges):
    scalars = {**GEOMETRY, **changes}
    made = problem(64, method=scalars["method"])
    leaves = [made[n].requires_grad_() for n in LEAVES if made[n] is not None]
    want, got = on_one_rank(made, scalars, 100.0, edges), called(made, scalars, edges)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    weight = weight_of(want.detach())
    for mine, exact in zip(
        gradients(got, weight, leaves), gradients(want, weight, leaves), strict=True
    ):
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("edges", [None, EDGES], ids=["one", "packed"])
@pytest.mark.parametrize("window", [0, 1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_softmax_of_one_rank_is_the_plain_call(edges, window, dtype):
    made, cu = problem(64, dtype=dtype), edges and torch.tensor(edges, dtype=torch.int32)
    leaves = [made[n].requires_grad_() for n in ("q", "k_win", "v_win")]
    got = context_softmax(*leaves, cu, window, "")
    if window:
        want = nsa.sliding_window_attention(*leaves, cu, cu, window=window)[0]
    else:
        want = nsa.attention(*leaves, cu, cu)[0]
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got, want, **close)
    weight = weight_of(want.detach())
    for mine, exact in zip(
        gradients(got, weight, leaves), gradients(want, weight, leaves), strict=True
    ):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, exact, **close)


def test_results_that_nobody_uses_give_no_gradient():
    made = problem(20)
    leaves = [made[n].requires_grad_() for n in ("q", "k_win", "v_win")]
    _, lse = torch.ops.nsa_distributed.context_softmax.default(*leaves, None, 5, "")
    for grad in torch.autograd.grad(lse.sum(), leaves, allow_unused=True):
        assert grad is None or not grad.any()


@pytest.mark.parametrize(
    ("changes", "edges", "argument"),
    [
        ({}, (0, 32, 63), "cu_seqlens"), ({}, (1, 64), "cu_seqlens"), ({}, (0,), "cu_seqlens"),
        ({}, (0, 30, 30, 64), "cu_seqlens"), ({}, (0, 40, 30, 64), "cu_seqlens"),
        ({"stride": 3}, None, "stride"), ({"window": 0}, None, "window"),
        ({"method": "max"}, None, "method"),
    ],
    ids=str,
)  # fmt: skip
def test_arguments_that_break_the_contract(changes, edges, argument):
    with pytest.raises(InvalidArgument) as caught:
        called(problem(64), {**GEOMETRY, **changes}, edges)
    assert caught.value.argument == argument


def test_offsets_of_a_batch_and_other_ways_to_fetch_are_refused():
    with pytest.raises(InvalidArgument, match="given with batch 2; it must be used with batch 1"):
        called(problem(64, batch=2), edges=EDGES)
    with pytest.raises(InvalidArgument, match="'fetch' is 'guess'; it must be one of auto, gather"):
        called(problem(64), fetch="guess")


@pytest.mark.parametrize("name", ["k_raw", "v_raw", "k_slc", "v_slc", "k_win", "v_win"])
def test_branches_of_other_shapes_are_refused(name):
    made = problem(64)
    for changed in (made[name][:, :60], made[name][..., :5], made[name][:, :, :1]):
        with pytest.raises(InvalidArgument):
            called({**made, name: changed})
    few = {**made, "q": made["q"][:, :60], "gates": made["gates"][:, :60]}
    with pytest.raises(InvalidArgument, match="64 tokens long; it must be as long as q, 60"):
        called(few)
    q, k, v = (problem(64)[n] for n in ("q", "k_win", "v_win"))
    with pytest.raises(InvalidArgument, match="64 tokens long; it must be as long as q"):
        context_softmax(q[:, :60], k, v, None, 0, "")
    assert HEADS == (q.shape[2], k.shape[2], k.shape[3], v.shape[3])
