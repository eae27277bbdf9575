"""The whole of NSA: compressed attention and selection share one q @ k_cmp."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from nsa_neuron.backends.cpu.torch_mode.select_blocks import Geometry, compressed_and_selected
from nsa_neuron.ops import common
from nsa_neuron.ops.nsa_attention import Eight, compose_backward, compose_forward

Parts = Mapping[str, Callable[..., Any]]


def forward(parts: Parts, values: dict[str, Any]) -> Eight:
    """`nsa_attention_forward` out of parts, but for the first two, which are fused.

    Args:
        parts: implementations of the single ops by name.
        values: the arguments of `nsa_attention_forward` by name.
    """
    segs = common.segments(
        values["q"].shape[1],
        values["k_slc"].shape[1],
        values["cu_seqlens_q"],
        values["cu_seqlens_k"],
    )
    o_cmp, lse_cmp, ids = compressed_and_selected(
        values["q"],
        values["k_cmp"],
        values["v_cmp"],
        Geometry.of(values),
        list(segs),
        common.default_scale(values["scale"], values["q"]),
    )
    known = {
        "compressed_attention": lambda **_: (o_cmp, lse_cmp),
        "select_blocks": lambda **_: ids,
    }
    return compose_forward(lambda name: known.get(name) or parts[name], values)


def backward(parts: Parts, values: dict[str, Any]) -> Eight:
    """`nsa_attention_backward` out of parts."""
    return compose_backward(parts.__getitem__, values)


def whole(parts: Parts, values: dict[str, Any]) -> Tensor:
    """`nsa_attention`."""
    return forward(parts, values)[0]
