"""The module and its cache: whole prefill = chunks = token by token (rule 12)."""

from __future__ import annotations

import pytest
import torch

from nsa_neuron.cache import LayerCache
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.nn import ByteLanguageModel, NativeSparseAttention, NsaConfig

TINY = {"block": 8, "stride": 4, "select_block": 16, "num_selected": 4, "window": 12}


def config(**changes):
    sizes = {"dim": 16, "heads": 4, "kv_heads": 2, "dk": 8, "dv": 6, **TINY}
    return NsaConfig(**{**sizes, **changes})


def fed_in(layer, x, sizes):
    """Output of a layer that gets its input in chunks of the given sizes."""
    c = layer.config
    cache = LayerCache.empty(
        x.shape[0], x.shape[1], c.kv_heads, (c.dk, c.dv),
        block=c.block, stride=c.stride, dtype=x.dtype,
    )  # fmt: skip
    parts, position = [], 0
    for size in sizes:
        parts.append(layer(x[:, position : position + size], cache, position))
        position += size
    return torch.cat(parts, 1)


@pytest.mark.parametrize("phi", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("sizes", [[1] * 45, [7, 1, 8, 20, 9], [44, 1], [45]])
def test_chunks_equal_the_whole(phi, sizes):
    torch.manual_seed(0)
    layer = NativeSparseAttention(config(phi=phi)).double()
    x = torch.randn(2, 45, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fed_in(layer, x, sizes), layer(x), rtol=1e-9, atol=1e-9)


def test_a_compressed_block_appears_exactly_when_it_is_complete():
    cache = LayerCache.empty(1, 20, 1, (4, 4), block=8, stride=4)
    blocks = []
    for position in range(20):
        new = tuple(torch.ones(1, 1, 1, 4) for _ in range(3))
        blocks.append(cache.append(new, new, position, phi_of, phi_of)["k_cmp"].shape[1])
    assert blocks == [0] * 7 + [1] * 4 + [2] * 4 + [3] * 4 + [4]


def phi_of(x):
    """As many rows as there are complete blocks of 8 tokens, every 4."""
    return x[:, : max(0, (x.shape[1] - 8) // 4 + 1)]


def test_a_full_cache_says_so():
    cache = LayerCache.empty(1, 4, 1, (4, 4), block=8, stride=4)
    new = tuple(torch.zeros(1, 5, 1, 4) for _ in range(3))
    with pytest.raises(InvalidArgument, match="within 4 tokens") as caught:
        cache.append(new, new, 0, phi_of, phi_of)
    assert caught.value.argument == "k"


def test_every_parameter_learns():
    torch.manual_seed(0)
    model = ByteLanguageModel(config(), 2)
    model(torch.randint(0, 256, (2, 40))).square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_a_small_model_learns_a_repeating_text():
    torch.manual_seed(0)
    model = ByteLanguageModel(config(dim=32, dk=16, dv=16), 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.tensor(list(b"sparse attention " * 4))[None]

    def loss():
        return torch.nn.functional.cross_entropy(model(text[:, :-1]), text[:, -1])

    first = loss().item()
    for _ in range(15):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < first / 4


@pytest.mark.parametrize(
    ("change", "argument"),
    [({"kv_heads": 3}, "kv_heads"), ({"dk": 7}, "dk"), ({"phi": "max"}, "phi")],
)
def test_bad_configurations(change, argument):
    with pytest.raises(InvalidArgument) as caught:
        config(**change)
    assert caught.value.argument == argument


def test_the_future_does_not_matter():
    torch.manual_seed(0)
    layer = NativeSparseAttention(config()).double()
    x = torch.randn(1, 50, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, 30:] = torch.randn(1, 20, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[:, :30], layer(changed)[:, :30], rtol=1e-9, atol=1e-9)
