"""The mode `cpu:native`: C++ kernels on torch's own micro-kernels, compiled at first use.

`compress` is `cpu:torch`'s in both modes: products with large matrices, which torch's GEMM does at
the machine's rate already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nsa_neuron.backends.cpu import torch_mode
from nsa_neuron.backends.cpu.native_mode import attention, decode, gradients, nsa_attention

if TYPE_CHECKING:
    from nsa_neuron.backends.cpu.torch_mode import Implementation

SHARED = ("compress", "compress_backward")
IMPLEMENTATIONS: dict[str, Implementation] = {
    **{name: torch_mode.IMPLEMENTATIONS[name] for name in SHARED},
    "attention": attention.attention,
    "attention_backward": gradients.attention_backward,
    "sliding_window_attention": attention.sliding_window_attention,
    "sliding_window_attention_backward": gradients.sliding_window_attention_backward,
    "compressed_attention": attention.compressed_attention,
    "compressed_attention_backward": gradients.compressed_attention_backward,
    "select_blocks": attention.select_blocks,
    "selected_attention": attention.selected_attention,
    "selected_attention_backward": gradients.selected_attention_backward,
    "gated_sum": attention.gated_sum,
    "gated_sum_backward": gradients.gated_sum_backward,
    "decode": decode.decode,
    "nsa_attention": nsa_attention.whole,
    "nsa_attention_forward": nsa_attention.forward,
    "nsa_attention_backward": nsa_attention.backward,
}
"""By op; called with the op's arguments by name."""
