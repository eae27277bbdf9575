"""Backends with one defect each, and a place to register them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nsa_neuron.conformance import Place, find_targets
from nsa_neuron.registry import REGISTRY, Supported, Unsupported

Results = tuple[torch.Tensor, ...]
Distort = Callable[[Results, dict[str, Any]], Results]


class Fake:
    """The reference, with its results passed through `distort`.

    Args:
        distort: (results, arguments) -> results.
        hindrance: why it cannot run here.
        only: the ops that it takes; empty: all.
    """

    name = "fake"

    def __init__(
        self,
        distort: Distort = lambda results, values: results,
        hindrance: str = "",
        only: tuple[str, ...] = (),
    ) -> None:
        self.distort, self.hindrance, self.only = distort, hindrance, only

    def modes(self) -> dict[str, str]:
        return {"hw": self.hindrance}

    def supports(self, bound: Any, mode: str) -> Any:
        if self.only and bound.spec.name not in self.only:
            return Unsupported("kernel", f"no kernel for {bound.spec.name}")
        return Supported()

    def lower(self, bound: Any, plan: Any) -> Callable[..., Any]:
        def run(**values: Any) -> Any:
            out = bound.spec.reference(**values)
            results = self.distort(out if isinstance(out, tuple) else (out,), values)
            return results if len(results) > 1 else results[0]

        return run


@contextmanager
def registered(backend: Fake) -> Iterator[Place]:
    """Registers a fake and gives its place."""
    REGISTRY.register(backend)
    try:
        yield find_targets([backend.name])[0]
    finally:
        REGISTRY.unregister(backend.name)
