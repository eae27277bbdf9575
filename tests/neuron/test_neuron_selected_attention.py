"""`selected_attention` kernels beyond the shared cases: long unions, long blocks, two cores."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import masked_oracle as oracle
import pytest
import torch
from chosen_blocks import mask_of, random_ids
from hypothesis import given
from hypothesis import strategies as st
from interpreted import examples

import nsa_neuron as nsa
from nsa_neuron.backends.neuron import run
from nsa_neuron.backends.neuron.launch import selected_attention as launch
from nsa_neuron.backends.neuron.launch.selected_attention import sizes
from nsa_neuron.errors import NsaError
from nsa_neuron.registry import use_backend

pytestmark = pytest.mark.sim


def plan(blocks_per_trip: int = 40) -> dict:
    constants = {"blocks_per_trip": blocks_per_trip, "tiles_per_body": 2, "queues": "yga"}
    return {"forward": constants, "backward": constants}


def bound(function, ids: torch.Tensor, options: dict, blocks_per_trip: int = 40, lnc: int = 1):
    """A launcher's function of q, k, v, with the rest of its arguments given."""
    start = partial(function, run.simulated("selected_attention", lnc), plan(blocks_per_trip))
    return lambda *tensors, **more: start(*_insert(function, tensors, ids), **options, **more)


def _insert(function, tensors: tuple, ids: torch.Tensor) -> tuple:
    """The ids behind v: the third tensor, or in backward the fourth."""
    place = 3 if function is launch.forward else 4
    return (*tensors[:place], ids, *tensors[place:])


def check(problem, ids, select_block: int, blocks_per_trip: int = 40, lnc: int = 1) -> None:
    group = problem.q.shape[2] // problem.k.shape[2]
    mask = mask_of(ids, problem.k.shape[1], select_block, group)
    options = {"select_block": select_block}
    oracle.check(
        problem,
        [(slice(None), slice(None), mask)],
        bound(launch.forward, ids, options, blocks_per_trip, lnc),
        bound(launch.backward, ids, options, blocks_per_trip, lnc),
    )


@pytest.mark.parametrize(
    ("queries", "keys", "kv_heads", "group", "dims", "select_block", "blocks_per_trip"),
    [
        (5, 300, 1, 130, (16, 16), 144, 40),  # a group of two row tiles, blocks of two pages
        (40, 70, 2, 17, (24, 40), 16, 8),  # row tiles that split groups; several trips
        (33, 200, 1, 1, (200, 256), 48, 4),  # two parts of each head dim, no 128 / m
        (90, 90, 1, 3, (16, 16), 2, 40),  # one-token granularity: many blocks of few tokens
        (9, 40, 1, 3, (16, 16), 131, 40),  # a block length that only 1 divides
        (65, 129, 1, 4, (16, 16), 128, 40),  # blocks as long as there are partitions
    ],
)
def test_shapes(queries, keys, kv_heads, group, dims, select_block, blocks_per_trip):
    problem = oracle.Problem.random(1, queries, keys, kv_heads, group, *dims)
    check(problem, random_ids(queries, keys, kv_heads, 4, select_block), select_block,
          blocks_per_trip)  # fmt: skip


@examples(6)
@given(
    queries=st.integers(1, 40),
    past=st.integers(0, 40),
    group=st.sampled_from([1, 2, 3, 5, 16]),
    dims=st.sampled_from([(16, 16), (80, 48), (192, 128), (24, 8)]),
    select_block=st.sampled_from([8, 16, 24, 40]),
    slots=st.integers(1, 5),
    dtype=st.sampled_from(list(oracle.TOLERANCE)),
)
def test_any_shape(queries, past, group, dims, select_block, slots, dtype):
    keys = queries + past
    problem = oracle.Problem.random(1, queries, keys, 1, group, *dims, dtype, seed=queries)
    check(problem, random_ids(queries, keys, 1, slots, select_block, seed=past), select_block, 6)


@pytest.mark.parametrize("late", [False, True])
def test_halves_of_unequal_trips(late):
    """Unions of more than 32 blocks, hence of two trips, in one half of the tiles only."""
    problem = oracle.Problem.random(1, 150, 300, 1, 4, 16, 16)
    ids = random_ids(150, 300, 1, 6, 4)
    few = slice(0, 96) if late else slice(64, 150)
    ids[:, few] = -1
    ids[:, few, :, 0] = 0
    check(problem, ids, 4, 32)


def test_large_logits_and_odd_scale():
    problem = oracle.Problem.random(1, 20, 30, 1, 2, 64, 16, torch.float16, scale=1.7, spread=40.0)
    ids = random_ids(20, 30, 1, 3, 8)
    forward = bound(launch.forward, ids, {"select_block": 8, "scale": 1.7}, 2)
    got = forward(problem.q, problem.k, problem.v)
    want = oracle.expected(problem, [(slice(None), slice(None), mask_of(ids, 30, 8, 2))])
    assert want[1].max() > 1000
    oracle.close(got[0], want[0], 5e-3)
    oracle.close(got[1], want[1], 3e-6)


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_scales_of_any_sign(scale):
    problem = replace(oracle.Problem.random(1, 20, 30, 1, 2, 16, 16), scale=scale)
    check(problem, random_ids(20, 30, 1, 3, 8), 8)


