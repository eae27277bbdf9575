"""`attention` and `sliding_window_attention` kernels, interpreted, against float64 and golden."""

from __future__ import annotations

from functools import partial

import masked_oracle as oracle
import pytest
import rounding_kernel as ROUNDING
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreted import examples
from poisoned import poison  # noqa: F401

from nsa_neuron.backends.cuda import plans
from nsa_neuron.backends.cuda.launch import attention, sliding_window_attention
from nsa_neuron.toolchain import KernelPackage, triton_interpreter

pytest.importorskip("triton")
pytestmark = pytest.mark.sim

PACKAGE = KernelPackage("cuda_kernels", triton_interpreter)
FULL, WINDOW = PACKAGE.load("attention"), PACKAGE.load("sliding_window_attention")


def plan(block_m: int = 64, block_n: int = 64) -> dict:
    found = plans.find("interpret", "attention", dk=64, dv=64, dtype="float32", group=1)
    for kernel in ("forward", "backward_dq", "backward_dkv"):
        found[kernel] |= {"BLOCK_M": block_m, "BLOCK_N": block_n}
    return found


def launchers(window: int, tiles: dict, **options):
    """forward and backward of the op that `window` says (0: full)."""
    if window:
        module, kernels, options = sliding_window_attention, WINDOW, options | {"window": window}
    else:
        module, kernels = attention, FULL
    return (
        partial(module.forward, kernels, tiles, **options),
        partial(module.backward, kernels, tiles, **options),
    )


def check(problem: oracle.Problem, window: int, tiles: dict) -> None:
    queries, keys = problem.q.shape[1], problem.k.shape[1]
    masks = [(slice(None), slice(None), oracle.causal(queries, keys, window))]
    oracle.check(problem, masks, *launchers(window, tiles))


@pytest.mark.parametrize("window", [0, 17, 64])
@pytest.mark.parametrize("dtype", oracle.TOLERANCE)
def test_dtypes_and_windows(dtype, window):
    problem = oracle.Problem.random(1, 37, 50, 1, 3, 32, 16, dtype)
    check(problem, window, plan(64, 16))


@examples(8)
@given(
    queries=st.integers(1, 24),
    past=st.integers(0, 20),
    group=st.sampled_from([1, 2, 3, 5, 16]),
    dims=st.sampled_from([(16, 16), (80, 48), (192, 128), (24, 8), (40, 256)]),
    window=st.sampled_from([0, 1, 9, 33, 1000]),
    tiles=st.sampled_from([(16, 16), (16, 32), (64, 16)]),
)
def test_any_shape(queries, past, group, dims, window, tiles):
    problem = oracle.Problem.random(1, queries, queries + past, 2, group, *dims, seed=queries)
    check(problem, window, plan(*tiles))


@pytest.mark.parametrize(("group", "window"), [(1, 13), (3, 0), (4, 13)])
def test_packed(window, group):
    """Sequences shorter and longer than a tile, some with a past, none sees another."""
    lengths_q, lengths_k = [1, 20, 3, 16], [1, 20, 35, 17]
    cu_q, cu_k, parts = oracle.sequences(lengths_q, lengths_k)
    problem = oracle.Problem.random(1, sum(lengths_q), sum(lengths_k), 1, group, 16, 32)
    lengths = zip(parts, lengths_q, lengths_k, strict=True)
    masks = [(*part, oracle.causal(s, t, window)) for part, s, t in lengths]
    options = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    oracle.check(problem, masks, *launchers(window, plan(16, 16), **options))


def test_packed_batch_of_more_sequences_than_one_lookup():
    """The search for a tile's sequence reads 64 offsets at a time."""
    lengths = [1] * 30 + [2] + [1] * 36
    cu_q, cu_k, parts = oracle.sequences(lengths, lengths)
    problem = oracle.Problem.random(1, sum(lengths), sum(lengths), 1, 1, 16, 16)
    masks = [(*part, oracle.causal(n, n)) for part, n in zip(parts, lengths, strict=True)]
    options = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    oracle.check(problem, masks, *launchers(0, plan(16, 16), **options))


