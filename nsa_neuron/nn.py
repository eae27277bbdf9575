"""Native Sparse Attention as a module, and a small language model made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsa_neuron import functional as nsa
from nsa_neuron.cache import LayerCache
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.ops.compress import METHODS


@dataclass(frozen=True)
class NsaConfig:
    """Sizes and options of an attention layer.

    Attributes:
        dim: model width.
        heads: Hq. kv_heads: Hkv, divides heads.
        dk: head dim of queries and keys, even. dv: head dim of values.
        block, stride: l and d. select_block: m. num_selected: n. window: w.
        phi: how blocks are compressed: `mean`, `linear` or `mlp`.
        rope_base: base of the rotary position encoding; 0 turns it off.
    """

    dim: int
    heads: int
    kv_heads: int
    dk: int
    dv: int
    block: int = 32
    stride: int = 16
    select_block: int = 64
    num_selected: int = 16
    window: int = 512
    phi: str = "mlp"
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        rules = (
            ("kv_heads", self.heads % self.kv_heads == 0, f"a divisor of heads = {self.heads}"),
            ("dk", self.dk % 2 == 0, "even, for the rotary encoding"),
            ("phi", self.phi in METHODS, f"one of {', '.join(METHODS)}"),
        )
        for name, holds, expected in rules:
            if not holds:
                raise InvalidArgument("NsaConfig", name, repr(getattr(self, name)), expected)


class Phi(nn.Module):
    """Compresses blocks of keys or values; weights are shared by the kv heads.

    Args:
        config: of the layer.
        dim: head dim of what is compressed.
    """

    def __init__(self, config: NsaConfig, dim: int) -> None:
        super().__init__()
        self.method, self.block, self.stride = config.phi, config.block, config.stride
        flat = config.block * dim
        self.pe = nn.Parameter(torch.randn(config.block, dim) * 0.02)
        self.w1: Tensor | None = None
        self.b1: Tensor | None = None
        self.w2: Tensor | None = None
        self.b2: Tensor | None = None
        if config.phi != "mean":
            self.w1 = nn.Parameter(torch.randn(flat, dim) * flat**-0.5)
        if config.phi == "mlp":
            self.b1 = nn.Parameter(torch.zeros(dim))
            self.w2 = nn.Parameter(torch.randn(dim, dim) * dim**-0.5)
            self.b2 = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, Hkv, D]` -> `[B, Nc, Hkv, D]`."""
        return nsa.compress(
            x, self.w1, self.b1, self.w2, self.b2, self.pe,
            method=self.method, block=self.block, stride=self.stride,
        )  # fmt: skip


class NativeSparseAttention(nn.Module):
    """Attention layer with three branches, each with its own keys and values.

    Args:
        config: sizes and options.
    """

    def __init__(self, config: NsaConfig) -> None:
        super().__init__()
        self.config = config
        kv = 3 * config.kv_heads * (config.dk + config.dv)
        self.q = nn.Linear(config.dim, config.heads * config.dk, bias=False)
        self.kv = nn.Linear(config.dim, kv, bias=False)
        self.gate = nn.Linear(config.dim, config.heads * 3)
        self.out = nn.Linear(config.heads * config.dv, config.dim, bias=False)
        self.phi_k, self.phi_v = Phi(config, config.dk), Phi(config, config.dv)

    def forward(self, x: Tensor, cache: LayerCache | None = None, position: int = 0) -> Tensor:
        """`[B, S, dim]` -> `[B, S, dim]`.

        Args:
            x: new tokens' states.
            cache: keys and values of earlier tokens; new ones are added to it.
            position: how many tokens the cache holds.
        """
        q, k, v, gates = self.project(x, position)
        branches: dict[str, Any] = self.keys_and_values(k, v, cache, position)
        o = nsa.nsa_attention(q, **branches, gates=gates, **self.geometry)
        y: Tensor = self.out(o.flatten(-2))
        return y

    @property
    def geometry(self) -> dict[str, Any]:
        """The op's scalar arguments."""
        c = self.config
        return {
            "block": c.block,
            "stride": c.stride,
            "select_block": c.select_block,
            "num_selected": c.num_selected,
            "window": c.window,
        }

    def project(
        self, x: Tensor, position: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor], Tensor]:
        """q `[B, S, Hq, Dk]`, keys and values of the branches, gates `[B, S, Hq, 3]`."""
        c = self.config
        b, s, _ = x.shape
        angles = rotary_angles(s, position, c.dk, c.rope_base, x.device)
        q = rotate(self.q(x).view(b, s, c.heads, c.dk), angles)
        packed = self.kv(x).view(b, s, 3, c.kv_heads, c.dk + c.dv)
        k, v = packed.split((c.dk, c.dv), -1)
        keys = rotate(k.flatten(2, 3), angles).view(b, s, 3, c.kv_heads, c.dk)
        gates = self.gate(x).sigmoid().view(b, s, c.heads, 3)
        k0, k1, k2 = keys.unbind(2)
        v0, v1, v2 = v.unbind(2)
        return q, (k0, k1, k2), (v0, v1, v2), gates

    def keys_and_values(
        self,
        k: tuple[Tensor, Tensor, Tensor],
        v: tuple[Tensor, Tensor, Tensor],
        cache: LayerCache | None,
        position: int,
    ) -> dict[str, Tensor]:
        """Keys and values of the whole sequence, as `nsa_attention` names them."""
        if cache is not None:
            return cache.append(k, v, position, self.phi_k, self.phi_v)
        return {
            "k_cmp": self.phi_k(k[0]),
            "v_cmp": self.phi_v(v[0]),
            "k_slc": k[1],
            "v_slc": v[1],
            "k_win": k[2],
            "v_win": v[2],
        }

    def selected(self, x: Tensor) -> Tensor:
        """Block ids `[B, S, Hkv, n]` that each token of a whole sequence selects."""
        q, k, v, _ = self.project(x, 0)
        c = self.config
        geometry: dict[str, Any] = {"kv_len": x.shape[1], "block": c.block, "stride": c.stride}
        k_cmp, v_cmp = self.phi_k(k[0]), self.phi_v(v[0])
        _, lse = nsa.compressed_attention(q, k_cmp, v_cmp, **geometry)
        return nsa.select_blocks(
            q, k_cmp, lse, **geometry,
            select_block=c.select_block, num_selected=c.num_selected,
        )  # fmt: skip


