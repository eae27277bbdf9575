"""The configuration of `NsaForCausalLM`: Llama's names, and NSA's."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from nsa_neuron.errors import InvalidArgument, StateMismatch
from nsa_neuron.nn.attention import KINDS
from nsa_neuron.nn.config import NsaConfig
from nsa_neuron.nn.state import ROWS_BY_HEAD


@strict
class NsaLmConfig(PreTrainedConfig):
    """A Llama-like decoder with Native Sparse Attention.

    Attributes:
        attention_kinds: of each layer: `nsa`, `full`, `window`; None: all `nsa`.
        value_head_dim: None: as `head_dim`.
        rope_theta: base of the rotary encoding; rope_placement: see `NsaConfig.rope`.
        compress_block, compress_stride, select_block, num_selected, num_initial, num_local,
            attention_window, phi, phi_per_head, shared_kv, qkv_bias, qk_norm: see `NsaConfig`.
        attention_layout: version of the attention layers' parameters; set by the class.
        The rest: as in `LlamaConfig`.
    """

    model_type = "nsa"
    keys_to_ignore_at_inference = ("cache", "past_key_values")
    # Ranks divide the kv heads; `nsa_neuron.distributed.tensor_parallel` takes more ranks, too.
    base_model_tp_plan = {  # noqa: RUF012 - transformers' own
        **{f"layers.*.self_attn.{name}": "colwise" for name in ("q", "kv", "gate")},
        "layers.*.self_attn.out": "rowwise",
        **{
            f"layers.*.self_attn.{name}": "replicated_with_grad_allreduce"
            for name in ("phi_k", "phi_v", "q_norm", "k_norm")
        },
        **{f"layers.*.mlp.{name}": "colwise" for name in ("gate_proj", "up_proj")},
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_key_value_heads: int = 1
    head_dim: int | None = None
    value_head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 65536
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    mlp_bias: bool = False
    rope_theta: float = 10_000.0
    rope_placement: str = "after"
    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    num_selected: int = 16
    num_initial: int = 1
    num_local: int = 2
    attention_window: int = 512
    phi: str = "mlp"
    phi_per_head: bool = False
    shared_kv: bool = False
    qkv_bias: bool = False
    qk_norm: float = 0.0
    attention_kinds: list[str] | None = None
    attention_layout: int = ROWS_BY_HEAD

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.value_head_dim is None:
            self.value_head_dim = self.head_dim
        if self.attention_kinds is None:
            self.attention_kinds = ["nsa"] * self.num_hidden_layers
        kwargs.pop("layer_types", None)
        self.layer_types = ["nsa"] * self.num_hidden_layers  # of the cache: one class for all kinds
        super().__post_init__(**kwargs)

    def validate_layer_type(self) -> None:
        """Every layer has a kind, and the attention's sizes are legal."""
        kinds = self.attention_kinds or []
        if len(kinds) != self.num_hidden_layers or not set(kinds) <= set(KINDS):
            expected = f"{self.num_hidden_layers} of {', '.join(KINDS)}"
            raise InvalidArgument("NsaLmConfig", "attention_kinds", kinds, expected)
        self.attention_config()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'; refuses a saved configuration whose weights have rows in doubt.

        Raises:
            StateMismatch: it says nothing of the weights' layout, and several heads make it matter.
        """
        heads = config_dict.get("num_key_value_heads", cls.num_key_value_heads)
        known = config_dict.get("attention_layout", 0) >= ROWS_BY_HEAD
        one_set = config_dict.get("shared_kv", False)
        one_set = one_set or "nsa" not in (config_dict.get("attention_kinds") or ["nsa"])
        if not known and heads > 1 and not one_set:
            raise StateMismatch(
                "the saved configuration has no attention_layout = 2: its weights may have the "
                "rows of kv.weight in another order of heads. If they were saved before revision "
                "fcd0a07 (2026-11-28), turn each with nsa_neuron.nn.rows_by_head(weight, 3, "
                f'{heads}); then, or if they are younger, add "attention_layout": 2 to config.json'
            )
        return super().from_dict(config_dict, **kwargs)

    def attention_config(self) -> NsaConfig:
        """Sizes and options of every attention layer."""
        assert self.head_dim is not None and self.value_head_dim is not None
        return NsaConfig(
            dim=self.hidden_size,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            dk=self.head_dim,
            dv=self.value_head_dim,
            block=self.compress_block,
            stride=self.compress_stride,
            select_block=self.select_block,
            num_selected=self.num_selected,
            num_initial=self.num_initial,
            num_local=self.num_local,
            window=self.attention_window,
            phi=self.phi,
            phi_per_head=self.phi_per_head,
            shared_kv=self.shared_kv,
            qkv_bias=self.qkv_bias,
            qk_norm=float(self.qk_norm),
            rope_base=float(self.rope_theta),
            rope=self.rope_placement,
            max_positions=self.max_position_embeddings,
        )
