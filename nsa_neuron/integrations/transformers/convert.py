"""From a full-attention model's weights to an NSA model's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nsa_neuron.errors import InvalidArgument
from nsa_neuron.integrations.transformers.config import NsaLmConfig
from nsa_neuron.integrations.transformers.model import NsaForCausalLM
from nsa_neuron.nn.attention import AttentionLayer, NativeSparseAttention

_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings",
)  # fmt: skip
_SHAPES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "value_head_dim",
)  # fmt: skip
GATE_BIAS = 4.0  # sigmoid(4) = 0.982, sigmoid(-4) = 0.018


@torch.no_grad()
def convert(model: nn.Module, **options: Any) -> NsaForCausalLM:
    """An NSA model that starts from a Llama-like model's weights.

    Projections, norms, perceptrons, embedding and head are copied; with `shared_kv=False` each
    branch starts from the same keys and values. New are phi, which starts as a block's mean
    (`phi="linear"`), and the gates, which start open for the selected branch and almost closed for
    the others. So the new model begins near the old one wherever a sequence fits into the selected
    blocks, and has to be trained on for longer ones.

    Args:
        model: a `LlamaForCausalLM`, or one with the same parameters; biases of queries, keys and
            values (Qwen 2) and norms of queries and keys (Qwen 3) are taken over.
        options: of `NsaLmConfig` (`attention_kinds`, `num_selected`, ...).

    Raises:
        InvalidArgument: a model with parameters that NSA's layers do not have, another rotary
            encoding than the plain one, or layers with sliding windows; options for another size
            than the model's, whose weights would not fit.
    """
    old: Any = model
    config = _config(old.config, {**_extras(old), **options})
    same = _config(old.config, {})
    for name in _SHAPES:
        if getattr(config, name) != (size := getattr(same, name)):
            raise InvalidArgument("convert", name, getattr(config, name), f"{size}, the model's")
    made = NsaForCausalLM(config).to(next(model.parameters()).dtype)
    state = {name: value for name, value in model.state_dict().items() if ".self_attn." not in name}
    known = set(made.state_dict())
    _refuse_unknown(name for name in state if name not in known)
    made.load_state_dict(state, strict=False)
    for source, target in zip(old.model.layers, made.model.layers, strict=True):
        _copy_attention(source.self_attn, target.self_attn)
    return made.eval()


def _config(old: Any, options: dict[str, Any]) -> NsaLmConfig:
    rope = getattr(old, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        found = rope["rope_type"]
        raise InvalidArgument("convert", "model", f"with rope_type {found!r}", "with 'default'")
    other = sorted(set(getattr(old, "layer_types", None) or ()) - {"full_attention"})
    if other:
        found = f"with layers of type {other[0]!r}"
        raise InvalidArgument("convert", "model", found, "with 'full_attention' only")
    values = {name: getattr(old, name) for name in _SAME}
    values |= {"head_dim": getattr(old, "head_dim", None), "phi": "linear"}
    values["rope_theta"] = float(rope.get("rope_theta", 10_000.0))
    return NsaLmConfig(**{**values, **options})


def _extras(old: Any) -> dict[str, Any]:
    """Which of Qwen's additions the attention layers have."""
    first = old.model.layers[0].self_attn
    normed = getattr(first, "q_norm", None) is not None
    return {
        "qkv_bias": first.q_proj.bias is not None,
        "qk_norm": old.config.rms_norm_eps if normed else 0.0,
    }


def _copy_attention(old: Any, new: AttentionLayer) -> None:
    c = new.config
    wanted = {f"{name}_proj.weight" for name in "qkvo"}
    wanted |= {f"{name}_proj.bias" for name in "qkv"} if c.qkv_bias else set()
    wanted |= {"q_norm.weight", "k_norm.weight"} if c.qk_norm else set()
    _refuse_unknown(f"self_attn.{name}" for name in old.state_dict() if name not in wanted)
    new.out.weight.copy_(old.o_proj.weight)
    for part in ("weight", "bias") if c.qkv_bias else ("weight",):
        q, k, v = (getattr(getattr(old, f"{name}_proj"), part) for name in "qkv")
        heads = torch.cat([_by_head(k, c.kv_heads), _by_head(v, c.kv_heads)], 1)
        getattr(new.q, part).copy_(q)
        getattr(new.kv, part).copy_(torch.cat([heads] * new.sets, 1).flatten(0, 1))
    for name in ("q_norm", "k_norm") if c.qk_norm else ():
        getattr(new, name).weight.copy_(getattr(old, name).weight)
    if isinstance(new, NativeSparseAttention):
        new.gate.weight.zero_()
        bias = torch.tensor([-GATE_BIAS, GATE_BIAS, -GATE_BIAS])
        new.gate.bias.copy_(bias.repeat(c.heads))


def _by_head(weight: Tensor, heads: int) -> Tensor:
    return weight.unflatten(0, (heads, -1))


def _refuse_unknown(names: Any) -> None:
    unknown = sorted(names)
    if unknown:
        expected = "of Llama's, Qwen 2's or Qwen 3's parameters: no other biases, no experts"
        raise InvalidArgument("convert", "model", f"with {unknown[0]}", expected)