def test_window_is_exact_in_prefill_and_in_decode():
    """Defect seen elsewhere: w + 1 keys in prefill, w in decode. v counts the keys instead."""
    tokens, window = 40, 9
    q, k = torch.zeros(1, tokens, 1, 16), torch.zeros(1, tokens, 1, 16)
    v = torch.eye(tokens).reshape(1, tokens, 1, tokens)
    run = partial(sliding_window_attention.forward, WINDOW, plan(16, 16), window=window, scale=1.0)
    prefill, _ = run(q, k, v)
    decode, _ = run(q[:, -1:], k, v)
    assert ((prefill[0, :, 0] > 0).sum(-1) == torch.arange(1, tokens + 1).clamp(max=window)).all()
    assert (decode[0, 0, 0] > 0).nonzero().flatten().tolist() == list(range(31, 40))


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_logits_do_not_overflow(dtype, window):
    """Defect seen elsewhere: one running max for all rows of a tile, and inf above fp16's range."""
    problem = oracle.Problem.random(1, 40, 40, 1, 2, 64, 16, dtype, scale=1.0, spread=60.0)
    o, lse = launchers(window, plan(32, 16))[0](problem.q, problem.k, problem.v, scale=1.0)
    mask = oracle.causal(40, 40, window)
    want_o, want_lse, *_ = oracle.expected(problem, [(slice(None), slice(None), mask)])
    assert want_lse.max() > 1000
    oracle.close(o, want_o, 1e-3 if dtype == torch.float32 else 5e-3)
    oracle.close(lse, want_lse, 3e-6)


@pytest.mark.parametrize("scale", [1e-3, 0.11, 1.7, -0.4])
def test_scale_is_honoured_and_not_rounded_into_q(scale):
    """0.11 and 1.7 are not bfloat16 numbers: rounding q * scale would move lse by 1e-3."""
    problem = oracle.Problem.random(1, 20, 20, 1, 2, 64, 16, torch.bfloat16, scale=scale)
    check(problem, 0, plan(16, 16))


def test_bfloat16_operands_are_rounded_to_nearest_even():
    """The interpreter by itself cuts them off."""
    ties = 1 + torch.arange(-32, 32) * 2.0**-8
    x = torch.cat([torch.randn(190, generator=torch.Generator().manual_seed(0)), ties])
    x = torch.cat([x, torch.tensor([0.0, -3e38])])
    out = torch.empty_like(x)
    ROUNDING.rounded[(1,)](x, out, N=256)
    assert torch.equal(out, x.bfloat16().float())


def test_strided_inputs():
    """Inputs and grad_o in layouts of their own; o and grad_o strides differ."""
    problem = oracle.Problem.random(2, 20, 30, 2, 2, 16, 32)
    layouts = {
        "q": problem.q.transpose(1, 2).contiguous().transpose(1, 2),
        "k": problem.k.repeat(1, 1, 1, 2)[..., :16],
        "v": problem.v.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        "grad_o": problem.grad_o.transpose(0, 1).contiguous().transpose(0, 1),
    }
    strided = oracle.Problem(**layouts, grad_lse=problem.grad_lse, scale=problem.scale)
    check(strided, 0, plan(16, 16))
    check(strided, 7, plan(16, 16))


@pytest.mark.parametrize("window", [0, 11])
def test_two_backward_runs_are_bit_equal(window):
    p = oracle.Problem.random(1, 40, 40, 1, 4, 16, 16)
    forward, backward = launchers(window, plan(16, 16))
    o, lse = forward(p.q, p.k, p.v, scale=0.2)
    runs = [backward(p.grad_o, p.q, p.k, p.v, o, lse, scale=0.2) for _ in range(2)]
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))


GOLDEN_WINDOWS = sorted(path.name for path in oracle.GOLDEN.glob("window_*.npz"))


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN_WINDOWS)
def test_golden_windows(name):
    meta, z = oracle.load_golden(name)
    options = {"window": meta["w"], "scale": meta["scale"]}
    if meta["layout"] == "packed":
        options |= {"cu_seqlens_q": z["cu_seqlens"], "cu_seqlens_k": z["cu_seqlens"]}
    o, lse = sliding_window_attention.forward(
        WINDOW, plan(128, 128), z["q"], z["k"], z["v"], **options
    )
    oracle.close_to_golden(meta, z, "o_win", o)
    oracle.close_to_golden(meta, z, "lse_win", lse)
    grads = sliding_window_attention.backward(
        WINDOW, plan(128, 128), z["do"], z["q"], z["k"], z["v"], o, lse, **options
    )
    for output, got in zip(("dq_win", "dk_win", "dv_win"), grads, strict=True):
        oracle.close_to_golden(meta, z, output, got)
