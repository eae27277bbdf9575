"""A backend that accepts everything, counts its calls, and can be told to lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nsa_neuron.registry import REGISTRY, Supported, use_backend


class Spy:
    """Runs the references and counts them."""

    name = "spy"

    def __init__(self, twist: Callable[[Any], Any] = lambda results: results) -> None:
        self.calls = 0
        self.twist = twist

    def modes(self) -> dict[str, str]:
        return {"eager": ""}

    def supports(self, bound: Any, mode: str) -> Supported:
        return Supported()

    def lower(self, bound: Any, plan: Any) -> Callable[..., Any]:
        def run(**values: Any) -> Any:
            self.calls += 1
            return self.twist(bound.spec.reference(**values))

        return run


@contextmanager
def spying(twist: Callable[[Any], Any] = lambda results: results) -> Iterator[Spy]:
    """Every call inside goes to a fresh spy."""
    spy = Spy(twist)
    REGISTRY.register(spy)
    try:
        with use_backend("spy"):
            yield spy
    finally:
        REGISTRY.unregister("spy")
