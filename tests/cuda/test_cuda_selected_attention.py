"""`selected_attention` kernels, interpreted, in both designs, against float64 and golden."""

from __future__ import annotations

import masked_oracle as oracle
import pytest
import torch
from chosen_blocks import mask_of, random_ids
from hypothesis import given
from hypothesis import strategies as st
from interpreted import examples
from poisoned import poison  # noqa: F401
from selected_oracle import check, kernels, plan

from nsa_neuron.backends.cuda.launch import selected_attention as launch

pytest.importorskip("triton")
pytestmark = pytest.mark.sim

KERNELS = kernels()
STRATEGIES = ["by_query", "by_block"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", oracle.TOLERANCE)
def test_dtypes(dtype, strategy):
    problem = oracle.Problem.random(1, 21, 40, 1, 4, 32, 16, dtype)
    check(problem, random_ids(21, 40, 1, 3, 16), 16, plan(strategy, chunk=16))


@examples(8)
@given(
    queries=st.integers(1, 24),
    past=st.integers(0, 40),
    group=st.sampled_from([1, 2, 3, 5, 16]),
    dims=st.sampled_from([(16, 16), (80, 48), (192, 128), (24, 8)]),
    select_block=st.sampled_from([8, 16, 24, 40]),
    slots=st.integers(1, 5),
    per_tile=st.sampled_from([1, 2, 8]),
    strategy=st.sampled_from([*STRATEGIES, "by_overlap"]),
)
def test_any_shape(queries, past, group, dims, select_block, slots, per_tile, strategy):
    keys = queries + past
    problem = oracle.Problem.random(1, queries, keys, 1, group, *dims, seed=queries)
    ids = random_ids(queries, keys, 1, slots, select_block, seed=past)
    limits = {"rows_per_pass": 10 * group}
    rows = 1.3 * group * 64 / select_block
    tiles = plan(strategy, per_tile, 16, 16, chunk=8, overlap_rows=rows, **limits)
    check(problem, ids, select_block, tiles)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batch_and_heads_choose_for_themselves(strategy):
    problem = oracle.Problem.random(2, 9, 20, 2, 2, 16, 16)
    ids = torch.cat([random_ids(9, 20, 2, 2, 8, seed=seed) for seed in (1, 2)])
    check(problem, ids, 8, plan(strategy, chunk=4))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_packed(strategy):
    """Ids are local to the sequence; the blocks of sequences must not run into each other."""
    lengths_q, lengths_k, block = [3, 17, 1, 9], [3, 30, 17, 9], 8
    cu_q, cu_k, parts = oracle.sequences(lengths_q, lengths_k)
    problem = oracle.Problem.random(1, sum(lengths_q), sum(lengths_k), 2, 2, 16, 16)
    lengths = list(zip(lengths_q, lengths_k, strict=True))
    ids = [random_ids(s, t, 2, 3, block, seed=s) for s, t in lengths]
    masks = [
        (*part, mask_of(chosen, t, block, 2))
        for part, chosen, (_, t) in zip(parts, ids, lengths, strict=True)
    ]
    every = torch.cat(ids, 1)
    options = {"select_block": block, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    tiles = plan(strategy, 4, 16, 16, chunk=4, rows_per_pass=48)
    oracle.check(
        problem,
        masks,
        lambda q, k, v, **o: launch.forward(KERNELS, tiles, q, k, v, every, **options, **o),
        lambda g, q, k, v, *rest, **o: launch.backward(
            KERNELS, tiles, g, q, k, v, every, *rest, **options, **o
        ),
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_that_see_nothing(strategy):
    """Empty rows, rows with only a later block, and whole tiles of them: 0, -inf, no gradient."""
    problem = oracle.Problem.random(1, 16, 16, 1, 2, 16, 16, torch.float16)
    ids = torch.full((1, 16, 1, 2), -1, dtype=torch.int32)
    ids[0, 4] = torch.tensor([1, -1], dtype=torch.int32)
    ids[0, 9] = torch.tensor([0, 1], dtype=torch.int32)
    check(problem, ids, 8, plan(strategy))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_hot_block_split_over_many_items(strategy):
    """Every query selects block 0: its list is cut, and the parts add up the same each time."""
    p = oracle.Problem.random(1, 40, 40, 1, 2, 16, 16)
    own = torch.arange(40, dtype=torch.int32) // 8
    ids = torch.stack([torch.zeros(40, dtype=torch.int32), own], -1)
    ids[:8, 1] = -1
    ids = ids.reshape(1, 40, 1, 2)
    tiles = plan(strategy, chunk=4, block_m=16)
    check(p, ids, 8, tiles)
    options = {"select_block": 8, "scale": p.scale}
    o, lse = launch.forward(KERNELS, tiles, p.q, p.k, p.v, ids, **options)
    runs = [
        launch.backward(KERNELS, tiles, p.grad_o, p.q, p.k, p.v, ids, o, lse, **options)
        for _ in range(2)
    ]
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_large_logits_and_odd_scale(strategy):
    problem = oracle.Problem.random(1, 20, 30, 1, 2, 64, 16, torch.float16, scale=1.7, spread=40.0)
    ids = random_ids(20, 30, 1, 3, 8)
    options = {"select_block": 8, "scale": 1.7}
    got = launch.forward(
        KERNELS, plan(strategy, block_n=16), problem.q, problem.k, problem.v, ids, **options
    )
    mask = mask_of(ids, 30, 8, 2)
    want = oracle.expected(problem, [(slice(None), slice(None), mask)])
    assert want[1].max() > 1000
    oracle.close(got[0], want[0], 5e-3)
    oracle.close(got[1], want[1], 3e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("select_64_S300_H1_G4_d64_n4.npz", "by_query"),
        ("select_64_varlen3_H2_G1_d64_n4_past.npz", "by_block"),
        ("attn_32_16_64_S127_H1_G4_dk192_dv128_n4.npz", "by_query"),
        ("attn_32_16_64_S127_H1_G4_dk192_dv128_n4.npz", "by_block"),
    ],
)
def test_golden(name, strategy):
    meta, z = oracle.load_golden(name)
    options = {"select_block": meta["l_sel"], "scale": meta["scale"]}
    if meta["layout"] == "packed":
        options |= {"cu_seqlens_q": z["cu_seqlens"], "cu_seqlens_k": z["cu_seqlens"]}
    tiles = plan(strategy, 8, 128, 64, chunk=512)
    q, k, v, block_indices = z["q"], z["k"], z["v"], z["topk_idx"]
    o, lse = launch.forward(KERNELS, tiles, q, k, v, block_indices, **options)
    oracle.close_to_golden(meta, z, "o_slc", o)
    oracle.close_to_golden(meta, z, "lse_slc", lse)
    grads = launch.backward(KERNELS, tiles, z["do"], q, k, v, block_indices, o, lse, **options)
    for output, got in zip(("dq_slc", "dk_slc", "dv_slc"), grads, strict=True):
        oracle.close_to_golden(meta, z, output, got)
