"""Launches happen on the device that the tensors lie on, whichever is current."""

from __future__ import annotations

import pytest
import torch

from nsa_neuron.backends import cuda


@pytest.fixture
def entered(monkeypatch):
    """The devices that are made current, with device 1 current at first; no GPU is asked."""
    seen = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            seen.append(self.device)

        def __exit__(self, *error):
            seen.append("left")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", Device)
    return seen


@pytest.mark.parametrize(("index", "switches"), [(1, False), (0, True), (3, True)])
def test_another_device_is_made_current_and_left(entered, index, switches):
    def launch(**values):
        return values, list(entered)

    call = cuda._on_device(launch, torch.device("cuda", index))
    values, during = call(x=1)
    assert values == {"x": 1}
    assert during == [torch.device("cuda", index)] * switches
    assert entered == during + ["left"] * switches
