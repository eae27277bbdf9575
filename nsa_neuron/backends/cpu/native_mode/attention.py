"""Launches the kernels of single ops, forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_neuron.backends.cpu.native_mode import extension
from nsa_neuron.backends.cpu.native_mode.call import (
    Call,
    Rows,
    Run,
    few,
    float_rows,
    near_rows,
    new_call,
    new_results,
)
from nsa_neuron.ops import common


def raw_runs(
    q_len: int, kv_len: int, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> list[Run]:
    """Every sequence's queries and raw keys."""
    segs = common.segments(q_len, kv_len, cu_seqlens_q, cu_seqlens_k)
    return [(seg.queries, seg.keys, seg.offset) for seg in segs]


def compressed_runs(
    q_len: int,
    kv_len: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block: int,
    stride: int,
) -> list[Run]:
    """Every sequence's queries and compressed keys."""
    segs = list(common.segments(q_len, kv_len, cu_seqlens_q, cu_seqlens_k))
    rows = common.compressed_slices(segs, block, stride)
    return [(seg.queries, run, seg.offset) for seg, run in zip(segs, rows, strict=True)]


def _attend(
    op: str, kernel: str, q: Tensor, k: Tensor, v: Tensor, runs: list[Run], scale: float | None,
    **settings: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs a forward kernel that gives o in q's dtype and lse; settings are fields of the call."""
    dtype, kernel = q.dtype, "few_queries" if few(q, runs) else kernel
    as_rows = near_rows if kernel == "few_queries" else float_rows
    q, k, v = float_rows(q), as_rows(k), as_rows(v)
    call = new_call(q, k, v, runs, common.default_scale(scale, q))
    o, lse = new_results(q, v.shape[3])
    call.o, call.lse = Rows.of(o), lse.data_ptr()
    for name, value in settings.items():
        setattr(call, name, value)
    extension.run(kernel, call, op)
    return o.to(dtype), lse


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, *, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `nsa_neuron.attention`."""
    runs = raw_runs(q.shape[1], k.shape[1], cu_seqlens_q, cu_seqlens_k)
    return _attend("attention", "interval_forward", q, k, v, runs, scale)


def sliding_window_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, *, window: int, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `nsa_neuron.sliding_window_attention`."""
    runs = raw_runs(q.shape[1], k.shape[1], cu_seqlens_q, cu_seqlens_k)
    op = "sliding_window_attention"
    # Only what a window's queries see is converted; a decode step may stand behind 1M keys.
    near = min(run.start + max(0, offset + 1 - window) for _, run, offset in runs)
    if near and len(runs) == 1:
        k, v = k[:, near:], v[:, near:]
        rows, run, offset = runs[0]
        runs = [(rows, slice(0, run.stop - near), offset - near)]
    return _attend(op, "interval_forward", q, k, v, runs, scale, window=window)


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, *, kv_len: int, block: int, stride: int,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `nsa_neuron.compressed_attention`."""
    runs = compressed_runs(q.shape[1], kv_len, cu_seqlens_q, cu_seqlens_k, block, stride)
    settings = {"length": block, "stride": stride}
    op = "compressed_attention"
    return _attend(op, "interval_forward", q, k_cmp, v_cmp, runs, scale, **settings)


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, *, select_block: int, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `nsa_neuron.selected_attention`."""
    runs = raw_runs(q.shape[1], k.shape[1], cu_seqlens_q, cu_seqlens_k)
    ids = block_indices.contiguous()
    settings = {
        "ids": ids.data_ptr(), "select_block": select_block, "selected": ids.shape[3],
    }  # fmt: skip
    return _attend("selected_attention", "selected_forward", q, k, v, runs, scale, **settings)


def set_selection(call: Call, ids: Tensor, values: dict[str, Any]) -> None:
    """Lets a call of compressed keys choose blocks into ids `[B, S, Hkv, n]`."""
    call.length, call.stride = values["block"], values["stride"]
    call.ids, call.selected = ids.data_ptr(), values["num_selected"]
    call.select_block = values["select_block"]
    call.initial, call.local = values["num_initial"], values["num_local"]


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, *, kv_len: int, scale: float | None = None, **values: Any,
) -> Tensor:  # fmt: skip
    """See `nsa_neuron.select_blocks`."""
    offsets = (cu_seqlens_q, cu_seqlens_k)
    runs = compressed_runs(q.shape[1], kv_len, *offsets, values["block"], values["stride"])
    rows, keys, known = float_rows(q), float_rows(k_cmp), lse.contiguous()
    call = new_call(rows, keys, None, runs, common.default_scale(scale, q))
    ids = new_ids(q, k_cmp, values["num_selected"])
    set_selection(call, ids, values)
    call.lse = known.data_ptr()
    extension.run("compressed_forward", call, "select_blocks")
    return ids


def new_ids(q: Tensor, k_cmp: Tensor, count: int) -> Tensor:
    """Uninitialised ids `[B, S, Hkv, n]`."""
    return torch.empty(q.shape[0], q.shape[1], k_cmp.shape[2], count, dtype=torch.int32)


def gated_sum(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    """See `nsa_neuron.gated_sum`."""
    a, b, c, g = (x.float().contiguous() for x in (o_cmp, o_slc, o_win, gates))
    o = torch.empty(a.shape, dtype=torch.float32)
    batch, s, heads, dim = a.shape
    call = Call(
        q=Rows.of(a), k=Rows.of(b), v=Rows.of(c), o=Rows.of(o), gates=g.data_ptr(), batch=batch,
        queries=s, kv_heads=heads, group=1, dv_dim=dim,
    )  # fmt: skip
    extension.run("gated_sum", call, "gated_sum")
    return o.to(o_cmp.dtype)
