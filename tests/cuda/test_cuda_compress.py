"""`compress` kernels, interpreted, against float64 autograd and the golden vectors."""

from __future__ import annotations

import json
from pathlib import Path

import compressed_oracle as oracle
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from poisoned import poison  # noqa: F401

from nsa_neuron.backends.cuda import plans
from nsa_neuron.backends.cuda.launch import blocks
from nsa_neuron.backends.cuda.launch import compress as launch
from nsa_neuron.toolchain import KernelPackage, triton_interpreter

pytest.importorskip("triton")
pytestmark = pytest.mark.sim

GOLDEN = Path(__file__).parents[1] / "golden"
KERNELS = KernelPackage("cuda_kernels", triton_interpreter).load("compress")
PLAN = plans.find("interpret", "compress", dk=64, dv=64, dtype="float32", group=1)
NAMES = ("x", "w1", "b1", "w2", "b2", "pe")


def reference(x, w1, b1, w2, b2, pe, method, block, stride):
    """y [B, Nc, Hkv, N] as the rules say it."""
    heads = x.shape[2]
    windows = x.unfold(1, block, stride).permute(0, 1, 2, 4, 3)  # [B, Nc, H, block, D]
    if pe is not None:
        windows = windows + (pe if pe.ndim == 3 else pe.expand(heads, *pe.shape))
    if method == "mean":
        return windows.mean(3)

    def linear(rows, w, b):
        w = w if w.ndim == 3 else w.expand(heads, *w.shape)
        out = torch.einsum("bihk,hkn->bihn", rows, w)
        return out if b is None else out + b

    y = linear(windows.flatten(3), w1, b1)
    return y if method == "linear" else linear(F.gelu(y), w2, b2)


def make(method, heads, dim, block, per_head, options, gen, dtype=torch.float32, hidden=40):
    """Parameters by name; `options` says which of bias and pe there are."""
    lead = (heads,) if per_head else ()
    out = hidden if method == "mlp" else dim
    shapes = {"pe": (*lead, block, dim)} if "pe" in options else {}
    if method != "mean":
        shapes["w1"] = (*lead, block * dim, out)
        shapes |= {"b1": (*lead, out)} if "bias" in options else {}
    if method == "mlp":
        shapes["w2"] = (*lead, hidden, dim)
        shapes |= {"b2": (*lead, dim)} if "bias" in options else {}
    values = {n: torch.randn(s, generator=gen) for n, s in shapes.items()}
    values = {n: v / v.shape[-2] ** 0.5 if n[0] == "w" else v for n, v in values.items()}
    return {n: values[n].to(dtype) if n in values else None for n in NAMES[1:]}


def check(x, parameters, method, block, stride, cu, tolerance, gen):
    lengths = [x.shape[1]] if cu is None else cu.diff().tolist()
    inputs = {
        n: None if v is None else v.double().requires_grad_()
        for n, v in {"x": x, **parameters}.items()
    }
    ys, begin = [], 0
    for length in lengths:
        part = dict(inputs, x=inputs["x"][:, begin : begin + length])
        begin += length
        if length >= block:
            ys.append(reference(**part, method=method, block=block, stride=stride))
    width = x.shape[3]
    want = torch.cat(ys, 1) if ys else torch.zeros(x.shape[0], 0, x.shape[2], width).double()
    rows = oracle.blocks_of(x.shape[1], block, stride)
    grad_y = torch.randn(x.shape[0], rows, x.shape[2], width, generator=gen).to(x.dtype)
    present = [n for n in NAMES if inputs[n] is not None]
    total = (want * grad_y[:, : want.shape[1]].double()).sum() + 0 * sum(
        inputs[n].sum() for n in present
    )
    want_grads = torch.autograd.grad(total, [inputs[n] for n in present])
    # Rows behind the last block of a packed batch may hold anything.
    grad_y[:, want.shape[1] :] = float("nan")

    arguments = [{"x": x, **parameters}[n] for n in NAMES]
    geometry = dict(method=method, block=block, stride=stride, cu_seqlens_k=cu)
    y = launch.forward(KERNELS, PLAN, *arguments, **geometry)
    grads = dict(
        zip(
            NAMES,
            launch.gradients(KERNELS, PLAN, grad_y, *arguments, **geometry),
            strict=True,
        )
    )
    assert y.dtype == x.dtype and y.shape[1] == rows
    assert not y[:, want.shape[1] :].any()
    for name in NAMES:
        assert (grads[name] is None) == (inputs[name] is None)
    results = [("y", y[:, : want.shape[1]], want.detach())]
    results += [(n, grads[n], w) for n, w in zip(present, want_grads, strict=True)]
    for name, got, right in results:
        assert got.shape == right.shape, name
        bound = tolerance * max([1.0, *right.abs().flatten().tolist()])
        assert got.isfinite().all(), name
        assert not right.numel() or (got.double() - right).abs().max() <= bound, name


