"""The reference ops against `tests/golden`: forward, gradients, ids (see its README).

float32 has the README's tolerance of 1e-5 relative to max(1, largest magnitude); float64 has what
the files' own rounding to float32 allows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nsa_neuron as nsa
from nsa_neuron.ops.select_blocks import ranked_scores

GOLDEN = Path(__file__).parent.parent / "golden"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-7}
DTYPES = (torch.float32, torch.float64)


def files(kind: str) -> list[str]:
    return sorted(path.stem for path in GOLDEN.glob(f"{kind}_*.npz"))


def each(kind: str) -> Any:
    """Parametrises a test by the files of a kind and by dtype."""

    def decorate(test: Any) -> Any:
        names = files(kind)
        assert names, f"no golden files of kind {kind}"
        by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
        return by_dtype(pytest.mark.parametrize("name", names)(test))

    return decorate


class Golden:
    """One file: inputs in a dtype, and comparisons with its outputs."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        with np.load(GOLDEN / f"{name}.npz") as archive:
            self.arrays = {key: archive[key] for key in archive.files if key != "meta"}
            self.meta = json.loads(str(archive["meta"]))
        self.dtype = dtype
        self.compared: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.from_numpy(self.arrays[name])
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def leaf(self, *names: str) -> list[Tensor]:
        return [self[name].clone().requires_grad_() for name in names]

    @property
    def geometry(self) -> dict[str, int]:
        return {"block": self.meta["l"], "stride": self.meta["d"]}

    @property
    def packed(self) -> dict[str, Tensor]:
        if self.meta["layout"] != "packed":
            return {}
        edges = self["cu_seqlens"]
        return {"cu_seqlens_q": edges, "cu_seqlens_k": edges}

    def stored(self, name: str, value: Tensor) -> Tensor:
        """The part of a complete result that the file keeps."""
        if name in self.meta["at_rows"]:
            return value[:, self["rows"].long()]
        if name in self.meta["at_key_rows"]:
            return value[:, self["key_rows"].long()]
        return value

    def close(self, name: str, value: Tensor | None) -> None:
        """Asserts that a complete result is the stored one."""
        assert value is not None, f"{name} has no gradient"
        self.compared.add(name)
        got, wanted = (
            self.stored(name, value.detach()).double(),
            torch.from_numpy(self.arrays[name]).double(),
        )
        assert got.shape == wanted.shape, name
        assert torch.equal(got.isneginf(), wanted.isneginf()), f"{name}: dead rows"
        live = ~wanted.isneginf()
        if not live.any():
            return
        error = float((got - wanted)[live].abs().max())
        unit = max(1.0, self.meta["max_abs"][name])
        assert error / unit <= TOLERANCE[self.dtype], f"{name}: {error / unit:.3g}"

    def identical(self, name: str, value: Tensor) -> None:
        self.compared.add(name)
        wanted = self[name]
        wrong = int((value != wanted).any(-1).sum())
        assert wrong == 0, f"{name}: {wrong} rows differ"

    def finished(self, *besides: str) -> None:
        """Asserts that every output in the file was compared."""
        assert {*self.meta["outputs"]} - {*besides} == self.compared


@each("attn")
def test_attn(name: str, dtype: torch.dtype) -> None:
    """Compressed attention, importance, selection, selected attention, and their gradients."""
    g = Golden(name, dtype)
    total = g.arrays["k"].shape[1]
    where = {"kv_len": total, **g.geometry, **g.packed}
    q, k_cmp, v_cmp = g.leaf("q", "k_cmp", "v_cmp")
    o, lse = nsa.compressed_attention(q, k_cmp, v_cmp, **where)
    o.backward(g["do"])
    g.close("o_cmp", o)
    g.close("lse_cmp", lse)
    for key, leaf in (("dq_cmp", q), ("dk_cmp", k_cmp), ("dv_cmp", v_cmp)):
        g.close(key, leaf.grad)
    check_selection(g, lse.detach(), total)
    q, k, v = g.leaf("q", "k", "v")
    o, lse = nsa.selected_attention(
        q, k, v, g["topk_idx"], select_block=g.meta["l_sel"], **g.packed
    )
    o.backward(g["do"])
    g.close("o_slc", o)
    g.close("lse_slc", lse)
    for key, leaf in (("dq_slc", q), ("dk_slc", k), ("dv_slc", v)):
        g.close(key, leaf.grad)
    g.finished("topk_gap")


