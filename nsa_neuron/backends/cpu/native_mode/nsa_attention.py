"""The whole of NSA: three kernels forward, the first of which also selects; three backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_neuron.backends.cpu.native_mode import attention, extension, gradients
from nsa_neuron.backends.cpu.native_mode.call import (
    Call,
    Rows,
    Run,
    few,
    float_rows,
    near_rows,
    new_call,
)
from nsa_neuron.ops import common

if TYPE_CHECKING:
    from nsa_neuron.ops.nsa_attention import Eight

OP = "nsa_attention"
Calls = tuple[tuple[str, Call], ...]
"""Kernel and call of each branch."""


class Branches:
    """The three calls of one `nsa_attention`, which share q, scale and sequences.

    Args:
        values: the arguments of `nsa_attention` by name.
        ids: the chosen blocks `[B, S, Hkv, n]`, for the backward pass; None: they are to be chosen.
    """

    def __init__(self, values: dict[str, Any], ids: Tensor | None = None) -> None:
        self._values = values
        self._q = float_rows(values["q"])
        self._scale = common.default_scale(values["scale"], values["q"])
        offsets = (values["cu_seqlens_q"], values["cu_seqlens_k"])
        lengths = (self._q.shape[1], values["k_slc"].shape[1])
        geometry = (values["block"], values["stride"])
        self._raw = attention.raw_runs(*lengths, *offsets)
        self._compressed = attention.compressed_runs(*lengths, *offsets, *geometry)
        # The backward pass has no kernel of its own for a few queries.
        self._few = ids is None and few(self._q, self._raw)
        self._alive: list[Tensor] = []  # what the calls point to
        if ids is None:
            ids = attention.new_ids(self._q, values["k_cmp"], values["num_selected"])
        self.ids = ids
        self.shape = (*self._q.shape[:3], values["v_cmp"].shape[3])

    def calls(self) -> Calls:
        """Kernel and call of the compressed, selected and window branch, in the order to run."""
        v = self._values
        cmp = self._call("cmp", self._compressed)
        attention.set_selection(cmp, self.ids, v)
        slc = self._call("slc", self._raw)
        slc.ids, slc.selected = self.ids.data_ptr(), v["num_selected"]
        slc.select_block = v["select_block"]
        win = self._call("win", self._raw)
        win.window = v["window"]
        return (
            ("compressed_forward", cmp),
            ("selected_forward", slc),
            ("interval_forward", win),
        )

    def run(self, calls: Calls, op: str) -> None:
        """Runs all three; a few queries in one go, which shares them out to all threads."""
        if self._few:
            extension.run("few_queries_whole", (Call * 3)(*(call for _, call in calls)), op)
            return
        for kernel, call in calls:
            extension.run(kernel, call, op)

    def _call(self, branch: str, runs: list[Run]) -> Call:
        as_rows = near_rows if self._few else float_rows
        k, v = (as_rows(self._values[f"{side}_{branch}"]) for side in ("k", "v"))
        self._alive += [k, v]
        return new_call(self._q, k, v, runs, self._scale)


def whole(**values: Any) -> Tensor:
    """`nsa_attention`: every branch adds its gated result to o as it comes."""
    branches = Branches(values)
    o = torch.empty(branches.shape, dtype=torch.float32)
    lse = torch.empty(branches.shape[:3], dtype=torch.float32)
    gates = values["gates"].float().contiguous()
    calls = branches.calls()
    for i, (_, call) in enumerate(calls):
        call.o, call.gates, call.branch = Rows.of(o), gates.data_ptr(), i
        call.lse = lse.data_ptr()
    branches.run(calls, OP)
    return o.to(values["q"].dtype)


def forward(**values: Any) -> Eight:
    """`nsa_attention_forward`: keeps every branch's result for the backward pass."""
    branches = Branches(values)
    dtype = values["q"].dtype
    outs, stats = [], []
    calls = branches.calls()
    for _, call in calls:
        outs.append(torch.empty(branches.shape, dtype=torch.float32))
        stats.append(torch.empty(branches.shape[:3], dtype=torch.float32))
        call.o, call.lse = Rows.of(outs[-1]), stats[-1].data_ptr()
    branches.run(calls, f"{OP}_forward")
    o_cmp, o_slc, o_win = outs
    o = attention.gated_sum(o_cmp, o_slc, o_win, values["gates"].float()).to(dtype)
    lse_cmp, lse_slc, lse_win = stats
    o_cmp, o_slc, o_win = (x.to(dtype) for x in outs)
    return o, branches.ids, o_cmp, lse_cmp, o_slc, lse_slc, o_win, lse_win


def backward(**values: Any) -> Eight:
    """`nsa_attention_backward`: gates are applied as gradients are read, and dq is summed in place.

    rowsum(dO_c * o_c), which a branch's softmax needs, is its gate times the gate's gradient.
    """
    dtype = values["q"].dtype
    branches = Branches(values, values["block_indices"].contiguous())
    gates = values["gates"].float().contiguous()
    grad_o = float_rows(values["grad_o"])
    outs = [values[f"o_{branch}"] for branch in ("cmp", "slc", "win")]
    dgates = gradients.gate_gradients(grad_o, outs, gates)
    dq = torch.empty(values["q"].shape, dtype=torch.float32)
    grads: list[Tensor] = []
    kernels = ("interval_backward", "selected_backward", "interval_backward")
    for i, (kernel, (_, call)) in enumerate(zip(kernels, branches.calls(), strict=True)):
        name = ("cmp", "slc", "win")[i]
        shift = (dgates[..., i] * gates[..., i]).contiguous()
        lse = values[f"lse_{name}"].contiguous()
        dk, dv = (torch.zeros(values[f"{side}_{name}"].shape) for side in ("k", "v"))
        call.gates, call.branch = gates.data_ptr(), i
        call.grad_o, call.dq = Rows.of(grad_o), Rows.of(dq)
        call.dk, call.dv = Rows.of(dk), Rows.of(dv)
        call.lse, call.shift = lse.data_ptr(), shift.data_ptr()
        extension.run(kernel, call, f"{OP}_backward")
        grads += [dk.to(dtype), dv.to(dtype)]
    dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win = grads
    done = dgates.to(values["gates"].dtype)
    return dq.to(dtype), dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win, done
