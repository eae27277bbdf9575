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


def steps_of(cache, monkeypatch):
    """Sizes and counts of the steps that a cache makes."""
    seen, step = [], cache.step
    monkeypatch.setattr(cache, "step", lambda *a: seen.append(a) or step(*a))
    return seen


def test_prompts_are_read_in_chunks_and_the_last_byte_is_left_out(monkeypatch):
    net, texts = model(("window",)), [b"a text of 20 bytes!!", b"seven b"]
    cache = net.new_cache(2, 23)
    seen = steps_of(cache, monkeypatch)
    written = generate(net, texts, 4, cache=cache, chunk=8)
    assert seen == [(8, [8, 0]), (8, [8, 3]), (4, [4, 4]), (1,), (1,), (1,)]
    assert cache.lengths == [23, 10] and [len(text) for text in written] == [4, 4]
    with torch.no_grad():
        for text, new in zip(texts, written, strict=True):
            for i, byte in enumerate(new):
                tokens = torch.tensor([list(text + new[:i])])
                assert int(net(tokens)[0, -1].argmax()) == byte
    more = generate(net, texts, 1, cache=net.new_cache(2, 21))
    assert more == [new[:1] for new in written]


def test_a_cache_that_holds_what_prompts_continue():
    net, text = model(("nsa",)), b"a text that goes on and on"
    (whole,) = generate(net, [text], 6)
    cache = net.new_cache(1, 40)
    (first,) = generate(net, [text], 3, cache=cache)
    (rest,) = generate(net, [first[-1:]], 3, cache=cache)
    assert first + rest == whole
    with pytest.raises(InvalidArgument, match="for 1 sequences; it must be for the 2 prompts"):
        generate(net, [b"a", b"b"], 1, cache=cache)


def test_seeds_and_compiled_models_are_used():
    net, texts = model(("window",)), [b"abc"]
    hot = [generate(net, texts, 12, sampling=Sampling(1.0, seed=seed)) for seed in (3, 3, 4)]
    assert hot[0] == hot[1] != hot[2]
    calls = []

    def forward(tokens, step, last):
        calls.append((tokens.shape[1], last))
        return net(tokens, step, last=last)

    assert generate(net, texts, 3, forward=forward) == generate(net, texts, 3)
    assert calls == [(3, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize(("name", "value"), [("count", 0), ("chunk", 0), ("prompts", [])])
def test_numbers_out_of_range(name, value):
    given = {"prompts": [b"a", b"bc"], "count": 1, "chunk": 1, name: value}
    with pytest.raises(InvalidArgument) as caught:
        generate(model(("window",)), **given)
    assert caught.value.argument == name
    with pytest.raises(InvalidArgument, match="none empty"):
        generate(model(("window",)), [b"a", b""], 1)


@pytest.mark.parametrize(
    "given",
    [{"temperature": 0}, {"top_k": 0}, {"top_p": 1}, {"seed": -(2**63)}, {"seed": 2**63 - 1}],
    ids=str,
)
def test_limits_of_sampling_are_taken(given):
    made = Sampling(**given)
    assert {name: getattr(made, name) for name in given} == given
