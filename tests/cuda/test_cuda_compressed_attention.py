"""`compressed_attention` kernels, interpreted, against float64 and the golden vectors."""

from __future__ import annotations

import json
from pathlib import Path

import compressed_oracle as oracle
import numpy as np
import pytest
import torch

from nsa_neuron.backends.cuda import plans
from nsa_neuron.backends.cuda.launch import compressed_attention as launch
from nsa_neuron.toolchain import KernelPackage, triton_interpreter

pytest.importorskip("triton")
pytestmark = pytest.mark.sim

GOLDEN = Path(__file__).parents[1] / "golden"
KERNELS = KernelPackage("cuda_kernels", triton_interpreter).load("compressed_attention")
TINY = {"BLOCK_M": 16, "BLOCK_N": 16}


def plan(**change):
    found = plans.find("interpret", "compressed_attention", dk=64, dv=64, dtype="float32", group=1)
    for kernel in ("forward", "backward_dq", "backward_dkv"):
        found[kernel] |= change
    return found


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Every `torch.empty` is NaN, so an element that no kernel writes shows."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    fill = lambda x: x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-77)  # noqa: E731
    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))


def expected(q, k, v, grad_o, grad_lse, tokens, block, stride, scale):
    """float64 o, lse, dq, dk, dv of one sequence."""
    x = [t.double().requires_grad_() for t in (q, k, v)]
    seen = oracle.compressed_mask(len(q), tokens, block, stride)
    o, lse, _ = oracle.masked_attention(*x, seen, scale)
    alive = seen.any(-1)
    loss = (o * grad_o.double()).sum() + (lse * grad_lse.double())[alive].sum()
    grads = torch.autograd.grad(loss, x, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, x, strict=True)]
    return o.detach(), lse.detach(), *grads


def close(got, want, tolerance):
    assert got.isfinite().equal(want.isfinite())
    want = want.double()
    bound = tolerance * max([1.0, *want[want.isfinite()].abs().flatten().tolist()])
    torch.testing.assert_close(got.double(), want, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("S", "T", "Hkv", "G", "dk", "dv", "block", "stride"),
    [
        (70, 70, 2, 1, 16, 16, 8, 4),
        (1, 1, 1, 4, 16, 16, 8, 4),
        (7, 7, 1, 2, 16, 16, 8, 4),
        (37, 100, 1, 3, 24, 16, 8, 4),
        (26, 26, 1, 16, 16, 32, 8, 8),
        (45, 61, 2, 2, 80, 48, 12, 6),
        (33, 40, 1, 4, 192, 128, 4, 2),
        (20, 90, 1, 5, 8, 8, 6, 3),
    ],
)
def test_forward_and_backward_match_float64(S, T, Hkv, G, dk, dv, block, stride):
    """Two batches where there are several kv heads; dk, dv in one piece and in three."""
    gen = torch.Generator().manual_seed(S)
    blocks = oracle.blocks_of(T, block, stride)
    B, scale = Hkv, 0.37
    q = torch.randn(B, S, Hkv * G, dk, generator=gen)
    k = torch.randn(B, blocks, Hkv, dk, generator=gen)
    v = torch.randn(B, blocks, Hkv, dv, generator=gen)
    grad_o = torch.randn(B, S, Hkv * G, dv, generator=gen)
    grad_lse = torch.randn(B, S, Hkv * G, generator=gen)
    geometry = dict(kv_len=T, block=block, stride=stride, scale=scale)
    constants = plan(**TINY)
    o, lse = launch.forward(KERNELS, constants, q, k, v, **geometry)
    want = [
        expected(q[b], k[b], v[b], grad_o[b], grad_lse[b], T, block, stride, scale)
        for b in range(B)
    ]
    for splits in (1, 3):
        constants["backward_dkv"]["SPLITS"] = splits
        grads = launch.backward(KERNELS, constants, grad_o, q, k, v, o, lse, grad_lse, **geometry)
        for b in range(B):
            for got, reference in zip((o, lse, *grads), want[b], strict=True):
                close(got[b], reference, 3e-6)


