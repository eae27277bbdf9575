"""The main job at a small size: every part of it, on the real document."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from nsa_neuron import demo
from nsa_neuron.nn import generate, next_token_loss
from nsa_neuron.nn.checkpoint import SHIPPED, load_checkpoint


@pytest.fixture(scope="module")
def ran():
    """The demo's result, and the warnings that it gave."""
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        return demo.run(prompt=700, options={"rest": "eager"}), [str(w.message) for w in told]


@pytest.fixture(scope="module")
def result(ran):
    return ran[0]


def test_nothing_is_warned_of(ran):
    assert ran[1] == []


def test_the_document_is_real_english():
    text = demo.document()
    assert len(text) > 300_000
    assert b'The "assert" statement' in text


def test_compiled_decoding_writes_what_the_plain_model_writes(result):
    model, _ = load_checkpoint(SHIPPED)
    (plain,) = generate(model, [demo.document()[:700]], 8, sampling=demo.SAMPLING)
    assert result.look.text[700:].startswith(plain)


def test_forced_blocks_are_selected_and_texts_are_theirs(result):
    blocks = {row.block: row for row in result.selected}
    last = (700 + demo.DECODE - 1) // 32
    assert {0, last - 1, last} <= set(blocks)
    assert blocks[0].text == demo.printable(demo.document()[:32])
    assert [row.block for row in result.selected] == sorted(blocks)


def test_reports(result):
    text = demo.report(result)
    assert "tokens/s" in text and "cpu:" in text
    assert "tokens     0..31" in demo.selection_report(result)
    plain = json.loads(json.dumps(result.to_json()))
    assert plain["prefill"]["tokens"] == 700 and len(plain["facts"]) == demo.FACTS
    assert f"planted    {demo.FACTS} facts" in text and "farthest" in text


def test_the_reference_reads_the_same_beside_what_ran_here(result):
    ran = {choice["target"] for choice in result.lowerings["choices"]}
    assert set(result.compared) == {*ran, demo.REFERENCE}
    assert all(rate > 0 for rate in result.compared.values())
    assert "beside     700 tokens" in demo.report(result)
    assert demo.compare(None, b"", {"choices": [{"target": "neuron:sim"}]}) == {}


def test_the_shipped_model_has_learnt():
    """Far below the 2.9 nats a byte that the frequencies of bytes alone give on this text."""
    model, notes = load_checkpoint(SHIPPED)
    assert SHIPPED.stat().st_size < 8 * 2**20 and notes["trained_bytes"] > 10**6
    tokens = demo.as_tokens(demo.document()[:2048])
    with torch.no_grad():
        assert next_token_loss(model(tokens), tokens).item() < 1.5
