"""`select_blocks`, interpreted, against rule 4 applied to float64 scores and the golden vectors."""

from __future__ import annotations

import json
from pathlib import Path

import compressed_oracle as oracle
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreted import examples

from nsa_neuron.backends.cuda import plans
from nsa_neuron.backends.cuda.launch import select_blocks as launch
from nsa_neuron.toolchain import KernelPackage, triton_interpreter

pytest.importorskip("triton")
pytestmark = pytest.mark.sim

GOLDEN = Path(__file__).parents[1] / "golden"
KERNELS = KernelPackage("cuda_kernels", triton_interpreter).load("select_blocks")


def plan(**change):
    found = plans.find("interpret", "select_blocks", dk=64, dv=64, dtype="float32", group=1)
    found["forward"] |= change
    return found


def oracle_scores(q, k, tokens, block, stride, m, scale):
    """float64 scores [S, Hkv, Ns] and lse [S, Hq] of one sequence."""
    seen = oracle.compressed_mask(len(q), tokens, block, stride)
    _, lse, p = oracle.masked_attention(q.double(), k.double(), k.double(), seen, scale)
    return oracle.importance(p, k.shape[1], tokens, block, stride, m), lse


def check(ids, scores, tokens, m, n, initial, local, rtol=1e-5):
    """ids must be the oracle's, but for blocks whose scores differ by less than rounding."""
    want = oracle.select(scores, tokens, m, n, initial, local)
    queries = len(scores)
    for s, h in (ids != want).any(-1).nonzero().tolist():
        got = ids[s, h][ids[s, h] >= 0].tolist()
        right = want[s, h][want[s, h] >= 0].tolist()
        own = (tokens - queries + s) // m
        assert got == sorted(set(got)) and len(got) == len(right)
        assert all(0 <= j <= own for j in got)
        assert (ids[s, h, len(got) :] == -1).all()
        extra, missing = set(got) - set(right), set(right) - set(got)
        row = scores[s, h]
        assert min(row[list(extra)]) >= (1 - rtol) * max(row[list(missing)]), (s, h, got, right)


@examples(12)
@given(st.data())
def test_any_geometry_matches_rule_4(data):
    stride = data.draw(st.sampled_from([1, 2, 3, 4]))
    block = stride * data.draw(st.integers(1, 3))
    m = stride * data.draw(st.integers(block // stride, 6))
    initial, local = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 3))
    n = data.draw(st.integers(max(1, initial + local), 7))
    tokens = data.draw(st.integers(1, 90))
    queries = data.draw(st.integers(1, min(tokens, 24)))
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (2, 3), (1, 4), (1, 5), (2, 2)]))
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    q = torch.randn(1, queries, kv_heads * group, 16, generator=gen)
    k = torch.randn(1, oracle.blocks_of(tokens, block, stride), kv_heads, 16, generator=gen)
    scores, lse = oracle_scores(q[0], k[0], tokens, block, stride, m, 0.3)
    ids = launch.forward(
        KERNELS, plan(COLUMNS=16, KEYS=16, SCORES=128), q, k, lse[None].float(), kv_len=tokens,
        block=block, stride=stride, select_block=m, num_selected=n, num_initial=initial,
        num_local=local, scale=0.3,
    )  # fmt: skip
    check(ids[0], scores, tokens, m, n, initial, local)


def test_ties_take_the_lowest_index_and_underflow_is_not_a_future_block():
    """Equal keys tie exactly; a far larger key makes every other probability underflow to 0."""
    tokens, n = 96, 5
    k = torch.zeros(1, 24, 1, 16)
    k[0, 13] = 100.0
    q = torch.ones(1, tokens, 1, 16)
    scores, lse = oracle_scores(q[0].float(), k[0], tokens, 4, 4, 4, 1.0)
    scores = scores.float().double()
    ids = launch.forward(
        KERNELS, plan(SCORES=2048, KEYS=16), q, k, lse[None].float(), kv_len=tokens, block=4,
        stride=4, select_block=4, num_selected=n, num_initial=1, num_local=1, scale=1.0,
    )  # fmt: skip
    for t in range(tokens):
        own = t // 4
        row = [j for j in ids[0, t, 0].tolist() if j >= 0]
        # Block 13 first where visible, then the lowest indices; all others tie.
        want = {0, own} | ({13} if own >= 13 else set())
        for j in range(own + 1):
            if len(want) == min(n, own + 1):
                break
            want.add(j)
        assert row == sorted(want), t


@pytest.mark.parametrize("group", [3, 5])
def test_columns_of_no_head_count_nothing(group):
    """A group is padded to a power of two; what the padding would load is anything."""
    gen = torch.Generator().manual_seed(group)
    q = torch.randn(1, 6, group, 16, generator=gen)
    k = torch.randn(1, oracle.blocks_of(50, 8, 4), 1, 16, generator=gen)
    scores, lse = oracle_scores(q[0], k[0], 50, 8, 4, 8, 0.3)
    ids = launch.forward(
        KERNELS, plan(COLUMNS=16, KEYS=16, SCORES=128), q, k, lse[None].float(), kv_len=50,
        block=8, stride=4, select_block=8, num_selected=4, num_initial=1, num_local=1, scale=0.3,
    )  # fmt: skip
    check(ids[0], scores, 50, 8, 4, 1, 1)