def test_any_strides_are_honoured():
    """Tensors as slices of bigger ones, and a grad_o whose strides differ from o's."""
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 30, 40, generator=gen)[..., :16].transpose(1, 2)
    k = torch.randn(1, 2, 6, 16, generator=gen).transpose(1, 2)
    v = torch.randn(1, 6, 16, 2, generator=gen).transpose(2, 3)
    grad_o = torch.randn(1, 1, 1, 16, generator=gen).expand(1, 30, 4, 16)
    geometry = dict(kv_len=30, block=8, stride=4, scale=0.25)
    o, lse = launch.forward(KERNELS, plan(**TINY), q, k, v, **geometry)
    grads = launch.backward(KERNELS, plan(**TINY), grad_o, q, k, v, o, lse, **geometry)
    want = expected(q[0], k[0], v[0], grad_o[0], torch.zeros(30, 4), 30, 8, 4, 0.25)
    for got, reference in zip((o, lse, *grads), want, strict=True):
        close(got[0], reference, 3e-6)


@pytest.mark.parametrize("tiny", [True, False])
def test_packed_sequences_are_separate(tiny):
    lengths_k, lengths_q, block, stride = [7, 40, 1, 64, 33], [7, 21, 1, 64, 2], 8, 4
    gen = torch.Generator().manual_seed(1)
    blocks = [oracle.blocks_of(t, block, stride) for t in lengths_k]
    bound = oracle.blocks_of(sum(lengths_k), block, stride)
    assert bound > sum(blocks)
    G, H, D = 2, 2, 16
    q = torch.randn(1, sum(lengths_q), H * G, D, generator=gen)
    k, v = (torch.randn(1, bound, H, D, generator=gen) for _ in range(2))
    k[:, sum(blocks) :] = float("nan")
    v[:, sum(blocks) :] = float("nan")
    grad_o = torch.randn(q.shape, generator=gen)
    grad_lse = torch.randn(q.shape[:3], generator=gen)
    cu_q, cu_k = (
        torch.tensor([0, *np.cumsum(x)], dtype=torch.int32) for x in (lengths_q, lengths_k)
    )
    geometry = dict(
        kv_len=sum(lengths_k), block=block, stride=stride, scale=0.3,
        cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
    )  # fmt: skip
    constants = plan(**TINY) if tiny else plan()
    o, lse = launch.forward(KERNELS, constants, q, k, v, **geometry)
    dq, d_k, d_v = launch.backward(
        KERNELS, constants, grad_o, q, k, v, o, lse, grad_lse, **geometry
    )
    first_block = 0
    for i, (t, n) in enumerate(zip(lengths_k, blocks, strict=True)):
        rows, cols = slice(cu_q[i], cu_q[i + 1]), slice(first_block, first_block + n)
        first_block += n
        want = expected(
            q[0, rows], k[0, cols], v[0, cols], grad_o[0, rows], grad_lse[0, rows],
            t, block, stride, 0.3,
        )  # fmt: skip
        got = (o[0, rows], lse[0, rows], dq[0, rows], d_k[0, cols], d_v[0, cols])
        for a, b in zip(got, want, strict=True):
            close(a, b, 3e-6)
    assert not d_k[:, first_block:].any() and not d_v[:, first_block:].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
def test_low_precision(dtype, tolerance):
    gen = torch.Generator().manual_seed(2)
    q, grad_o = (torch.randn(1, 40, 4, 32, generator=gen).to(dtype) for _ in range(2))
    k, v = (torch.randn(1, 9, 1, 32, generator=gen).to(dtype) for _ in range(2))
    geometry = dict(kv_len=40, block=8, stride=4, scale=32**-0.5)
    o, lse = launch.forward(KERNELS, plan(), q, k, v, **geometry)
    grads = launch.backward(KERNELS, plan(), grad_o, q, k, v, o, lse, **geometry)
    want = expected(q[0], k[0], v[0], grad_o[0], torch.zeros(40, 4), 40, 8, 4, 32**-0.5)
    assert o.dtype == dtype and lse.dtype == torch.float32
    for got, reference, bound in zip(
        (o, lse, *grads), want, (tolerance, 1e-5, *[2 * tolerance] * 3), strict=True
    ):
        close(got[0], reference, bound)