class Block(nn.Module):
    """Pre-norm transformer block around `NativeSparseAttention`."""

    def __init__(self, config: NsaConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(config.dim), nn.RMSNorm(config.dim)
        self.attention = NativeSparseAttention(config)
        self.up = nn.Linear(config.dim, 4 * config.dim, bias=False)
        self.down = nn.Linear(4 * config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, cache: LayerCache | None = None, position: int = 0) -> Tensor:
        """`[B, S, dim]` -> `[B, S, dim]`."""
        x = x + self.attention(self.norm1(x), cache, position)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x


class ByteLanguageModel(nn.Module):
    """A byte-level language model: embedding, NSA blocks, tied head.

    Args:
        config: of every layer.
        layers: number of blocks.
    """

    VOCABULARY = 256

    def __init__(self, config: NsaConfig, layers: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(self.VOCABULARY, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(layers))
        self.norm = nn.RMSNorm(config.dim)

    def forward(
        self, tokens: Tensor, caches: list[LayerCache] | None = None, position: int = 0
    ) -> Tensor:
        """Logits of the last token, `[B, 256]`.

        Args:
            tokens: `[B, S]` int64 bytes.
            caches: one per block, see `new_caches`; None: none.
            position: tokens that the caches hold.
        """
        x = self.hidden(tokens, caches, position)
        logits: Tensor = self.norm(x[:, -1]) @ self.embedding.weight.T
        return logits

    def hidden(
        self,
        tokens: Tensor,
        caches: list[LayerCache] | None = None,
        position: int = 0,
        layers: int | None = None,
    ) -> Tensor:
        """States `[B, S, dim]` behind the first `layers` blocks (default: all)."""
        x: Tensor = self.embedding(tokens)
        for i, block in enumerate(self.blocks[:layers]):
            x = block(x, caches[i] if caches is not None else None, position)
        return x

    def new_caches(self, batch: int, capacity: int) -> list[LayerCache]:
        """Empty caches for up to `capacity` tokens."""
        c, weight = self.config, self.embedding.weight
        return [
            LayerCache.empty(
                batch, capacity, c.kv_heads, (c.dk, c.dv),
                block=c.block, stride=c.stride, dtype=weight.dtype, device=weight.device,
            )
            for _ in self.blocks
        ]  # fmt: skip


def rotary_angles(
    count: int, position: int, dim: int, base: float, device: torch.device
) -> Tensor | None:
    """Angles `[count, dim / 2]` of positions `position ...`; None when base is 0."""
    if base == 0:
        return None
    rates = base ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    return (torch.arange(count, device=device) + position)[:, None].float() * rates


def rotate(x: Tensor, angles: Tensor | None) -> Tensor:
    """Rotary position encoding of `[B, S, H, D]`: halves are rotated against each other."""
    if angles is None:
        return x
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
