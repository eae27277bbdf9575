"""A byte-level language model of NSA layers, and of full and windowed ones beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsa_neuron.errors import InvalidArgument, InvalidType
from nsa_neuron.fields import check_int
from nsa_neuron.nn.attention import AttentionLayer, attention_layer
from nsa_neuron.nn.cache import ContiguousCache, KvCache, LayerStep, PagedCache, Step
from nsa_neuron.nn.config import NsaConfig
from nsa_neuron.nn.layers import INIT_STD, Embedding, Linear, reset, residual_std
from nsa_neuron.nn.packing import pack, unpack
from nsa_neuron.nn.state import CheckedModule


class Block(nn.Module):
    """Pre-norm transformer block.

    Args:
        config: of the attention.
        kind: of the attention: `nsa`, `full`, `window`.
        layers: of the model, which makes what each adds start smaller.
    """

    def __init__(self, config: NsaConfig, kind: str = "nsa", layers: int = 1) -> None:
        super().__init__()
        std = residual_std(layers)
        self.norm1, self.norm2 = nn.RMSNorm(config.dim), nn.RMSNorm(config.dim)
        self.attention = attention_layer(config, kind, std)
        self.up = Linear(config.dim, 4 * config.dim)
        self.down = Linear(4 * config.dim, config.dim, std=std)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None = None, step: LayerStep | None = None
    ) -> Tensor:
        """`[B, S, dim]` -> `[B, S, dim]`; see `NativeSparseAttention.forward`."""
        x = x + self.attention(self.norm1(x), cu_seqlens, step)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x


def run_block(
    block: nn.Module, x: Tensor, cu_seqlens: Tensor | None, step: LayerStep | None
) -> Tensor:
    """Calls a block; see `ByteLanguageModel.compile_blocks`."""
    y: Tensor = block(x, cu_seqlens, step)
    return y


class ByteLanguageModel(CheckedModule):
    """Embedding, blocks, head.

    Args:
        config: of every layer.
        layers: how many NSA layers, or the kind of each: `nsa`, `full`, `window`. The paper advises
            full attention in the last layers; arXiv 2511.00819 alternates window and NSA layers.
    """

    VOCABULARY = 256

    def __init__(self, config: NsaConfig, layers: int | Sequence[str]) -> None:
        super().__init__()
        if not isinstance(config, NsaConfig):
            found = type(config).__name__
            raise InvalidType("ByteLanguageModel", "config", found, "an NsaConfig")
        self.config = config
        self.run_block: Callable[..., Tensor] = run_block
        if isinstance(layers, (bool, str)) or not isinstance(layers, (int, Sequence)):
            expected = "a number of layers, or the kind of each"
            raise InvalidType("ByteLanguageModel", "layers", repr(layers), expected)
        if isinstance(layers, int):
            check_int("ByteLanguageModel", "layers", layers, 1)
        self.kinds = ("nsa",) * layers if isinstance(layers, int) else tuple(layers)
        if not self.kinds:
            raise InvalidArgument("ByteLanguageModel", "layers", repr(layers), "at least one")
        self.embedding = Embedding(self.VOCABULARY, config.dim)
        self.blocks = nn.ModuleList(Block(config, kind, len(self.kinds)) for kind in self.kinds)
        self.norm = nn.RMSNorm(config.dim)
        # Small enough that the first loss is that of a uniform guess.
        head_std = min(INIT_STD, 0.2 * config.dim**-0.5)
        self.head = Linear(config.dim, self.VOCABULARY, std=head_std)

    def reset_parameters(self) -> None:
        """All weights start again."""
        reset(self)

    def forward(
        self,
        tokens: Tensor,
        step: Step | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        last: int | None = None,
    ) -> Tensor:
        """Logits `[B, S, 256]`, of the next byte at each position.

        Args:
            tokens: `[B, S]` int64 bytes.
            step: of a cache, see `new_cache`: earlier tokens are there, these are added to it.
            mask: `[B, S]` bool, which tokens are real: each row's are next to each other, the rest
                is padding. Outputs do not depend on padding; its logits are 0. Not for compiled
                calls: the number of real tokens gives sizes.
            cu_seqlens: offsets of packed sequences, `[N + 1]` int32; needs B == 1.
            last: logits of the last so many positions only.

        Raises:
            InvalidArgument, InvalidType: arguments that do not fit.
        """
        if last is not None:
            check_int("forward", "last", last, 1)
        for name, given in (("mask", mask), ("cu_seqlens", cu_seqlens)):
            if given is not None and not isinstance(given, Tensor):
                raise InvalidType("forward", name, f"a {type(given).__name__}", "a torch.Tensor")
        if mask is not None:
            if step is not None or cu_seqlens is not None:
                other = "step" if step is not None else "cu_seqlens"
                raise InvalidArgument("forward", "mask", f"given with {other}", "None beside it")
            packed, edges = pack(tokens, mask)
            logits = unpack(self(packed, cu_seqlens=edges), mask)
            return logits if last is None else logits[:, -last:]
        x = self.hidden(tokens, step, cu_seqlens=cu_seqlens)
        if last is not None:
            x = x[:, -last:]
        all_logits: Tensor = self.head(self.norm(x))
        return all_logits

    def hidden(
        self,
        tokens: Tensor,
        step: Step | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        layers: int | None = None,
    ) -> Tensor:
        """States `[B, S, dim]` behind the first `layers` blocks (default: all)."""
        self._check(tokens, step)
        try:
            x: Tensor = self.embedding(tokens)
        except IndexError:
            found = f"from {int(tokens.min())} to {int(tokens.max())}"
            expected = f"bytes, from 0 to {self.VOCABULARY - 1}"
            raise InvalidArgument("forward", "tokens", found, expected) from None
        for i, block in enumerate(self.blocks[:layers]):
            x = self.run_block(block, x, cu_seqlens, None if step is None else step.layers[i])
        return x

    def compile_blocks(self, **options: Any) -> Callable[..., Tensor]:
        """Compiles what a block does, once for all blocks of a kind, whatever their number.

        Args:
            options: of `torch.compile`; `fullgraph` and `dynamic` are on.

        Returns:
            The compiled function, for `nsa_neuron.explain`.
        """
        self.run_block = torch.compile(run_block, fullgraph=True, dynamic=True, **options)
        return self.run_block

    def _check(self, tokens: Tensor, step: Step | None) -> None:
        if not isinstance(tokens, Tensor):
            raise InvalidType("forward", "tokens", f"a {type(tokens).__name__}", "a torch.Tensor")
        if tokens.dtype != torch.int64:
            raise InvalidType("forward", "tokens", str(tokens.dtype), "torch.int64")
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            expected = "of shape [B, S], S at least 1"
            raise InvalidArgument("forward", "tokens", f"of shape {list(tokens.shape)}", expected)
        if tokens.device != self.embedding.weight.device:
            expected = f"on {self.embedding.weight.device} like the model"
            raise InvalidArgument("forward", "tokens", f"on {tokens.device}", expected)
        if step is not None and not hasattr(step, "layers"):  # `distributed` has steps of its own
            raise InvalidType("forward", "step", type(step).__name__, "a Step of a cache")
        if step is not None and len(step.layers) != len(self.kinds):
            found, expected = f"of a cache of {len(step.layers)} layers", f"of {len(self.kinds)}"
            raise InvalidArgument("forward", "step", found, expected)

    def new_cache(
        self, batch: int = 1, capacity: int = 4096, *, paged: bool = False, **options: Any
    ) -> KvCache:
        """An empty cache for sequences of up to `capacity` tokens.

        Args:
            batch: sequences.
            capacity: tokens of the longest.
            paged: a `PagedCache`; default a `ContiguousCache`.
            options: of the class (`pages`, `slack`, `dtype`); under autocast its dtype by default.
        """
        weight = self.embedding.weight
        device = weight.device.type
        autocast = torch.is_autocast_enabled(device)
        options.setdefault("dtype", torch.get_autocast_dtype(device) if autocast else weight.dtype)
        kind = PagedCache if paged else ContiguousCache
        # With tensor parallelism a layer holds some of the heads.
        own = next(m.own_config for m in self.modules() if isinstance(m, AttentionLayer))
        return kind(own, self.kinds, batch, capacity, device=weight.device, **options)


def next_token_loss(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the next token over all positions, in nats.

    Args:
        logits: `[B, S, V]` of the model.
        tokens: `[B, S]` that it was given.
        mask: `[B, S]` bool; only real tokens after real tokens count.
    """
    if tokens.shape[1] < 2:
        raise InvalidArgument("next_token_loss", "tokens", "shorter than 2", "at least 2 long")
    targets = tokens[:, 1:]
    if mask is not None:
        targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())
