"""The main job at a small size: every part of it, on the real document."""

from __future__ import annotations

import json

import pytest
import torch

from nsa_neuron import demo
from nsa_neuron.nn import ByteLanguageModel, generate


@pytest.fixture(scope="module")
def result():
    torch._dynamo.reset()
    return demo.run(prompt=700, options={"rest": "eager"})


def test_the_document_is_real_english():
    text = demo.document()
    assert len(text) > 300_000
    assert b'The "assert" statement' in text


def test_compiled_decoding_writes_what_the_plain_model_writes(result):
    torch.manual_seed(demo.SEED)
    model = ByteLanguageModel(demo.CONFIG, demo.LAYERS).eval()
    plain = generate(model, [demo.document()[:700]], 8)
    assert result.written.startswith(demo.printable(plain[0]))


def test_forced_blocks_are_selected_and_texts_are_theirs(result):
    blocks = {row.block: row for row in result.selected}
    last = (700 + demo.DECODE - 1) // 64
    assert {0, last - 1, last} <= set(blocks)
    assert blocks[0].text == demo.printable(demo.document()[:64])
    assert [row.block for row in result.selected] == sorted(blocks)


def test_reports(result):
    text = demo.report(result)
    assert "tokens/s" in text and "cpu:" in text
    assert "tokens     0..63" in demo.selection_report(result)
    assert json.loads(json.dumps(result.to_json()))["prefill"]["tokens"] == 700
