"""The bars of benchmarks are full when everything was measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nsa_neuron.bench import (
    attention,
    decoding,
    native,
    native_memory,
    native_peers,
    native_stages,
    overhead,
    trainium,
)  # fmt: skip

SHAPE = ((2, 1), 8, "float32")
PROBLEMS = [trainium.Problem(x, (8, 2), (24, 16), 0.05) for x in (4096, 8192)]
MEASURES: dict[Any, Callable[[], Any]] = {
    attention: lambda: attention.measure([64, 128, 256]),
    native: lambda: native.measure([64, 65_537], *SHAPE),
    native_memory: lambda: native_memory.measure([64, 65_537], *SHAPE),
    native_peers: lambda: native_peers.measure([64, 96], *SHAPE),
    native_stages: lambda: native_stages.measure([64, 96, 128], *SHAPE),
    overhead: lambda: overhead.measure(["gated_sum", "selected_attention"]),
    trainium: lambda: trainium.measure(PROBLEMS),
    decoding: lambda: decoding.measure(64, [1, 8, 16], (8, 2), (16, 24)),
}
INSIDE = {
    "_times": ([1.0], [1.0]), "_timed": [], "_steps": {}, "rates": [], "decode": [],
    "_in_a_process": "row", "attentions": {}, "_stages": [], "_pair": ([1.0], [1.0]),
    "empty_op": None, "_stage": "row", "_of_batch": [],
}  # fmt: skip
"""What measures something, and what it gives here."""


@pytest.mark.parametrize("module", MEASURES, ids=lambda module: module.BENCH)
def test_progress_is_full_when_everything_was_measured(module: Any, monkeypatch) -> None:
    told: list[Any] = []

    @contextlib.contextmanager
    def progress(name: str, total: int) -> Iterator[Callable[[str], None]]:
        told.append(total)
        yield told.append

    monkeypatch.setattr(module, "progress", progress)
    for name, gives in INSIDE.items():
        if hasattr(module, name):
            monkeypatch.setattr(module, name, lambda *a, gives=gives: gives)
    MEASURES[module]()
    total, *steps = told
    assert len(steps) == total > 1 and len(set(steps)) == total
