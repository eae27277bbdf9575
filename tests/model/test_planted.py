"""Facts planted in a document: where they are, what is asked, and what the shipped model finds."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from tiny import model

from nsa_neuron import demo, planted
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.nn.checkpoint import RECALL, load_checkpoint
from nsa_neuron.training import evaluate
from nsa_neuron.training.presets import task_of

NET = model(("nsa", "nsa"), torch.float32)


def test_answers_and_passages_are_the_model_s_own():
    found = planted.plant(NET, demo.document()[:400], facts=3, seed=2)
    facts = re.findall(rb"[A-M][N-Z]", found.text[:394])
    assert len(facts) == 3 and not re.search(rb"[A-Z]", re.sub(rb"[A-M][N-Z]", b"", found.text))
    assert [a.place for a in found.answers] == sorted(a.place for a in found.answers)
    with torch.no_grad():
        logits = NET(demo.as_tokens(found.text))[0]
    for answer in found.answers:
        assert found.text[answer.place : answer.place + 2] == answer.fact in facts
        assert found.text[answer.asked : answer.asked + 1] == answer.fact[:1]
        assert answer.said == bytes([int(logits[answer.asked].argmax())])
        assert answer.right == (answer.said == answer.fact[1:])
        for view, passage in answer.seen:
            assert view.query == answer.asked and passage in view.picked
            assert passage.first <= answer.place <= passage.last
    assert found.right == sum(a.right for a in found.answers)
    assert f"{found.right} of 3" in planted.report(found)


def test_a_document_that_is_too_short():
    with pytest.raises(InvalidArgument, match="length"):
        planted.plant(NET, b"short", facts=3)


def test_the_shipped_model_finds_facts_that_windows_cannot_reach():
    """Most of those 4K bytes back; guessing a second letter is right one time in thirteen."""
    net, _ = load_checkpoint(RECALL)
    assert RECALL.stat().st_size < 2**20
    found = [planted.plant(net, demo.document()[:4096], seed=seed) for seed in range(3)]
    reach = len(net.kinds) * net.config.window
    assert all(a.asked - a.place > reach for one in found for a in one.answers)
    assert sum(one.right for one in found) >= 22  # of 24
    picked = [a for one in found for a in one.answers if a.seen]
    assert len(picked) >= 12


def test_the_shipped_model_recalls_at_twice_the_longest_text_of_its_first_runs():
    """Its card says 99 % with 8,192 bytes; windows are at chance, one in thirteen."""
    net, _ = load_checkpoint(RECALL)
    task = replace(task_of("needle"), rounds=1, near=len(net.kinds) * net.config.window)
    assert evaluate(net, task, 4, 8192)["accuracy"] >= 0.95  # 31 of 32
