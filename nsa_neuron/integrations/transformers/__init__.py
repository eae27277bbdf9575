"""Hugging Face transformers (5.x): `NsaForCausalLM`, its cache, and `attn_implementation="nsa"`.

Importing this package registers the model with `AutoConfig` and `AutoModelForCausalLM` and the
attention function with `AttentionInterface`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from nsa_neuron.integrations.transformers.attention import attention_mask, selected_attention
from nsa_neuron.integrations.transformers.cache import NsaCacheLayer
from nsa_neuron.integrations.transformers.config import NsaLmConfig
from nsa_neuron.integrations.transformers.convert import convert
from nsa_neuron.integrations.transformers.model import NsaForCausalLM, NsaModel

ATTENTION = "nsa"

AttentionInterface.register(ATTENTION, selected_attention)
AttentionMaskInterface.register(ATTENTION, attention_mask)
AutoConfig.register(NsaLmConfig.model_type, NsaLmConfig, exist_ok=True)
AutoModel.register(NsaLmConfig, NsaModel, exist_ok=True)
AutoModelForCausalLM.register(NsaLmConfig, NsaForCausalLM, exist_ok=True)

__all__ = ["ATTENTION", "NsaCacheLayer", "NsaForCausalLM", "NsaLmConfig", "NsaModel", "convert"]
