"""`selected_attention` kernels, interpreted, in both designs, against float64 and golden."""

from __future__ import annotations

from functools import partial

import masked_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from poisoned import poison  # noqa: F401

from nsa_neuron.backends.cuda import plans
from nsa_neuron.backends.cuda.launch import selected_attention as launch
from nsa_neuron.toolchain import KernelPackage, triton_interpreter

pytest.importorskip("triton")
pytestmark = pytest.mark.sim

KERNELS = KernelPackage("cuda_kernels", triton_interpreter).load("selected_attention")
STRATEGIES = ["by_query", "by_block"]


def plan(
    strategy: str, queries: int = 4, block_m: int = 64, block_n: int = 64, chunk: int = 64,
    rows_per_pass: int = 4096, pairs_per_sort: int = 4096,
) -> dict:  # fmt: skip
    op = "selected_attention"
    found = plans.find("interpret", op, dk=64, dv=64, dtype="float32", group=1)
    limits = {"rows_per_pass": rows_per_pass, "pairs_per_sort": pairs_per_sort}
    found["dispatch"] = {"strategy": strategy, **limits}
    for kernel in ("forward", "backward_dq"):
        found[kernel] |= {"QUERIES": queries, "BLOCK_N": block_n}
    for kernel in ("forward_by_block", "backward_dq_by_block", "backward_dkv"):
        found[kernel] |= {"BLOCK_M": block_m, "CHUNK": chunk}
    found["backward_dkv"]["BLOCK_N"] = block_n
    found["reduce_dkv"]["BLOCK_N"] = min(block_n, 16)
    return found


def random_ids(
    queries: int, keys: int, kv_heads: int, slots: int, select_block: int, seed: int = 0
) -> torch.Tensor:
    """int32 [1, S, Hkv, n]: 0 to n distinct visible blocks, ascending, -1 on the right."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.full((1, queries, kv_heads, slots), -1, dtype=torch.int32)
    for s in range(queries):
        visible = (keys - queries + s) // select_block + 1
        for h in range(kv_heads):
            count = int(torch.randint(0, slots + 1, (), generator=gen))
            chosen = torch.randperm(visible, generator=gen)[:count].sort().values
            ids[0, s, h, : len(chosen)] = chosen
    return ids


def mask_of(ids: torch.Tensor, keys: int, select_block: int, group: int) -> torch.Tensor:
    """[1, Hq, S, keys]: tokens of a row's blocks, up to its own position."""
    blocks = torch.arange(keys) // select_block
    chosen = (ids[..., None] == blocks).any(-2)
    chosen = chosen.permute(0, 2, 1, 3).repeat_interleave(group, 1)
    return chosen & oracle.causal(ids.shape[1], keys)


def check(problem: oracle.Problem, ids: torch.Tensor, select_block: int, tiles: dict) -> None:
    group = problem.q.shape[2] // problem.k.shape[2]
    mask = mask_of(ids, problem.k.shape[1], select_block, group)
    bind = lambda f: partial(f, KERNELS, tiles, select_block=select_block)  # noqa: E731
    oracle.check(
        problem,
        [(slice(None), slice(None), mask)],
        lambda q, k, v, **o: bind(launch.forward)(q, k, v, ids, **o),
        lambda g, q, k, v, *rest, **o: bind(launch.backward)(g, q, k, v, ids, *rest, **o),
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", oracle.TOLERANCE)
def test_dtypes(dtype, strategy):
    problem = oracle.Problem.random(1, 21, 40, 1, 4, 32, 16, dtype)
    check(problem, random_ids(21, 40, 1, 3, 16), 16, plan(strategy, chunk=16))


@settings(max_examples=7)
@given(
    queries=st.integers(1, 24),
    past=st.integers(0, 40),
    group=st.sampled_from([1, 2, 3, 5, 16]),
    dims=st.sampled_from([(16, 16), (80, 48), (192, 128), (24, 8)]),
    select_block=st.sampled_from([8, 16, 24, 40]),
    slots=st.integers(1, 5),
    per_tile=st.sampled_from([1, 2, 8]),
    strategy=st.sampled_from(STRATEGIES),
)
def test_any_shape(queries, past, group, dims, select_block, slots, per_tile, strategy):
    keys = queries + past
    problem = oracle.Problem.random(1, queries, keys, 1, group, *dims, seed=queries)
    ids = random_ids(queries, keys, 1, slots, select_block, seed=past)
    tiles = plan(strategy, per_tile, 16, 16, chunk=8, rows_per_pass=10 * group, pairs_per_sort=70)
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
    tiles = plan(strategy, 4, 16, 16, chunk=4, rows_per_pass=48, pairs_per_sort=100)
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


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_offsets_past_two_to_the_31(strategy):
    p = oracle.Problem.random(1, 3, 1040, 1, 2, 16, 16, torch.float16)
    far = oracle.Problem(
        p.q, oracle.far_apart(p.k), oracle.far_apart(p.v), p.grad_o, p.grad_lse, p.scale
    )
    ids = torch.tensor([0, 64], dtype=torch.int32).expand(1, 3, 1, 2)
    check(far, ids, 16, plan(strategy, block_n=16))


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
