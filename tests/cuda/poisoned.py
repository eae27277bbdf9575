"""Fills new tensors with NaN (-77 for integers), so that an element no kernel writes shows."""

from __future__ import annotations

import pytest
import torch


def _poison(x: torch.Tensor) -> torch.Tensor:
    return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-77)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, new_empty, like = torch.empty, torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poison(like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: _poison(new_empty(*a, **k)))
