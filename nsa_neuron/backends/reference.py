"""The reference as a backend: plain torch, every op, every dtype, any device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nsa_neuron.registry import Supported, Verdict

if TYPE_CHECKING:
    from nsa_neuron.registry import Lowered
    from nsa_neuron.spec import Bound


class ReferenceBackend:
    """Runs each op's own reference."""

    name = "reference"

    def modes(self) -> dict[str, str]:
        return {"eager": ""}

    def supports(self, bound: Bound, mode: str) -> Verdict:
        return Supported()

    def lower(self, bound: Bound, plan: Any) -> Lowered:
        return bound.spec.reference


BACKEND = ReferenceBackend()
