"""What every NSA operation means. One file per op; `OPS` lists them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nsa_neuron.errors import NsaError
from nsa_neuron.ops import (
    attention,
    compress,
    compressed_attention,
    decode,
    gated_sum,
    nsa_attention,
    select_blocks,
    selected_attention,
    sliding_window_attention,
)

if TYPE_CHECKING:
    from nsa_neuron.spec import OpSpec

OPS: tuple[OpSpec, ...] = (
    compress.SPEC,
    compress.BACKWARD,
    compressed_attention.SPEC,
    compressed_attention.BACKWARD,
    select_blocks.SPEC,
    selected_attention.SPEC,
    selected_attention.BACKWARD,
    sliding_window_attention.SPEC,
    sliding_window_attention.BACKWARD,
    attention.SPEC,
    attention.BACKWARD,
    gated_sum.SPEC,
    gated_sum.BACKWARD,
    nsa_attention.SPEC,
    nsa_attention.FORWARD,
    nsa_attention.BACKWARD,
    decode.SPEC,
)
BY_NAME = {spec.name: spec for spec in OPS}


def get(name: str) -> OpSpec:
    """The spec of an op.

    Raises:
        NsaError: there is none of that name.
    """
    if name not in BY_NAME:
        raise NsaError(f"no op '{name}'; there are {', '.join(BY_NAME)}")
    return BY_NAME[name]
