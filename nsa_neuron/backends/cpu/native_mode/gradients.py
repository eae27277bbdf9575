"""Launches the kernels of single ops, backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsa_neuron.backends.cpu.native_mode import extension
from nsa_neuron.backends.cpu.native_mode.attention import compressed_runs, raw_runs
from nsa_neuron.backends.cpu.native_mode.call import Call, Rows, Run, float_rows, new_call
from nsa_neuron.ops import common
from nsa_neuron.ops.softmax import row_shift

Three = tuple[Tensor, Tensor, Tensor]


def _differentiate(
    op: str, kernel: str, values: dict[str, Any], k: Tensor, v: Tensor, runs: list[Run],
    **settings: Any,
) -> Three:  # fmt: skip
    """Runs a backward kernel.

    Args:
        op: the op's name.
        kernel: the kernel's.
        values: the op's arguments by name.
        k, v: its keys and values.
        runs: its sequences.
        settings: fields of the call.
    """
    dtype, q = values["q"].dtype, float_rows(values["q"])
    k, v, grad_o = float_rows(k), float_rows(v), float_rows(values["grad_o"])
    lse = values["lse"].contiguous()
    shift = row_shift(grad_o, values["o"], lse, values["grad_lse"]).contiguous()
    call = new_call(q, k, v, runs, common.default_scale(values["scale"], q))
    dq = torch.empty(q.shape, dtype=torch.float32)
    # Rows that no kernel writes, of blocks that nobody reads, are zero.
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32) for x in (k, v))
    call.grad_o, call.dq, call.dk, call.dv = (Rows.of(x) for x in (grad_o, dq, dk, dv))
    call.lse, call.shift = lse.data_ptr(), shift.data_ptr()
    for name, value in settings.items():
        setattr(call, name, value)
    extension.run(kernel, call, op)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _raw_runs(values: dict[str, Any]) -> list[Run]:
    offsets = (values["cu_seqlens_q"], values["cu_seqlens_k"])
    return raw_runs(values["q"].shape[1], values["k"].shape[1], *offsets)


def attention_backward(**values: Any) -> Three:
    """See `nsa_neuron.ops.attention.attention_backward`."""
    op, kernel = "attention_backward", "interval_backward"
    return _differentiate(op, kernel, values, values["k"], values["v"], _raw_runs(values))


def sliding_window_attention_backward(**values: Any) -> Three:
    """See `nsa_neuron.ops.sliding_window_attention.sliding_window_attention_backward`."""
    op, kernel = "sliding_window_attention_backward", "interval_backward"
    runs = _raw_runs(values)
    return _differentiate(
        op, kernel, values, values["k"], values["v"], runs, window=values["window"]
    )


def compressed_attention_backward(**values: Any) -> Three:
    """See `nsa_neuron.ops.compressed_attention.compressed_attention_backward`."""
    op, kernel = "compressed_attention_backward", "interval_backward"
    l, d = values["block"], values["stride"]
    offsets = (values["cu_seqlens_q"], values["cu_seqlens_k"])
    runs = compressed_runs(values["q"].shape[1], values["kv_len"], *offsets, l, d)
    k, v = values["k_cmp"], values["v_cmp"]
    return _differentiate(op, kernel, values, k, v, runs, length=l, stride=d)


def selected_attention_backward(**values: Any) -> Three:
    """See `nsa_neuron.ops.selected_attention.selected_attention_backward`."""
    op, kernel = "selected_attention_backward", "selected_backward"
    ids = values["block_indices"].contiguous()
    settings = {
        "ids": ids.data_ptr(), "select_block": values["select_block"], "selected": ids.shape[3],
    }  # fmt: skip
    runs = _raw_runs(values)
    return _differentiate(op, kernel, values, values["k"], values["v"], runs, **settings)


def gated_sum_backward(**values: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `nsa_neuron.ops.gated_sum.gated_sum_backward`."""
    dtype = values["grad_o"].dtype
    branches = [values[name] for name in ("o_cmp", "o_slc", "o_win")]
    grad_o, gates = values["grad_o"].float(), values["gates"].float().contiguous()
    grads = [torch.empty(grad_o.shape, dtype=torch.float32) for _ in branches]
    dgates = gate_gradients(grad_o, branches, gates, grads)
    a, b, c = (x.to(dtype) for x in grads)
    return a, b, c, dgates.to(dtype)


def gate_gradients(
    grad_o: Tensor, branches: Sequence[Tensor], gates: Tensor, grads: Sequence[Tensor] = ()
) -> Tensor:
    """Gradients of float32 gates `[B, S, Hq, 3]`; those of the branches go to `grads` if given."""
    grad_o = grad_o.contiguous()
    a, b, c = (x.float().contiguous() for x in branches)
    dgates = torch.empty(gates.shape, dtype=torch.float32)
    batch, s, heads, dim = grad_o.shape
    call = Call(
        q=Rows.of(a), k=Rows.of(b), v=Rows.of(c), grad_o=Rows.of(grad_o), gates=gates.data_ptr(),
        lse=dgates.data_ptr(), batch=batch, queries=s, kv_heads=heads, group=1, dv_dim=dim,
    )  # fmt: skip
    if grads:
        call.dq, call.dk, call.dv = (Rows.of(x) for x in grads)
    extension.run("gated_sum_backward", call, "gated_sum_backward")
    return dgates
