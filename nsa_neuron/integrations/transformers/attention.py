"""`attn_implementation="nsa"`: an existing model attends to selected blocks, without training.

What reaches an attention function of transformers is one set of queries, keys and values. So this
is NSA's selection, by mean-compressed keys, and attention to the selected tokens; there are no
gates, no learned compression, no branches of their own. While a sequence fits into the selected
blocks (`num_selected * select_block`, 1024 tokens by default) the outputs are those of full
attention. Beyond it the model sees part of what it was trained to see, and how much its answers
change has to be measured for each model. Sizes come from the model's config: `nsa_compress_block`,
`nsa_compress_stride`, `nsa_select_block`, `nsa_num_selected`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nsa_neuron import functional as nsa
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.nn.packing import pack

DEFAULTS = {"compress_block": 32, "compress_stride": 16, "select_block": 64, "num_selected": 16}
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "alibi")


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The padding, `[B, T]` bool; None if there is none. Causality is the ops' own."""
    if attention_mask is None:
        return None
    mask = attention_mask[:, -kv_length:].bool()
    return None if mask.shape[1] == kv_length and mask.all() else mask


def selected_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls.

    Args:
        module: the model's attention layer.
        query: `[B, Hq, S, D]`. key: `[B, Hkv, T, D]`. value: `[B, Hkv, T, Dv]`.
        attention_mask: from `attention_mask`.
        scaling: of the logits.
        dropout: must be 0.

    Returns:
        `[B, S, Hq, Dv]`, and None for the weights.

    Raises:
        InvalidArgument: something that NSA has no meaning for.
    """
    asked = {name: kwargs.get(name) for name in _UNSUPPORTED}
    asked |= {"dropout": dropout or None, "is_causal": None if is_causal(module, kwargs) else False}
    for name, found in asked.items():
        if found is not None:
            expected = "left out: attn_implementation='nsa' is causal attention without it"
            raise InvalidArgument("selected_attention", name, found, expected)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if attention_mask is None:
        return _attend(module, q, k, v, scaling, None, None), None
    given = attention_mask[:, -q.shape[1] :]
    packed_q, cu_q = pack(q, given)
    packed_k, cu_k = pack(k, attention_mask)
    packed_v, _ = pack(v, attention_mask)
    o = _attend(module, packed_q, packed_k, packed_v, scaling, cu_q, cu_k)
    out = o.new_zeros(*given.shape, *o.shape[2:])
    out[given] = o[0]
    return out, None


def is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the layer asks for causal attention."""
    asked = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if asked is None else asked)


def _attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
) -> Tensor:
    sizes = {name: getattr(module.config, f"nsa_{name}", value) for name, value in DEFAULTS.items()}
    block, stride = sizes["compress_block"], sizes["compress_stride"]
    place: dict[str, Any] = {"block": block, "stride": stride, "scale": scale}
    with torch.no_grad():
        k_cmp = nsa.compress(k, cu_seqlens_k=cu_k, block=block, stride=stride)
        _, lse = nsa.compressed_attention(q, k_cmp, k_cmp, cu_q, cu_k, kv_len=k.shape[1], **place)
        ids = nsa.select_blocks(
            q, k_cmp, lse, cu_q, cu_k, kv_len=k.shape[1], **place,
            select_block=sizes["select_block"], num_selected=sizes["num_selected"],
        )  # fmt: skip
    o, _ = nsa.selected_attention(
        q, k, v, ids, cu_q, cu_k, select_block=sizes["select_block"], scale=scale
    )
    return o
