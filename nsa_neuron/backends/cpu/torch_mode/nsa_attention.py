"""The whole of NSA: compressed attention and selection share one q @ k_cmp."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from nsa_neuron.backends.cpu.torch_mode import interval, layout
from nsa_neuron.backends.cpu.torch_mode.select_blocks import Geometry, compressed_and_selected
from nsa_neuron.ops import common
from nsa_neuron.ops.gated_sum import gated_sum
from nsa_neuron.ops.nsa_attention import Eight, compose_backward, compose_forward
from nsa_neuron.ops.softmax import Window, work_dtype

Parts = Mapping[str, Callable[..., Any]]


def forward(parts: Parts, values: dict[str, Any]) -> Eight:
    """`nsa_attention_forward` out of parts, but for the first two, which are fused.

    Args:
        parts: implementations of the single ops by name.
        values: the arguments of `nsa_attention_forward` by name.
    """
    q, hkv = values["q"], values["k_cmp"].shape[2]
    lse = interval.dead_statistic(q, hkv)
    o_cmp, ids = _far(values, _segments(values), lse)
    lse_cmp = layout.statistic_like(lse, q.shape[0])
    known = {
        "compressed_attention": lambda **_: (o_cmp, lse_cmp),
        "select_blocks": lambda **_: ids,
    }
    return compose_forward(lambda name: known.get(name) or parts[name], values)


def backward(parts: Parts, values: dict[str, Any]) -> Eight:
    """`nsa_attention_backward` out of parts."""
    return compose_backward(parts.__getitem__, values)


def whole(parts: Parts, values: dict[str, Any]) -> Tensor:
    """`nsa_attention`: no statistic but what selection needs, and the branches summed in place."""
    segs, q, gates = _segments(values), values["q"], values["gates"]
    scale = common.default_scale(values["scale"], q)
    o, ids = _far(values, segs)
    o_slc, _ = parts["selected_attention"](
        q, values["k_slc"], values["v_slc"], ids, values["cu_seqlens_q"], values["cu_seqlens_k"],
        select_block=values["select_block"], scale=scale,
    )  # fmt: skip
    sequences = [(seg.queries, seg.keys, seg.offset) for seg in segs]
    near = Window(values["window"])
    o_win = interval.output(q, values["k_win"], values["v_win"], sequences, near, scale)
    if o.dtype != work_dtype(o) or gates.dtype != o.dtype:
        return gated_sum(o, o_slc, o_win, gates)
    o.mul_(gates[..., 0, None])
    return o.addcmul_(o_slc, gates[..., 1, None]).addcmul_(o_win, gates[..., 2, None])


def _segments(values: dict[str, Any]) -> list[common.Segment]:
    lengths = values["q"].shape[1], values["k_slc"].shape[1]
    return list(common.segments(*lengths, values["cu_seqlens_q"], values["cu_seqlens_k"]))


def _far(
    values: dict[str, Any], segs: list[common.Segment], lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """o and ids of the compressed branch."""
    q, k_cmp, v_cmp = values["q"], values["k_cmp"], values["v_cmp"]
    scale = common.default_scale(values["scale"], q)
    return compressed_and_selected(q, k_cmp, v_cmp, Geometry.of(values), segs, scale, lse)