def check_selection(g: Golden, lse: Tensor, total: int) -> None:
    """Ids exactly; scores of the blocks that were not forced."""
    chosen = {"select_block": g.meta["l_sel"], "num_selected": g.meta["n"]}
    where = {"kv_len": total, **g.geometry, **g.packed}
    g.identical("topk_idx", nsa.select_blocks(g["q"], g["k_cmp"], lse, **where, **chosen))
    scores = torch.zeros(*g["q"].shape[:2], g["k"].shape[2], g.arrays["scores"].shape[-1])
    scores = scores.double()
    free = torch.zeros_like(scores, dtype=torch.bool)
    chunks = ranked_scores(
        g["q"], g["k_cmp"], lse, total, g.meta["l"], g.meta["d"], g.meta["l_sel"], 1, 2,
        g.meta["scale"], where.get("cu_seqlens_q"), where.get("cu_seqlens_k"),
    )  # fmt: skip
    for rows, part in chunks:
        scores[:, rows, :, : part.shape[-1]] = part.double()
        free[:, rows, :, : part.shape[-1]] = part.isfinite()
    wanted = g["scores"].double()
    got, judged = g.stored("scores", scores), g.stored("scores", free)
    error = (got - wanted)[judged].abs()
    unit = max(1.0, g.meta["max_abs"]["scores"])
    assert error.numel() == 0 or float(error.max()) / unit <= TOLERANCE[g.dtype]
    g.compared.add("scores")


@each("select")
def test_select(name: str, dtype: torch.dtype) -> None:
    """Selected attention with arbitrary causal ids."""
    g = Golden(name, dtype)
    q, k, v = g.leaf("q", "k", "v")
    o, lse = nsa.selected_attention(
        q, k, v, g["topk_idx"], select_block=g.meta["l_sel"], **g.packed
    )
    o.backward(g["do"])
    g.close("o_slc", o)
    g.close("lse_slc", lse)
    for key, leaf in (("dq_slc", q), ("dk_slc", k), ("dv_slc", v)):
        g.close(key, leaf.grad)
    g.finished()


@each("window")
def test_window(name: str, dtype: torch.dtype) -> None:
    """Sliding window attention."""
    g = Golden(name, dtype)
    q, k, v = g.leaf("q", "k", "v")
    o, lse = nsa.sliding_window_attention(q, k, v, window=g.meta["w"], **g.packed)
    o.backward(g["do"])
    g.close("o_win", o)
    g.close("lse_win", lse)
    for key, leaf in (("dq_win", q), ("dk_win", k), ("dv_win", v)):
        g.close(key, leaf.grad)
    g.finished()


@each("compress")
def test_compress(name: str, dtype: torch.dtype) -> None:
    """Compression; `weighted` is `linear` with w1 = w[r] * I per head, and dw its trace.

    The README promises values that are exact in float32 in any summation order.
    """
    g = Golden(name, dtype)
    (x,) = g.leaf("x")
    heads, dim, block = g.meta["H"], g.meta["D"], g.meta["l"]
    method = {"weighted": "linear"}.get(g.meta["method"], g.meta["method"])
    weights: dict[str, Any] = {}
    if "w" in g.arrays:
        (w1,) = g.leaf("w")
        if g.meta["method"] == "weighted":
            eye = torch.eye(dim, dtype=dtype)
            w1 = (g["w"][:, :, None, None] * eye).reshape(heads, block * dim, dim).requires_grad_()
        weights["w1"] = w1
    if "pe" in g.arrays:
        (weights["pe"],) = g.leaf("pe")
    if "cu_seqlens" in g.arrays:
        weights["cu_seqlens_k"] = g["cu_seqlens"]
    y = nsa.compress(x, **weights, method=method, **g.geometry)
    rows = g.arrays["y"].shape[1]
    grad = torch.zeros_like(y)
    grad[:, :rows] = g["dy"]
    y.backward(grad)
    assert not y[:, rows:].any(), "rows behind a packed call's blocks are zero"
    found = {"y": y[:, :rows], "dx": x.grad}
    if "w1" in weights:
        dw = weights["w1"].grad
        if g.meta["method"] == "weighted":
            dw = dw.view(heads, block, dim, dim).diagonal(dim1=-2, dim2=-1).sum(-1)
        found["dw"] = dw[:, g["dw_rows"].long()] if "dw_rows" in g.arrays else dw
    if "pe" in weights:
        found["dpe"] = weights["pe"].grad
    for key, value in found.items():
        wanted = torch.from_numpy(g.arrays[key])
        assert torch.equal(value.detach().float(), wanted), key
        g.compared.add(key)
    g.finished()