def test_packed_sequences_and_poisoned_tail():
    lengths_k, lengths_q = [3, 70, 1, 40], [3, 11, 1, 40]
    gen = torch.Generator().manual_seed(5)
    blocks = [oracle.blocks_of(t, 4, 2) for t in lengths_k]
    q = torch.randn(1, sum(lengths_q), 4, 16, generator=gen)
    k = torch.randn(1, oracle.blocks_of(sum(lengths_k), 4, 2), 2, 16, generator=gen)
    k[:, sum(blocks) :] = float("nan")
    cu_q, cu_k = (
        torch.tensor([0, *np.cumsum(x)], dtype=torch.int32) for x in (lengths_q, lengths_k)
    )
    cu_c = [0, *np.cumsum(blocks)]
    parts = [
        oracle_scores(q[0, cu_q[i] : cu_q[i + 1]], k[0, cu_c[i] : cu_c[i + 1]], t, 4, 2, 4, 0.3)
        for i, t in enumerate(lengths_k)
    ]
    lse = torch.cat([lse for _, lse in parts])[None].float()
    ids = launch.forward(
        KERNELS, plan(COLUMNS=16, KEYS=16, SCORES=128), q, k, lse, kv_len=sum(lengths_k), block=4,
        stride=2, select_block=4, num_selected=6, num_initial=1, num_local=2, scale=0.3,
        cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
    )  # fmt: skip
    for i, (scores, _) in enumerate(parts):
        check(ids[0, cu_q[i] : cu_q[i + 1]], scores, lengths_k[i], 4, 6, 1, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_are_float32_whatever_the_dtype(dtype):
    """64 heads of a group share a peak: their sum of cubes, or of probabilities kept in float16,
    would round or overflow; the ids must be those of float64 scores."""
    gen = torch.Generator().manual_seed(6)
    q = torch.randn(1, 4, 64, 32, generator=gen).to(dtype)
    k = torch.randn(1, oracle.blocks_of(300, 8, 4), 1, 32, generator=gen).to(dtype)
    scores, lse = oracle_scores(q[0], k[0], 300, 8, 4, 16, 32**-0.5)
    ids = launch.forward(
        KERNELS, plan(), q, k, lse[None].float(), kv_len=300, block=8, stride=4, select_block=16,
        num_selected=6, num_initial=1, num_local=2, scale=32**-0.5,
    )  # fmt: skip
    check(ids[0], scores, 300, 16, 6, 1, 2)


def test_a_million_tokens():
    """Two queries at the end of 1M tokens (16384 blocks), with a planted peak in a few blocks."""
    tokens, stride, m = 2**20, 64, 64
    k = torch.zeros(1, tokens // stride, 1, 16)
    peaks = [3, 777, 8191, 8192, 12345, 16000]
    k[0, peaks, 0, 0] = torch.linspace(3, 8, len(peaks))
    q = torch.ones(1, 2, 1, 16)
    logits = (k[0, :, 0].double() @ q[0, :, 0].double().T).T
    logits[0, -1] = float("-inf")
    lse = logits.logsumexp(1).view(1, 2, 1).float()
    ids = launch.forward(
        KERNELS, plan(COLUMNS=2, KEYS=128, SCORES=8192), q, k, lse,
        kv_len=tokens, block=64, stride=stride, select_block=m, num_selected=9, num_initial=1,
        num_local=2, scale=1.0,
    )  # fmt: skip
    assert ids[0, :, 0].tolist() == [sorted([0, 16382, 16383, *peaks])] * 2


@pytest.mark.parametrize(
    "name",
    [
        "attn_32_16_64_S1_H1_G4_d64_n4",
        "attn_32_16_64_S33_H1_G16_d64_n4",
        "attn_32_16_64_S200_H2_G1_d128_n4",
        "attn_32_16_64_S127_H1_G4_dk192_dv128_n4",
        "attn_64_16_64_S400_H1_G4_d64_n4",
        "attn_32_16_64_S700_H1_G4_d64_n8_sharp",
        "attn_32_16_64_varlen5_H2_G1_d64_n4",
    ],
)
def test_golden(name):
    z = np.load(GOLDEN / f"{name}.npz")
    meta = json.loads(str(z["meta"]))
    q, k = torch.from_numpy(z["q"]), torch.from_numpy(z["k_cmp"])
    cu = z.get("cu_seqlens", np.array([0, q.shape[1]], np.int32))
    cu_c = z.get("cu_seqlens_cmp", np.array([0, k.shape[1]], np.int32))
    lse = torch.cat(
        [
            oracle_scores(
                q[0, a:b], k[0, c:d], b - a, meta["l"], meta["d"], meta["l_sel"], meta["scale"]
            )[1]
            for a, b, c, d in zip(cu[:-1], cu[1:], cu_c[:-1], cu_c[1:], strict=True)
        ]
    )[None].float()
    packed = torch.from_numpy(z["cu_seqlens"]) if "cu_seqlens" in z else None
    ids = launch.forward(
        KERNELS, plan(COLUMNS=128), q, k, lse, kv_len=q.shape[1], block=meta["l"],
        stride=meta["d"], select_block=meta["l_sel"], num_selected=meta["n"], num_initial=1,
        num_local=2, scale=meta["scale"], cu_seqlens_q=packed, cu_seqlens_k=packed,
    )  # fmt: skip
    assert ids.equal(torch.from_numpy(z["topk_idx"]))
