"""A whole model compiled for the simulated Trainium: trained a step, and the demo."""

from __future__ import annotations

import pytest
import torch

from nsa_neuron import demo, explain
from nsa_neuron.nn import ByteLanguageModel, NsaConfig

pytestmark = pytest.mark.sim

TRN2 = {"target": "trn2", "mode": "sim", "rest": "eager"}


def loss_and_gradients(options: dict[str, str]):
    """Loss and parameter gradients of one layer on 70 tokens, and what was compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = ByteLanguageModel(NsaConfig(dim=128, heads=4, kv_heads=1, dk=32, dv=32), 1)
    compiled = torch.compile(model, backend="nsa_neuron", options=options, fullgraph=True)
    loss = compiled(demo.as_tokens(demo.document()[:70])).square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}, explain(compiled)


def test_a_training_step_agrees_with_the_reference():
    loss, grads, explanation = loss_and_gradients(TRN2)
    want, want_grads, _ = loss_and_gradients({"target": "cpu", "rest": "eager"})
    assert {str(choice.target) for choice in explanation.choices} == {"neuron:sim"}
    assert any(choice.op.endswith("_backward") for choice in explanation.choices)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        if want_grads[name] is not None:
            largest = want_grads[name].abs().max().item()
            torch.testing.assert_close(grad, want_grads[name], rtol=0, atol=1e-4 * largest + 1e-9)


def test_the_demo_reads_writes_and_is_modelled(monkeypatch):
    monkeypatch.setattr(demo, "DECODE", 2)
    monkeypatch.setattr(demo, "WARM_UP", 80)
    torch._dynamo.reset()
    result = demo.run(prompt=100, options=TRN2)
    text = demo.report(result)
    assert "neuron:sim" in text and "modelled   nsa ops of prefill" in text
    for stage in ("prefill", "decode"):
        model = result.modelled[stage]
        assert 0 < model.low <= model.central <= model.high and model.launches > 0
