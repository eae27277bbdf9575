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

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsa_neuron import functional as nsa
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.nn.packing import pack

DEFAULTS = {"compress_block": 32, "compress_stride": 16, "select_block": 64, "num_selected": 16}
MaskFunction = Callable[..., Tensor]
"""`(batch, head, query, key)` -> which pairs see each other; takes indices as tensors."""
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "alibi")


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """What there is besides causality, which is the ops' own.

    Sequences that `position_ids` pack into one row are told apart as transformers does it (no
    mask, no cache), but in compiled calls, where their number would be a size.

    Returns:
        The padding, `[B, T]` bool; or the number of each token's sequence where rows are packed,
        `[B, T]` int32; None if there is neither.

    Raises:
        InvalidArgument: a cache whose rows are not the tokens seen so far, or another mask.
    """
    if use_vmap:
        raise _refuse("mask_function", "of the model's own", "causal")
    if kv_offset + kv_length != int(q_offset) + q_length:
        found = f"of {kv_length} rows for {int(q_offset) + q_length} tokens"
        raise _refuse("cache", found, "a DynamicCache, whose last rows are the new tokens")
    if attention_mask is not None:
        mask = attention_mask[:, -kv_length:].bool()
        return None if mask.shape[1] == kv_length and mask.all() else mask
    plain = allow_is_causal_skip or mask_function is None or torch.compiler.is_compiling()
    if plain or kv_length != q_length or mask_function is None:
        return None
    rows = torch.arange(batch_size, device=kwargs.get("device"))[:, None]
    at = torch.arange(q_length - 1, device=rows.device)[None]
    if mask_function(rows, 0, at, at + 1).any():
        raise _refuse("mask_function", "one that sees what comes later", "causal")
    begins = ~mask_function(rows, 0, at + 1, at).expand(batch_size, -1)
    return F.pad(begins.cumsum(1), (1, 0)).int() if begins.any() else None


def _refuse(argument: str, found: str, expected: str) -> InvalidArgument:
    return InvalidArgument("attn_implementation='nsa'", argument, found, expected)


def edges_of(sequences: Tensor) -> Tensor:
    """Offsets, `[N + 1]` int32, of the sequences of rows that are laid one behind the other.

    Args:
        sequences: the number of each token's sequence in its row, `[B, S]`.
    """
    begins = F.pad(sequences.diff(dim=1) != 0, (1, 0), value=True).flatten()
    return F.pad(begins.nonzero().flatten(), (0, 1), value=begins.numel()).int()


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
    if attention_mask.dtype == torch.int32:
        edges = edges_of(attention_mask)
        rows = [x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v)]
        o = _attend(module, rows[0], rows[1], rows[2], scaling, edges, edges)
        return o.view(*q.shape[:3], -1), None
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
