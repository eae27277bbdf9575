"""The mode `cpu:torch`: every op in plain torch, arranged for a CPU's caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsa_neuron.backends.cpu.torch_mode import (
    compress,
    decode,
    interval,
    nsa_attention,
    select_blocks,
    selected_attention,
)
from nsa_neuron.ops import common
from nsa_neuron.ops.gated_sum import gated_sum, gated_sum_backward
from nsa_neuron.ops.softmax import Causal, Visibility, Window

Implementation = Callable[..., Any]


def _call(values: dict[str, Any]) -> tuple[interval.Sequences, Visibility, float]:
    """Sequences, visible keys and scale of a call of an op whose queries see runs of keys."""
    q, offsets = values["q"], (values.pop("cu_seqlens_q"), values.pop("cu_seqlens_k"))
    scale = common.default_scale(values.pop("scale"), q)
    if "kv_len" in values:
        segs = list(common.segments(q.shape[1], values.pop("kv_len"), *offsets))
        values["k"], values["v"] = values.pop("k_cmp"), values.pop("v_cmp")
        geometry = values.pop("block"), values.pop("stride")
        return *select_blocks.compressed_sequences(segs, *geometry), scale
    rows = common.segments(q.shape[1], values["k"].shape[1], *offsets)
    seen = Window(values.pop("window")) if "window" in values else Causal()
    return [(seg.queries, seg.keys, seg.offset) for seg in rows], seen, scale


def _interval_forward(**values: Any) -> tuple[Tensor, Tensor]:
    sequences, seen, scale = _call(values)
    return interval.forward(**values, sequences=sequences, seen=seen, scale=scale)


def _interval_backward(**values: Any) -> tuple[Tensor, Tensor, Tensor]:
    sequences, seen, scale = _call(values)
    return interval.backward(**values, sequences=sequences, seen=seen, scale=scale)


PARTS: dict[str, Implementation] = {
    "attention": _interval_forward,
    "attention_backward": _interval_backward,
    "sliding_window_attention": _interval_forward,
    "sliding_window_attention_backward": _interval_backward,
    "compressed_attention": _interval_forward,
    "compressed_attention_backward": _interval_backward,
    "compress": compress.compress,
    "compress_backward": compress.compress_backward,
    "select_blocks": select_blocks.select_blocks,
    "selected_attention": selected_attention.selected_attention,
    "selected_attention_backward": selected_attention.selected_attention_backward,
    # Bound by bytes, and the references make no more passes than torch needs.
    "gated_sum": gated_sum,
    "gated_sum_backward": gated_sum_backward,
    "decode": decode.decode,
}


def _whole(function: Implementation) -> Implementation:
    return lambda **values: function(PARTS, values)


# Gradients are ops of their own. Products that write where they are told refuse tensors that want
# one, which a lowered op is given where autograd has nothing to record.
IMPLEMENTATIONS: dict[str, Implementation] = {
    name: torch.no_grad()(function)
    for name, function in {
        **PARTS,
        "nsa_attention": _whole(nsa_attention.whole),
        "nsa_attention_forward": _whole(nsa_attention.forward),
        "nsa_attention_backward": _whole(nsa_attention.backward),
    }.items()
}
"""By op; called with the op's arguments by name."""
