"""Continuing texts: which bytes may be drawn, and prompts of unequal lengths side by side."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny import model

from nsa_neuron.errors import InvalidArgument, InvalidType
from nsa_neuron.nn.generation import Sampling, generate, prefill

ODDS = (0.15, 0.5, 0.05, 0.3)  # of the bytes 0 to 3; ranked: 1, 3, 0, 2
DRAWS = 2000


def drawn(sampling: Sampling) -> dict[int, float]:
    """Shares of the bytes in many draws."""
    logits = torch.tensor(ODDS).log().expand(DRAWS, -1)
    found = sampling.choose(logits, torch.Generator().manual_seed(0))
    return {token: n / DRAWS for token, n in Counter(found.tolist()).items()}


@pytest.mark.parametrize(
    ("limits", "allowed"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {0, 1, 3}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_p": 0.49}, {1}),
        ({"top_p": 0.51}, {1, 3}),  # the byte with which the sum reaches p is among them
        ({"top_p": 0.79}, {1, 3}),
        ({"top_p": 0.81}, {0, 1, 3}),
        ({"top_p": 0.81, "top_k": 2}, {1, 3}),
        ({"top_p": 0.51, "top_k": 3}, {1, 3}),
    ],
)
def test_only_the_likeliest_are_drawn_in_their_proportions(limits, allowed):
    found = drawn(Sampling(1.0, **limits))
    total = sum(ODDS[token] for token in allowed)
    assert found.keys() == allowed
    assert all(abs(found[token] - ODDS[token] / total) < 0.04 for token in allowed)


def test_temperature_divides_logits_and_zero_takes_the_likeliest():
    roots = [p**0.5 for p in ODDS]
    found = drawn(Sampling(2.0))
    assert all(abs(found[i] - roots[i] / sum(roots)) < 0.04 for i in range(4))
    # p counts the probabilities that are drawn from: 0.39 and 0.3 of the two likeliest.
    assert drawn(Sampling(2.0, top_p=0.5)).keys() == {1, 3}
    assert drawn(Sampling(2.0, top_p=0.35)).keys() == {1}
    assert drawn(Sampling(0.0, top_k=2)) == {1: 1.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("temperature", float("inf")), ("top_k", -1), ("top_p", 0.0),
     ("top_p", 1.1), ("temperature", "hot"), ("top_k", 1.5), ("seed", 2**63), ("seed", True)],
)  # fmt: skip
def test_bad_limits(name, value):
    with pytest.raises(InvalidArgument, match=name):
        Sampling(**{name: value})


@pytest.mark.parametrize("prompts", ["text", ["text"], b"text", [None]])
def test_prompts_that_are_no_list_of_bytes(prompts):
    with pytest.raises(InvalidType, match=r"'prompts'.*a list of bytes, one for each text"):
        generate(model(), prompts, 3)


def test_prompts_of_unequal_lengths_are_each_read_as_alone():
    net, texts = model(), [b"a text of its own, long", b"and", b"another one"]
    cache = net.new_cache(len(texts), 40)
    with torch.no_grad():
        found = prefill(net, texts, cache, chunk=5)
        alone = [net(torch.tensor([list(text)]))[0, -1] for text in texts]
    assert cache.lengths == [len(text) for text in texts]
    torch.testing.assert_close(found, torch.stack(alone), rtol=0, atol=1e-12)