def test_large_logits_keep_every_row_finite():
    """The running maximum is per row: rows of very different size share a tile without overflow."""
    q = torch.zeros(1, 48, 1, 16, dtype=torch.float16)
    q[0, :, 0, 0] = torch.linspace(-200, 200, 48)
    k = torch.zeros(1, 11, 1, 16, dtype=torch.float16)
    k[0, :, 0, 0] = torch.linspace(-100, 100, 11)
    v = torch.randn(1, 11, 1, 16).half()
    geometry = dict(kv_len=48, block=8, stride=4, scale=1.0)
    o, lse = launch.forward(KERNELS, plan(), q, k, v, **geometry)
    grads = launch.backward(KERNELS, plan(), o, q, k, v, o, lse, **geometry)
    want = expected(q[0], k[0], v[0], o[0], torch.zeros(48, 1), 48, 8, 4, 1.0)
    close(o[0], want[0], 2e-3)
    assert all(g.isfinite().all() for g in grads)


def test_two_runs_are_bit_equal():
    gen = torch.Generator().manual_seed(3)
    q, grad_o = (torch.randn(1, 60, 4, 16, generator=gen) for _ in range(2))
    k, v = (torch.randn(1, 14, 2, 16, generator=gen) for _ in range(2))
    geometry = dict(kv_len=60, block=8, stride=4, scale=0.25)
    o, lse = launch.forward(KERNELS, plan(), q, k, v, **geometry)
    first, second = (
        launch.backward(KERNELS, plan(**TINY), grad_o, q, k, v, o, lse, **geometry)
        for _ in range(2)
    )
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "attn_32_16_64_S1_H1_G4_d64_n4",
        "attn_32_16_64_S31_H2_G1_d64_n4",
        "attn_32_16_64_B2_S96_H1_G4_d64_n4",
        "attn_32_16_64_S127_H1_G4_dk192_dv128_n4",
        "attn_32_32_64_S330_H1_G4_d64_n4",
        "attn_64_64_64_S385_H2_G1_d64_n4",
        "attn_32_16_64_S700_H1_G4_d64_n8_sharp",
        "attn_32_16_64_varlen5_H2_G1_d64_n4",
    ],
)
def test_golden(name):
    z = np.load(GOLDEN / f"{name}.npz")
    meta = json.loads(str(z["meta"]))
    q, k, v, do = (torch.from_numpy(z[n]) for n in ("q", "k_cmp", "v_cmp", "do"))
    cu = torch.from_numpy(z["cu_seqlens"]) if "cu_seqlens" in z else None
    geometry = dict(
        kv_len=q.shape[1], block=meta["l"], stride=meta["d"], scale=meta["scale"],
        cu_seqlens_q=cu, cu_seqlens_k=cu,
    )  # fmt: skip
    constants = plan(BLOCK_M=128, BLOCK_N=64)
    o, lse = launch.forward(KERNELS, constants, q, k, v, **geometry)
    dq, d_k, d_v = launch.backward(KERNELS, constants, do, q, k, v, o, lse, **geometry)
    rows = torch.from_numpy(z["rows"]).long() if "o_cmp" in meta["at_rows"] else slice(None)
    for got, key in (
        (o, "o_cmp"),
        (lse, "lse_cmp"),
        (dq, "dq_cmp"),
        (d_k, "dk_cmp"),
        (d_v, "dv_cmp"),
    ):
        got = got[:, rows] if key in meta["at_rows"] else got
        want = torch.from_numpy(z[key])
        finite = want.isfinite()
        assert got.isfinite().equal(finite), key
        error = (got - want)[finite].abs().max().item() if finite.any() else 0.0
        assert error <= 1e-5 * max(1.0, meta["max_abs"][key]), key
