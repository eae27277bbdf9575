"""Native Sparse Attention as a module, a small language model made of it, caches, generation."""

from nsa_neuron.nn.attention import NativeSparseAttention, SoftmaxAttention
from nsa_neuron.nn.cache import ContiguousCache, KvCache, LayerStep, PagedCache, Step
from nsa_neuron.nn.capture import CapturedLayer, CapturedQuery, capture
from nsa_neuron.nn.config import NsaConfig
from nsa_neuron.nn.generation import Sampling, generate, prefill, stream
from nsa_neuron.nn.model import Block, ByteLanguageModel, next_token_loss
from nsa_neuron.nn.packing import pack, unpack
from nsa_neuron.nn.phi import Phi
from nsa_neuron.nn.state import rows_by_head

__all__ = [
    "Block",
    "ByteLanguageModel",
    "CapturedLayer",
    "CapturedQuery",
    "ContiguousCache",
    "KvCache",
    "LayerStep",
    "NativeSparseAttention",
    "NsaConfig",
    "PagedCache",
    "Phi",
    "Sampling",
    "SoftmaxAttention",
    "Step",
    "capture",
    "generate",
    "next_token_loss",
    "pack",
    "prefill",
    "rows_by_head",
    "stream",
    "unpack",
]
