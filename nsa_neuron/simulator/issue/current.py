"""The core that the current thread simulates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..rules.session import running, violation

if TYPE_CHECKING:
    from .core import NeuronCore


def current_core() -> NeuronCore | None:
    """The core this thread simulates, or None outside a kernel."""
    core: NeuronCore | None = running()
    return core


def require_core(what: str) -> NeuronCore:
    """The current core; outside a kernel an error that names the API.

    Raises:
        UsageError: no kernel is being simulated.
    """
    core: NeuronCore | None = running()
    if core is None:
        raise violation(
            "usage",
            "called outside a kernel",
            instruction=what,
            hint="decorate the function with @nki.jit; call it through nki.simulate(kernel)(...)",
        )
    return core
