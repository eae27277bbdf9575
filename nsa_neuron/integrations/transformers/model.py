"""`NsaForCausalLM`: a Llama-like decoder whose attention is `nsa_neuron.nn`'s."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from nsa_neuron.errors import InvalidArgument
from nsa_neuron.integrations.transformers.attention import edges_of
from nsa_neuron.integrations.transformers.cache import NsaCacheLayer
from nsa_neuron.integrations.transformers.config import NsaLmConfig
from nsa_neuron.nn.attention import attention_layer
from nsa_neuron.nn.packing import pack, unpack
from nsa_neuron.nn.phi import Phi


class NsaDecoderLayer(GradientCheckpointingLayer):
    """Norm, attention, norm, gated perceptron."""

    def __init__(self, config: NsaLmConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.attention_kinds is not None
        self.layer_idx = layer_idx
        self.kind = config.attention_kinds[layer_idx]
        self.self_attn = attention_layer(config.attention_config(), self.kind)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | None = None,
        counts: list[int] | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`[B, S, hidden]` -> `[B, S, hidden]`.

        Args:
            hidden_states: of whole sequences, packed ones, or the new tokens.
            cu_seqlens: offsets of packed sequences.
            counts: real tokens at the end of each row, with a cache.
            cache: holds a `NsaCacheLayer` for this layer.
        """
        x = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self._attend(x, cu_seqlens, counts, cache)
        x = self.post_attention_layernorm(hidden_states)
        return hidden_states + self.mlp(x)

    def _attend(
        self, x: Tensor, cu_seqlens: Tensor | None, counts: list[int] | None, cache: Cache | None
    ) -> Tensor:
        if cache is None:
            y: Tensor = self.self_attn(x, cu_seqlens)
            return y
        layer = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
        if not isinstance(layer, NsaCacheLayer):
            found = f"with a {type(layer).__name__} for layer {self.layer_idx}"
            expected = "DynamicCache(config=model.config), whose layers are NsaCacheLayer"
            raise InvalidArgument("NsaForCausalLM", "cache", found, expected)
        if cache.offloading:
            raise InvalidArgument("NsaForCausalLM", "cache", "with offloading", "without it")
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.self_attn.q.weight.dtype
        assert counts is not None
        with layer.step(self.self_attn.own_config, self.kind, x, counts, dtype) as step:
            y = self.self_attn(x, None, step)
        return y


class NsaPreTrainedModel(PreTrainedModel):
    """Initialisation and what transformers may do with the model."""

    config: NsaLmConfig
    config_class = NsaLmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NsaDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": NsaDecoderLayer}  # noqa: RUF012 - transformers' own

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Phi):
            loaded = (getattr(p, "_is_hf_initialized", False) for p in module.parameters())
            if not any(loaded):
                module.reset_parameters()
            return
        super()._init_weights(module)
        # A head as large as a wide model's would make the first guess worse than a uniform one.
        dim, std = self.config.hidden_size, self.config.initializer_range
        tied = self.config.tie_word_embeddings
        if isinstance(module, nn.Embedding) and tied:
            _shrink(module.weight, min(1.0, 1 / (dim * std)))
        if isinstance(module, nn.Linear) and module.out_features == self.config.vocab_size:
            _shrink(module.weight, min(1.0, 0.2 * dim**-0.5 / std))


def _shrink(weight: Tensor, factor: float) -> None:
    if not getattr(weight, "_is_hf_initialized", False):
        weight.mul_(factor)


