"""Layers against what they mean, computed by hand: complex numbers, loops, one parameter at a time.

Nothing of `nsa_neuron.nn` is used on the other side, and no op of it: a layer that is compared with
itself (whole, chunked, packed) would pass with a mirrored rotation or without its gates.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nsa_neuron.nn import NativeSparseAttention, NsaConfig
from nsa_neuron.nn.attention import attention_layer
from nsa_neuron.nn.rotary import block_positions, rotate, token_positions

sys.path.append(str(Path(__file__).parents[1] / "reference"))
import naive_nsa as naive

CONFIG = NsaConfig(
    dim=6, heads=4, kv_heads=2, dk=4, dv=3, block=4, stride=2, select_block=8, num_selected=3,
    num_initial=1, num_local=1, window=5, rope_base=100.0,
)  # fmt: skip
TOKENS = 23


def turned(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Channel j and j + D/2 are one complex number, turned by position * base^(-2j/D)."""
    half = x.shape[-1] // 2
    numbers = torch.complex(x[..., :half].double(), x[..., half:].double())
    rates = torch.tensor([base ** (-2 * j / x.shape[-1]) for j in range(half)])
    angles = positions.double()[..., None, None] * rates.double()
    turned = numbers * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize("base", [100.0, 10_000.0])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_rotary_is_multiplication_by_a_complex_number_of_length_one(
    base, batched, recorded
) -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=recorded)
    before = x.detach().clone()
    positions = torch.tensor([[0, 1, 7, 100, 1000], [3, 2, 1, 0, 9]])
    if not batched:
        positions = positions[0]
    with torch.set_grad_enabled(recorded):
        found = rotate(x, positions, base)
    torch.testing.assert_close(found, turned(x, positions, base), rtol=0, atol=1e-3)
    assert torch.equal(x, before)  # what a hook of the projection may have kept


def test_rotary_is_the_same_whether_autograd_records_it_or_not() -> None:
    """Two ways to write it, of the same products; a fused one may round differently."""
    x, at = torch.randn(2, 70, 3, 8), torch.arange(70) * 100
    recorded = rotate(x.clone().requires_grad_(), at, 1000.0).detach()
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            plain = rotate(x, at, 1000.0)
            one = torch.func.vmap(lambda row: rotate(row[None], at, 1000.0)[0])(x)
        torch.testing.assert_close(plain, recorded, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(one, recorded, rtol=1e-6, atol=1e-6)
    _, along = torch.func.jvp(lambda y: rotate(y, at, 1000.0), (torch.zeros_like(x),), (x,))
    torch.testing.assert_close(along, recorded, rtol=1e-6, atol=1e-6)  # it is linear


def test_rotary_by_hand() -> None:
    """A quarter turn of the fastest pair; the slower one turns base^(-1/2) as far."""
    x = torch.tensor([1.0, 2.0, 0.0, 0.0]).view(1, 1, 1, 4)
    one = rotate(x, torch.tensor([1]), 10_000.0).flatten()
    wanted = [math.cos(1), 2 * math.cos(0.01), math.sin(1), 2 * math.sin(0.01)]
    torch.testing.assert_close(one, torch.tensor(wanted))
    assert torch.equal(rotate(x, torch.tensor([0]), 10_000.0), x)
    assert torch.equal(rotate(x, torch.tensor([5]), 0.0), x)


def test_rotated_products_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(a: int, b: int) -> float:
        at = (rotate(x, torch.tensor([p]), 100.0) for x, p in ((q, a), (k, b)))
        return float((next(at) * next(at)).sum())

    assert product(9, 4) == pytest.approx(product(25, 20), abs=1e-5)
    assert abs(product(9, 4) - product(4, 9)) > 1e-3, "a reflection would not tell them apart"


def test_positions_of_packed_tokens_and_blocks() -> None:
    edges = torch.tensor([0, 3, 9, 15], dtype=torch.int32)
    device = torch.device("cpu")
    assert token_positions(15, None, device).tolist() == list(range(15))
    assert token_positions(15, edges, device).tolist() == [0, 1, 2, *range(6), *range(6)]
    assert block_positions(6, 4, 2, None, device).tolist() == [3, 5, 7, 9, 11, 13]
    assert block_positions(6, 4, 2, edges, device).tolist()[:4] == [3, 5, 3, 5]


def heads(x: Tensor, weight: Tensor, count: int, bias: Tensor | float = 0.0) -> Tensor:
    """`[S, dim]` by a weight `[count * D, dim]`, plus a bias -> `[S, count, D]`."""
    return torch.stack([weight @ row + bias for row in x]).view(len(x), count, -1)


def normed(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """Each head's vector divided by its root mean square, times a weight."""
    return x if weight is None else x / (x.square().mean(-1, True) + epsilon).sqrt() * weight


def phi(weights: dict[str, Tensor], method: str, config: NsaConfig):
    def of(block: Tensor, head: int) -> Tensor:
        block = block + weights["pe"]
        if method == "mean":
            return block.mean(0)
        own = weights
        if config.phi_per_head:
            own = {name: p if name == "pe" else p[head] for name, p in weights.items()}
        hidden = block.flatten() @ own["w1"]
        if method == "linear":
            return hidden
        return naive.gelu(hidden + own["b1"]) @ own["w2"] + own["b2"]

    return lambda x: naive.compress(x, of, config.block, config.stride)


def by_hand(layer: NativeSparseAttention, x: Tensor) -> Tensor:
    """The layer's output for one sequence `[S, dim]`, from its parameters by name."""
    c, at = layer.config, {name: p.detach() for name, p in layer.named_parameters()}
    position = torch.arange(len(x))
    q = heads(x, at["q.weight"], c.heads, at.get("q.bias", 0.0))
    q = turned(normed(q, at.get("q_norm.weight"), c.qk_norm), position, c.rope_base)
    sets = 1 if c.shared_kv else 3
    kv = heads(x, at["kv.weight"], c.kv_heads * sets, at.get("kv.bias", 0.0))
    kv = kv.view(len(x), c.kv_heads, sets, c.dk + c.dv).transpose(1, 2)
    keys = normed(kv[..., : c.dk], at.get("k_norm.weight"), c.qk_norm)
    (k1, v1), (k2, v2), (k3, v3) = (
        (keys[:, i % sets], kv[:, i % sets, :, c.dk :]) for i in range(3)
    )
    of = {
        side: phi(
            {n.rpartition(".")[2]: p for n, p in at.items() if n.startswith(f"phi_{side}.")},
            c.phi, c,
        )
        for side in "kv"
    }  # fmt: skip
    if c.rope == "before":
        k_cmp = of["k"](turned(k1, position, c.rope_base))
    else:
        ends = torch.tensor(
            [s + c.block - 1 for s in naive.block_starts(len(x), c.block, c.stride)]
        )
        k_cmp = turned(of["k"](k1), ends, c.rope_base)
    o_cmp, _ = naive.attend(
        q, k_cmp, of["v"](v1), naive.complete(c.block, c.stride, len(x)), 0, None
    )
    scores = naive.importance(q, k_cmp, len(x), 0, c.block, c.stride, c.select_block, None)
    ids = naive.select(scores, 0, c.select_block, c.num_selected, c.num_initial, c.num_local)
    seen = naive.chosen(torch.tensor(ids), c.select_block, 0)
    o_slc, _ = naive.attend(q, turned(k2, position, c.rope_base), v2, seen, 0, None)
    near = naive.windowed(c.window)
    o_win, _ = naive.attend(q, turned(k3, position, c.rope_base), v3, near, 0, None)
    logits = heads(x, at["gate.weight"], c.heads) + at["gate.bias"].view(c.heads, 3)
    gates = 1 / (1 + torch.exp(-logits))
    o = naive.gated([o_cmp, o_slc, o_win], gates)
    return o.flatten(1) @ at["out.weight"].T


def awake(layer: torch.nn.Module) -> torch.nn.Module:
    """The layer with every parameter of order one: at its start, gates and biases are near 0."""
    gen = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=gen, dtype=torch.float64))
    return layer


