"""`decode` kernels, interpreted, against the dense float64 statement and the golden vectors."""

from __future__ import annotations

import json
from pathlib import Path

import compressed_oracle as oracle
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nsa_neuron.backends.cuda import plans
from nsa_neuron.backends.cuda.launch import decode as launch
from nsa_neuron.toolchain import KernelPackage, triton_interpreter

pytest.importorskip("triton")
pytestmark = pytest.mark.sim

GOLDEN = Path(__file__).parents[1] / "golden"
KERNELS = KernelPackage("cuda_kernels", triton_interpreter).load("decode")


def plan(**change):
    found = plans.find("interpret", "decode", dk=64, dv=64, dtype="float32", group=1)
    found["score"] |= change
    return found


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Every `torch.empty` is NaN (or -77), so an element that no kernel writes shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-77)

    monkeypatch.setattr(torch, "empty", poisoned)


def paged(sequences, page, capacity, gen):
    """A pool in shuffled page order, NaN wherever no token lies, and its table [B, pages]."""
    pages = -(-capacity // page)
    pool = torch.full(
        (len(sequences) * pages + 3, page, *sequences[0].shape[1:]),
        float("nan"), dtype=sequences[0].dtype,
    )  # fmt: skip
    table = torch.randperm(len(pool), generator=gen)[: len(sequences) * pages].view(-1, pages)
    for row, x in zip(table, sequences, strict=True):
        for p in range(-(-len(x) // page)):
            part = x[p * page : (p + 1) * page]
            pool[row[p], : len(part)] = part
    return pool, table.int().contiguous()


def make(lengths, S, Hkv, G, dk, dv, geometry, gen, dtype=torch.float32, pages=(8, 2, 8)):
    """Queries, gates, whole sequences by name, and their paged caches."""
    draw = lambda *shape: torch.randn(*shape, generator=gen).to(dtype)  # noqa: E731
    q = draw(len(lengths), S, Hkv * G, dk)
    gates = torch.rand(len(lengths), S, Hkv * G, 3, generator=gen).to(dtype)
    blocks = [oracle.blocks_of(t, geometry.block, geometry.stride) for t in lengths]
    whole = {
        "cmp": ([draw(n, Hkv, dk) for n in blocks], [draw(n, Hkv, dv) for n in blocks]),
        "slc": ([draw(t, Hkv, dk) for t in lengths], [draw(t, Hkv, dv) for t in lengths]),
        "win": ([draw(t, Hkv, dk) for t in lengths], [draw(t, Hkv, dv) for t in lengths]),
    }
    tensors = {"seqlens": torch.tensor(lengths, dtype=torch.int32)}
    sizes = (pages[0], pages[1] * geometry.select_block, pages[2])
    for (name, (k, v)), page in zip(whole.items(), sizes, strict=True):
        longest = max(map(len, k)) + 2 * page
        state = gen.get_state()
        tensors[f"k_{name}"], tensors[f"{name}_table"] = paged(k, page, longest, gen)
        gen.set_state(state)
        tensors[f"v_{name}"], _ = paged(v, page, longest, gen)
    return q, gates, whole, launch.PagedCaches(**tensors)


def expected(q, gates, whole, b, tokens, g):
    """float64 o [S, Hq, Dv] and ids [S, Hkv, n] of sequence b."""
    queries = len(q)
    parts = {n: (k[b].double(), v[b].double()) for n, (k, v) in whole.items()}
    seen = oracle.compressed_mask(queries, tokens, g.block, g.stride)
    o_cmp, _, p = oracle.masked_attention(q.double(), *parts["cmp"], seen, g.scale)
    kv_heads = parts["slc"][0].shape[1]
    scores = oracle.importance(p, kv_heads, tokens, g.block, g.stride, g.select_block)
    ids = oracle.select(scores, tokens, g.select_block, g.num_selected, g.num_initial, g.num_local)
    t = torch.arange(tokens - queries, tokens)[:, None]
    key = torch.arange(tokens)[None]
    chosen = (key // g.select_block)[None, :, :, None] == ids.transpose(0, 1)[:, :, None, :]
    chosen = chosen.any(-1).repeat_interleave(q.shape[1] // kv_heads, 0) & (key <= t)
    o_slc, *_ = oracle.masked_attention(q.double(), *parts["slc"], chosen, g.scale)
    near = (key <= t) & (key > t - g.window)
    o_win, *_ = oracle.masked_attention(q.double(), *parts["win"], near, g.scale)
    return (torch.stack([o_cmp, o_slc, o_win], -1) * gates.double()[:, :, None]).sum(-1), ids


SMALL = launch.Geometry(8, 4, 16, 5, 1, 2, 21, 0.3)
CASES = [
    ([1, 7, 8, 16, 17, 90], 1, 2, 4, 24, 16, SMALL, {}),
    ([200, 33], 1, 1, 1, 16, 16, launch.Geometry(4, 4, 4, 6, 2, 1, 5, 0.3), {"KEYS": 16}),
    ([150, 70], 1, 1, 3, 16, 16, launch.Geometry(6, 2, 6, 7, 1, 2, 64, 0.2), {"SLOTS": 16}),
    ([64, 30], 3, 1, 20, 16, 32, SMALL, {"PROGRAMS": 64}),
    ([120, 5], 2, 2, 2, 80, 48, SMALL, {"PROGRAMS": 1}),
    # Nothing forced; the last compressed block reaches into a selection block of the next tile.
    (
        [76, 79, 77, 78, 75],
        1,
        2,
        1,
        16,
        16,
        launch.Geometry(16, 4, 16, 4, 0, 0, 5, 1.0),
        {"KEYS": 16},
    ),
    ([131], 1, 1, 16, 192, 128, launch.Geometry(32, 16, 64, 4, 1, 2, 40, 192**-0.5), {}),
]


@pytest.mark.parametrize(("lengths", "S", "Hkv", "G", "dk", "dv", "geometry", "change"), CASES)
def test_float64(lengths, S, Hkv, G, dk, dv, geometry, change):
    gen = torch.Generator().manual_seed(sum(lengths))
    q, gates, whole, caches = make(lengths, S, Hkv, G, dk, dv, geometry, gen)
    constants = plan(**change)
    workspace = launch.Workspace.allocate(constants, q, caches, geometry)
    for _ in range(2):  # the second call finds the workspace as the first one left it
        o = launch.step(KERNELS, constants, q, gates, caches, geometry, workspace)
        assert not workspace.counters.any()
        ids = workspace.ids.view(len(lengths), S, Hkv, -1)[..., : geometry.num_selected]
        for b, tokens in enumerate(lengths):
            queries = min(S, tokens)
            want, want_ids = expected(q[b, S - queries :], gates[b, S - queries :], whole, b,
                                      tokens, geometry)  # fmt: skip
            assert ids[b, S - queries :].equal(want_ids)
            assert (o[b, S - queries :].double() - want).abs().max() <= 3e-6


def test_idle_slots_give_zeros():
    gen = torch.Generator().manual_seed(0)
    q, gates, whole, caches = make([40, 40], 1, 1, 4, 16, 16, SMALL, gen)
    caches.seqlens[0] = 0
    o = launch.step(KERNELS, plan(), q, gates, caches, SMALL)
    assert not o[0].any()
    want, _ = expected(q[1], gates[1], whole, 1, 40, SMALL)
    assert (o[1].double() - want).abs().max() <= 3e-6


def test_one_captured_call_serves_growing_sequences():
    """The same tensors, with seqlens changed on the device: nothing was fixed by the first call."""
    gen = torch.Generator().manual_seed(1)
    q, gates, whole, caches = make([100, 60], 1, 1, 2, 16, 16, SMALL, gen)
    workspace = launch.Workspace.allocate(plan(), q, caches, SMALL)
    for lengths in ([3, 60], [80, 1], [100, 17]):
        caches.seqlens.copy_(torch.tensor(lengths))
        o = launch.step(KERNELS, plan(), q, gates, caches, SMALL, workspace)
        for b, tokens in enumerate(lengths):
            cut = {
                n: tuple(
                    [x[: tokens if n != "cmp" else oracle.blocks_of(tokens, 8, 4)] for x in side]
                    for side in sides
                )
                for n, sides in whole.items()
            }
            want, _ = expected(q[b], gates[b], cut, b, tokens, SMALL)
            assert (o[b].double() - want).abs().max() <= 3e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_low_precision(dtype, tolerance):
    gen = torch.Generator().manual_seed(2)
    q, gates, whole, caches = make([120], 1, 1, 8, 32, 32, SMALL, gen, dtype)
    o = launch.step(KERNELS, plan(), q, gates, caches, SMALL)
    want, _ = expected(q[0], gates[0], whole, 0, 120, SMALL)
    assert o.dtype == dtype
    assert (o[0].double() - want).abs().max() <= tolerance


def test_golden():
    z = np.load(GOLDEN / "decode_32_16_64_B8_H1_G4_d64_n16.npz")
    meta = json.loads(str(z["meta"]))
    gen = torch.Generator().manual_seed(3)
    x = {n: torch.from_numpy(z[n]) for n in ("q", "k", "v", "k_cmp", "v_cmp", "seqlens")}
    pools = {}
    for name, page in (("k_cmp", 32), ("v_cmp", 32), ("k", 128), ("v", 128)):
        lengths = z["cmp_seqlens" if "cmp" in name else "seqlens"]
        rows = [s[:n] for s, n in zip(x[name], lengths, strict=True)]
        gen.manual_seed(page)
        pools[name] = paged(rows, page, x[name].shape[1], gen)
    raw = {"k": pools["k"], "v": pools["v"]}
    caches = launch.PagedCaches(
        seqlens=x["seqlens"], k_cmp=pools["k_cmp"][0], v_cmp=pools["v_cmp"][0],
        cmp_table=pools["k_cmp"][1], k_slc=raw["k"][0], v_slc=raw["v"][0], slc_table=raw["k"][1],
        k_win=raw["k"][0], v_win=raw["v"][0], win_table=raw["k"][1],
    )  # fmt: skip
    geometry = launch.Geometry(
        meta["l"], meta["d"], meta["l_sel"], meta["n"], 1, 2, meta["w"], meta["scale"]
    )
    q = x["q"]
    workspace = launch.Workspace.allocate(plan(), q, caches, geometry)
    for branch, key in enumerate(("o_cmp", "o_slc", "o_win")):
        gates = F.one_hot(torch.full(q.shape[:3], branch), 3).float()
        o = launch.step(KERNELS, plan(), q, gates, caches, geometry, workspace)
        error = (o - torch.from_numpy(z[key])).abs().max().item()
        assert error <= 1e-5 * max(1.0, meta["max_abs"][key]), key
    assert workspace.ids.view(8, 1, 1, 16).equal(torch.from_numpy(z["topk_idx"]))