class NsaModel(NsaPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: NsaLmConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            NsaDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """States of the tokens.

        Args:
            input_ids: `[B, S]`, or `inputs_embeds`.
            attention_mask: `[B, seen + S]`, 0 at padding: on either side, or on the left where a
                cache is used.
            position_ids: tell where sequences begin that are packed into rows, if there is neither
                mask nor cache; else a token's position is the number of real tokens before it.
            cache: `DynamicCache(config=...)`.
            inputs_embeds: `[B, S, hidden]`.
            use_cache: whether to make a cache when none is given.

        Raises:
            InvalidArgument: a mask of another shape, or padding or packing where it cannot be.
        """
        if (input_ids is None) == (inputs_embeds is None):
            found = "None" if input_ids is None else "given with inputs_embeds"
            raise InvalidArgument("NsaModel", "input_ids", found, "given, or inputs_embeds")
        x: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        packed = _packed(position_ids, x) if attention_mask is None else None
        if packed is not None and cache is not None:
            expected = "those of one sequence a row: a cache has one a row"
            raise InvalidArgument("NsaModel", "position_ids", "those of packed sequences", expected)
        if use_cache and cache is None and packed is None:
            cache = DynamicCache(config=self.config)
        seen = 0 if cache is None else cache.get_seq_length()
        mask = _real_tokens(attention_mask, x, seen)
        cu_seqlens, counts = None, None
        if cache is not None:
            counts = [x.shape[1]] * x.shape[0] if mask is None else _left_padded(mask)
        elif mask is not None:
            x, cu_seqlens = pack(x, mask)
        elif packed is not None:
            shape, cu_seqlens = x.shape, packed
            x = x.reshape(1, -1, shape[-1])
        for layer in self.layers:
            x = layer(x, cu_seqlens=cu_seqlens, counts=counts, cache=cache)
        x = self.norm(x)
        if cu_seqlens is not None and mask is not None:
            x = unpack(x, mask)
        elif packed is not None:
            x = x.view(shape)
        return BaseModelOutputWithPast(last_hidden_state=x, cache=cache)


def _packed(position_ids: Tensor | None, x: Tensor) -> Tensor | None:
    """Offsets of the sequences that are packed into rows; None: a row is a sequence.

    Not for compiled calls: their number would be a size.
    """
    if position_ids is None or position_ids.dim() != 2 or torch.compiler.is_compiling():
        return None
    sequences = find_packed_sequence_indices(position_ids.expand(x.shape[0], -1))
    return None if sequences is None else edges_of(sequences)


def _real_tokens(attention_mask: Tensor | None, x: Tensor, seen: int) -> Tensor | None:
    """Which of x's tokens are real, `[B, S]` bool; None: all."""
    if attention_mask is None:
        return None
    batch, tokens = x.shape[:2]
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch:
        found = f"of shape {list(attention_mask.shape)}"
        raise InvalidArgument("NsaModel", "attention_mask", found, f"of shape [{batch}, seen + S]")
    if attention_mask.shape[1] != seen + tokens:
        found = f"{attention_mask.shape[1]} columns wide"
        expected = f"{seen + tokens} wide: {seen} seen and {tokens} new"
        raise InvalidArgument("NsaModel", "attention_mask", found, expected)
    mask = attention_mask[:, seen:].bool()
    return None if mask.all() else mask


def _left_padded(mask: Tensor) -> list[int]:
    """Real tokens of each row, which end it."""
    counts = mask.sum(1)
    columns = torch.arange(mask.shape[1], device=mask.device)
    if not torch.equal(mask, columns >= mask.shape[1] - counts[:, None]):
        expected = "padded on the left where a cache is used (tokenizer.padding_side = 'left')"
        raise InvalidArgument("NsaModel", "attention_mask", "padded elsewhere", expected)
    return [int(n) for n in counts]


class NsaForCausalLM(NsaPreTrainedModel, GenerationMixin):
    """The decoder with a head; loss, generation, saving and loading as in every such model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: NsaLmConfig) -> None:
        super().__init__(config)
        self.model = NsaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any
    ) -> Any:
        """Transformers' own `generate`; a cache that NSA's layers cannot be is refused before."""
        config = self.generation_config if generation_config is None else generation_config
        kind = kwargs.get("cache_implementation", config.cache_implementation)
        # Refused here: where torch has no streams, such a cache fails before it meets a layer.
        if kind is not None and ("offload" in kind or "quant" in kind):
            expected = 'without offloading or quantization: left out, "dynamic" or "static"'
            raise InvalidArgument("generate", "cache_implementation", kind, expected)
        return super().generate(inputs, generation_config, **kwargs)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[B, S, vocabulary]`, and the loss if labels are given; see `NsaModel.forward`."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits, loss = self.lm_head(kept), None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, cache=outputs.cache, hidden_states=outputs.hidden_states
        )