@pytest.mark.parametrize(
    "change",
    [
        {}, {"phi": "linear", "rope": "before"}, {"phi": "mean", "shared_kv": True},
        {"phi": "mlp", "shared_kv": True, "rope": "before", "num_local": 2},
        {"phi": "linear", "phi_per_head": True}, {"phi": "mlp", "phi_per_head": True},
        {"qkv_bias": True, "qk_norm": 0.1}, {"select_block": 4},
        {"num_selected": 2, "num_initial": 0},  # of three blocks
    ],
    ids=str,
)  # fmt: skip
def test_a_layer_is_what_its_parameters_say(change) -> None:
    layer = awake(NativeSparseAttention(replace(CONFIG, **change)).double())
    x = torch.randn(1, TOKENS, CONFIG.dim, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], by_hand(layer, x[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["full", "window"])
def test_a_softmax_layer_is_what_its_parameters_say(kind) -> None:
    layer, c = awake(attention_layer(CONFIG, kind).double()), CONFIG
    x = torch.randn(1, TOKENS, c.dim, dtype=torch.float64)
    at, position = dict(layer.named_parameters()), torch.arange(TOKENS)
    q = turned(heads(x[0], at["q.weight"], c.heads), position, c.rope_base)
    kv = heads(x[0], at["kv.weight"], c.kv_heads)
    k, v = turned(kv[..., : c.dk], position, c.rope_base), kv[..., c.dk :]
    seen = naive.causal if kind == "full" else naive.windowed(c.window)
    o, _ = naive.attend(q, k, v, seen, 0, None)
    wanted = o.flatten(1) @ at["out.weight"].T
    torch.testing.assert_close(layer(x)[0], wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="kind"):
        attention_layer(CONFIG, "other")


def test_every_gate_is_the_sigmoid_of_its_own_logit() -> None:
    """With one gate's bias at -40 and the others at +40 the other two branches are summed."""
    layer = awake(NativeSparseAttention(CONFIG).double())
    x = torch.randn(1, TOKENS, CONFIG.dim, dtype=torch.float64)
    with torch.no_grad():
        layer.gate.weight.zero_()
        parts = []
        for open_ in range(3):
            layer.gate.bias.copy_(
                torch.tensor([40.0 if i % 3 == open_ else -40.0 for i in range(12)])
            )
            parts.append(layer(x))
        layer.gate.bias.fill_(40.0)
        torch.testing.assert_close(layer(x), sum(parts), rtol=1e-9, atol=1e-9)
        layer.gate.bias.zero_()
        torch.testing.assert_close(layer(x), sum(parts) / 2, rtol=1e-9, atol=1e-9)
        assert all(bool(part.abs().max() > 1e-3) for part in parts)