def test_rows_that_see_nothing():
    """Empty rows, rows with only a later block, whole tiles of them; NaN in their grad_lse."""
    problem = oracle.Problem.random(1, 40, 40, 1, 2, 16, 16, torch.float16)
    ids = torch.full((1, 40, 1, 2), -1, dtype=torch.int32)
    ids[0, 4] = torch.tensor([1, -1], dtype=torch.int32)
    ids[0, 9] = torch.tensor([0, 1], dtype=torch.int32)
    dead = torch.ones(40, dtype=torch.bool)
    dead[9] = False
    problem.grad_lse[0, dead] = float("nan")
    mask = mask_of(ids, 40, 8, 2)
    calm = oracle.Problem(
        problem.q, problem.k, problem.v, problem.grad_o, problem.grad_lse.nan_to_num(), 0.3
    )
    want = oracle.expected(calm, [(slice(None), slice(None), mask)])
    options = {"select_block": 8, "scale": 0.3}
    o, lse = bound(launch.forward, ids, options)(problem.q, problem.k, problem.v)
    given_ = (problem.grad_o, problem.q, problem.k, problem.v, o, lse, problem.grad_lse)
    grads = bound(launch.backward, ids, options)(*given_)
    for got, expect in zip((o, lse, *grads), want, strict=True):
        oracle.close(got, expect, oracle.TOLERANCE[torch.float16])


@pytest.mark.parametrize("queries", [20, 70])
def test_two_cores_and_two_runs_give_the_same_bits(queries):
    """Odd and even numbers of tiles; unions of unequal length, so of unequal trips."""
    p = oracle.Problem.random(1, queries, queries, 1, 4, 16, 16, torch.bfloat16)
    ids = random_ids(queries, queries, 1, 4, 4)
    ids[:, : queries // 2, :, 1:] = -1
    options = {"select_block": 4, "scale": 0.3}
    runs = []
    for lnc in (1, 1, 2):
        forward = bound(launch.forward, ids, options, 32, lnc)
        o, lse = forward(p.q, p.k, p.v)
        backward = bound(launch.backward, ids, options, 32, lnc)
        runs.append((o, lse, *backward(p.grad_o, p.q, p.k, p.v, o, lse, p.grad_lse)))
    for other in runs[1:]:
        assert all(a.equal(b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "select_64_S300_H1_G4_d64_n4.npz",
        "select_64_varlen3_H2_G1_d64_n4_past.npz",
        "attn_32_16_64_S127_H1_G4_dk192_dv128_n4.npz",
    ],
)
def test_golden(name):
    meta, z = oracle.load_golden(name)
    options = {"select_block": meta["l_sel"], "scale": meta["scale"]}
    if meta["layout"] == "packed":
        options |= {"cu_seqlens_q": z["cu_seqlens"], "cu_seqlens_k": z["cu_seqlens"]}
    tensors = (z["q"], z["k"], z["v"])
    o, lse = bound(launch.forward, z["topk_idx"], options)(*tensors)
    oracle.close_to_golden(meta, z, "o_slc", o)
    oracle.close_to_golden(meta, z, "lse_slc", lse)
    grads = bound(launch.backward, z["topk_idx"], options)(z["do"], *tensors, o, lse)
    for output, got in zip(("dq_slc", "dk_slc", "dv_slc"), grads, strict=True):
        oracle.close_to_golden(meta, z, output, got)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("select_block", "group", "dims", "item"),
    [
        (64, 16, (192, 128), 2),
        (64, 64, (256, 256), 4),
        (16, 1, (64, 64), 4),
        (131, 4, (128, 128), 2),
    ],
)
def test_sizes_fit_and_fill_whole_tiles_of_keys(select_block, group, dims, item, backward):
    constants = {"tiles_per_body": 16, "blocks_per_trip": 40}
    cut = sizes.choose(constants, select_block, group, dims, 16, item, backward=backward)
    assert cut.blocks % (128 // cut.page) == 0 and select_block % cut.page == 0
    assert 1 <= cut.body <= 16 and cut.queries * group <= max(1024, group)
    keys = cut.blocks * cut.page
    scores = 4 * -(-cut.queries * group // 128) * keys * item if backward else 0
    assert 4 * keys * item * sum(dims) // 128 + scores <= 212_984


def test_too_many_ids_are_refused_by_rule():
    q = torch.randn(1, 1, 1, 8)
    ids = torch.full((1, 1, 1, 400), -1, dtype=torch.int32)
    with use_backend("neuron", "sim"), pytest.raises(NsaError, match="rule 'ids'"):
        nsa.selected_attention(q, q, q, ids, select_block=64)