@each("full")
def test_full(name: str, dtype: torch.dtype) -> None:
    """`nsa_attention` on mean-pooled keys: every branch, every gradient."""
    g = Golden(name, dtype)
    leaves = g.leaf("q", "k1", "v1", "k2", "v2", "k3", "v3", "gates")
    q, k1, v1, k2, v2, k3, v3, gates = leaves
    k_cmp, v_cmp = (nsa.compress(x, method="mean", **g.geometry) for x in (k1, v1))
    g.close("k_cmp", k_cmp)
    g.close("v_cmp", v_cmp)
    scalars = {"select_block": g.meta["l_sel"], "num_selected": g.meta["n"], "window": g.meta["w"]}
    values = (q, k_cmp, v_cmp, k2, v2, k3, v3, gates)
    o = nsa.nsa_attention(*values, **g.geometry, **scalars)
    o.backward(g["do"])
    g.close("o", o)
    names = ("dq", "dk1", "dv1", "dk2", "dv2", "dk3", "dv3", "dgates")
    for key, leaf in zip(names, leaves, strict=True):
        g.close(key, leaf.grad)
    assert gates.grad is not None
    g.close("dgate_logits", gates.grad * gates.detach() * (1 - gates.detach()))
    saved = torch.ops.nsa.nsa_attention_forward(*values, **g.geometry, **scalars)
    g.identical("topk_idx", saved[1])
    for key, value in zip(("o_cmp", "o_slc", "o_win"), saved[2::2], strict=True):
        g.close(key, value)
    g.finished("topk_gap")


@each("decode")
def test_decode(name: str, dtype: torch.dtype) -> None:
    """One new token per sequence against caches of different lengths."""
    g = Golden(name, dtype)
    parts: dict[str, list[Tensor]] = {}
    for i, (length, blocks) in enumerate(zip(g["seqlens"], g["cmp_seqlens"], strict=True)):
        q = g["q"][i : i + 1]
        k, v = (g[key][i : i + 1, : int(length)] for key in "kv")
        k_cmp, v_cmp = (g[key][i : i + 1, : int(blocks)] for key in ("k_cmp", "v_cmp"))
        where = {"kv_len": int(length), **g.geometry}
        o_cmp, lse_cmp = nsa.compressed_attention(q, k_cmp, v_cmp, **where)
        m = {"select_block": g.meta["l_sel"]}
        ids = nsa.select_blocks(q, k_cmp, lse_cmp, **where, **m, num_selected=g.meta["n"])
        o_slc, lse_slc = nsa.selected_attention(q, k, v, ids, **m)
        o_win, lse_win = nsa.sliding_window_attention(q, k, v, window=g.meta["w"])
        row = {
            "o_cmp": o_cmp, "lse_cmp": lse_cmp, "topk_idx": ids, "o_slc": o_slc,
            "lse_slc": lse_slc, "o_win": o_win, "lse_win": lse_win,
        }  # fmt: skip
        for key, value in row.items():
            parts.setdefault(key, []).append(value)
    for key, values in parts.items():
        compare = g.identical if key == "topk_idx" else g.close
        compare(key, torch.cat(values))
    g.finished("topk_gap")


def test_every_file_is_used() -> None:
    kinds = ("attn", "select", "window", "compress", "full", "decode")
    used = sorted(name for kind in kinds for name in files(kind))
    assert used == sorted(path.stem for path in GOLDEN.glob("*.npz"))
