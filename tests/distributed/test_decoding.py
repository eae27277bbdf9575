"""Prefill and decode with caches that are spread over ranks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from test_tensor_parallel import bytes_of, model
from torch.distributed.device_mesh import init_device_mesh

from nsa_neuron.distributed.decoding import ContextCache
from nsa_neuron.distributed.exchange import counting
from nsa_neuron.errors import InvalidArgument


@torch.no_grad()
def check_decode(prompt, count, changes, kinds, batch=2):
    """Logits behind the prompt and behind each later token are those of the whole model."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = model(kinds, **changes).eval()
    tokens = bytes_of(batch, prompt + count)
    want = whole(tokens)
    cache = ContextCache(copy.deepcopy(whole), mesh)
    got = [cache.prefill(tokens[:, :prompt])]
    got += [cache.step(tokens[:, t : t + 1]) for t in range(prompt, prompt + count)]
    torch.testing.assert_close(torch.stack(got, 1), want[:, prompt - 1 :], rtol=1e-8, atol=1e-8)


@torch.no_grad()
def sizes_and_bytes():
    """Bytes of this rank's cache, and bytes that it sends in a step, for a long prompt."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    net = model(("nsa",), stride=8, window=16).eval()
    cache = ContextCache(net, mesh)
    cache.prefill(bytes_of(1, 1024))
    with counting() as sent:
        cache.step(bytes_of(1, 1))
    return cache.nbytes, dict(sent)


def check_misuse():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cache = ContextCache(model(("nsa",)), mesh)
    with pytest.raises(InvalidArgument, match="behind a prefill"):
        cache.step(bytes_of(1, 1))
    cache.prefill(bytes_of(1, 20))
    with pytest.raises(InvalidArgument, match="20 tokens long"):
        cache.prefill(bytes_of(1, 20))


MIXED = ("nsa", "window", "full")


@pytest.mark.parametrize("prompt", [1, 7, 33, 64, 100])
def test_two_ranks_decode_as_one(two, prompt):
    two(check_decode, prompt, 20, {}, MIXED)


@pytest.mark.parametrize(
    "changes", [{"shared_kv": True}, {"rope": "before", "kv_heads": 1}, {"phi": "mean"}], ids=str
)
def test_options_of_layers(two, changes):
    two(check_decode, 45, 40, changes, ("nsa",))


@pytest.mark.parametrize("prompt", [3, 130])
def test_four_ranks_decode_as_one(four, prompt):
    four(check_decode, prompt, 70, {}, MIXED, 1)


def test_a_rank_holds_its_share_and_sends_partial_results(four):
    found = four(sizes_and_bytes)
    for size, sent in found:
        row = 4 * (8 + 6) * 8  # kv heads, Dk + Dv, float64
        rows = 1024 // 4 + (1024 - 8) // 8 + 1 + 16 + 8  # own ones, blocks, window, unfinished
        assert rows * row <= size < 1.5 * rows * row < 0.6 * 1024 * row
        assert sent == {"decode": 3 * 8 * (6 + 1) * 8}


def test_misuse_is_refused(two):
    two(check_misuse)
