"""Launches the kernel for a few queries on paged caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_neuron.backends.cpu.native_mode import attention, extension
from nsa_neuron.backends.cpu.native_mode.call import Call, Rows, float_rows, near_rows, new_call
from nsa_neuron.ops import common


def decode(**values: Any) -> Tensor:
    """See `nsa_neuron.decode`."""
    q, gates = float_rows(values["q"]), values["gates"].float().contiguous()
    lengths = values["seqlens"].contiguous()
    o = torch.empty(*q.shape[:3], values["v_cmp"].shape[3], dtype=torch.float32)
    ids = attention.new_ids(q, values["k_cmp"], values["num_selected"])
    alive: list[Tensor] = []  # what the calls point to

    def branch(i: int, name: str) -> Call:
        table = values[f"{name}_table"].contiguous()
        k, v = (near_rows(values[f"{side}_{name}"]) for side in ("k", "v"))
        alive.extend((table, k, v))
        call = new_call(q, k, v, [], common.default_scale(values["scale"], q))
        call.o, call.gates, call.branch = Rows.of(o), gates.data_ptr(), i
        call.table, call.table_width = table.data_ptr(), table.shape[1]
        call.pages, call.page = k.shape[:2]
        call.lengths = lengths.data_ptr()
        return call

    cmp, slc, win = (branch(i, name) for i, name in enumerate(("cmp", "slc", "win")))
    attention.set_selection(cmp, ids, values)
    slc.ids, slc.selected = ids.data_ptr(), values["num_selected"]
    slc.select_block, win.window = values["select_block"], values["window"]
    extension.run("few_queries_whole", (Call * 3)(cmp, slc, win), "decode")
    return o.to(values["q"].dtype)