CASES = [
    ("mean", 2, 24, 8, 4, False, ("pe",)),
    ("mean", 1, 80, 6, 2, True, ("pe",)),
    ("mean", 3, 16, 4, 4, False, ()),
    ("linear", 2, 24, 8, 4, False, ("pe", "bias")),
    ("linear", 2, 80, 4, 2, True, ("pe",)),
    ("linear", 1, 16, 6, 6, False, ()),
    ("mlp", 2, 24, 4, 2, False, ("pe", "bias")),
    ("mlp", 2, 16, 6, 2, True, ("pe", "bias")),
    ("mlp", 1, 16, 4, 4, False, ()),
]


@pytest.mark.parametrize(
    ("method", "heads", "dim", "block", "stride", "per_head", "options"), CASES
)
def test_float64(method, heads, dim, block, stride, per_head, options):
    gen = torch.Generator().manual_seed(dim)
    x = torch.randn(2, heads, 43, dim, generator=gen).transpose(1, 2)
    parameters = make(method, heads, dim, block, per_head, options, gen)
    check(x, parameters, method, block, stride, None, 2e-6, gen)


@pytest.mark.parametrize("method", ["mean", "linear", "mlp"])
def test_packed(method):
    gen = torch.Generator().manual_seed(1)
    cu = torch.tensor([0, 3, 40, 41, 90, 94], dtype=torch.int32)
    x = torch.randn(1, 94, 2, 16, generator=gen)
    check(x, make(method, 2, 16, 8, True, ("pe", "bias"), gen), method, 8, 4, cu, 2e-6, gen)


@pytest.mark.parametrize("method", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("tokens", [5, 8])
def test_shorter_than_a_block_or_exactly_one(method, tokens):
    gen = torch.Generator().manual_seed(2)
    x = torch.randn(1, tokens, 1, 16, generator=gen)
    check(x, make(method, 1, 16, 8, False, ("pe", "bias"), gen), method, 8, 4, None, 2e-6, gen)


@pytest.mark.parametrize("method", ["mean", "linear", "mlp"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_low_precision(method, dtype, tolerance):
    gen = torch.Generator().manual_seed(3)
    x = torch.randn(1, 40, 1, 16, generator=gen).to(dtype)
    parameters = make(method, 1, 16, 8, False, ("pe", "bias"), gen, dtype)
    check(x, parameters, method, 8, 4, None, tolerance, gen)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("compress_mean_32_16_S200_H2_D64", "mean"),
        ("compress_mean_64_64_S256_H1_D192_pe", "mean"),
        ("compress_linear_32_16_S150_H1_D64_pe", "linear"),
    ],
)
def test_golden(name, method):
    z = np.load(GOLDEN / f"{name}.npz")
    meta = json.loads(str(z["meta"]))
    x, dy = torch.from_numpy(z["x"]), torch.from_numpy(z["dy"])
    w = torch.from_numpy(z["w"]) if "w" in z else None
    pe = torch.from_numpy(z["pe"]) if "pe" in z else None
    geometry = dict(method=method, block=meta["l"], stride=meta["d"])
    y = launch.forward(KERNELS, PLAN, x, w, None, None, None, pe, **geometry)
    dx, dw, *_, dpe = launch.gradients(KERNELS, PLAN, dy, x, w, None, None, None, pe, **geometry)
    if dw is not None:
        dw = dw[:, torch.from_numpy(z["dw_rows"]).long()]
    for key, got in (("y", y), ("dx", dx), ("dw", dw), ("dpe", dpe)):
        if key in z:
            error = (got - torch.from_numpy(z[key])).abs().max().item()
            assert error <= 1e-5 * max(1.0, meta["max_abs"][key]), key


@pytest.mark.parametrize("lengths", [[5], [0, 40, 3, 8, 0, 9, 100], [7] * 9, [300, 0, 70]])
def test_where_packed_blocks_begin(lengths):
    """Counted in Python. In tiles of 4 sequences and 16 blocks; some have no block or no token."""
    offsets, firsts, cu = [0], [], [0]
    for length in lengths:
        found = range(cu[-1], cu[-1] + length - 8 + 1, 4)
        firsts += found
        offsets.append(offsets[-1] + len(found))
        cu.append(cu[-1] + length)
    cu_k = torch.tensor(cu, dtype=torch.int32)
    got = blocks.compressed_offsets(KERNELS, PLAN, cu_k, 8, 4)
    assert got.tolist() == offsets
    count = blocks.count_blocks(sum(lengths), 8, 4)
    starts = blocks.first_tokens(KERNELS, PLAN, cu_k, got, count, 4)
    assert len(starts) == count >= len(firsts)
    assert starts[: len(firsts)].tolist() == firsts
