"""Small configurations and feeding helpers of the model tests."""

from __future__ import annotations

import torch

from nsa_neuron.nn import ByteLanguageModel, NsaConfig

GEOMETRY = {"block": 8, "stride": 4, "select_block": 16, "num_selected": 4, "window": 12}
SIZES = {"dim": 16, "heads": 4, "kv_heads": 2, "dk": 8, "dv": 6, **GEOMETRY}
MIXED = ("nsa", "window", "full", "nsa")


def config(**changes):
    return NsaConfig(**{**SIZES, **changes})


def model(kinds=("nsa", "nsa"), dtype=torch.float64, seed=0, **changes):
    torch.manual_seed(seed)
    return ByteLanguageModel(config(**changes), kinds).to(dtype).eval()


def bytes_of(*shape, seed=1):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def fed(net, tokens, sizes, cache):
    """Logits of tokens that come in chunks of the given sizes."""
    parts, at = [], 0
    for size in sizes:
        with cache.step(size) as step:
            parts.append(net(tokens[:, at : at + size], step))
        at += size
    return torch.cat(parts, 1)
