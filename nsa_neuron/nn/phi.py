"""Compression of blocks of keys or values, with its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nsa_neuron import functional as nsa
from nsa_neuron.nn.layers import INIT_STD

if TYPE_CHECKING:
    from nsa_neuron.nn.config import NsaConfig


class Phi(nn.Module):
    """Compresses blocks of keys or values.

    Parameters as for `compress`; shared by the kv heads, or, with `config.phi_per_head`, with a
    leading axis of them (all but `pe`).

    Args:
        config: of the layer.
        dim: head dim of what is compressed.
    """

    def __init__(self, config: NsaConfig, dim: int) -> None:
        super().__init__()
        self.method, self.block, self.stride = config.phi, config.block, config.stride
        heads = (config.kv_heads,) if config.phi_per_head else ()
        self.pe = nn.Parameter(torch.empty(config.block, dim))
        self.w1: Tensor | None = None
        self.b1: Tensor | None = None
        self.w2: Tensor | None = None
        self.b2: Tensor | None = None
        if config.phi != "mean":
            self.w1 = nn.Parameter(torch.empty(*heads, config.block * dim, dim))
        if config.phi == "mlp":
            self.b1 = nn.Parameter(torch.empty(*heads, dim))
            self.w2 = nn.Parameter(torch.empty(*heads, dim, dim))
            self.b2 = nn.Parameter(torch.empty(*heads, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """`linear` starts near the mean of a block; `mlp` random, keeping variance; biases zero."""
        nn.init.normal_(self.pe, std=INIT_STD)
        if self.method == "linear" and self.w1 is not None:
            nn.init.normal_(self.w1, std=INIT_STD / self.block)
            with torch.no_grad():
                mean = torch.eye(self.w1.shape[-1], device=self.w1.device) / self.block
                self.w1.unflatten(-2, (self.block, -1)).add_(mean)
        for weight in (self.w1, self.w2) if self.method == "mlp" else ():
            if weight is not None:
                nn.init.normal_(weight, std=weight.shape[-2] ** -0.5)
        for bias in (self.b1, self.b2):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """`[B, T, Hkv, D]` -> `[B, Nc, Hkv, D]`; under autocast in x's dtype."""
        w1, b1, w2, b2, pe = (p if p is None else p.to(x.dtype) for p in self.weights())
        return nsa.compress(
            x, w1, b1, w2, b2, pe, cu_seqlens,
            method=self.method, block=self.block, stride=self.stride,
        )  # fmt: skip

    def weights(self) -> tuple[Tensor | None, ...]:
        """w1, b1, w2, b2, pe of `compress`."""
        return self.w1, self.b1, self.w2, self.b2, self.pe
