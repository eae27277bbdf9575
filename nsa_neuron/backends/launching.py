"""What the launchers of every backend take for granted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsa_neuron.registry import Lowered
    from nsa_neuron.spec import OpSpec


def with_scale(spec: OpSpec, launch: Lowered) -> Lowered:
    """Fills in the default scale, 1 / sqrt(Dk), where the op has one; launchers take a number."""
    if not spec.takes_scale:
        return launch

    def call(**values: Any) -> Any:
        if values["scale"] is None:
            values["scale"] = values["q"].shape[-1] ** -0.5
        return launch(**values)

    return call
