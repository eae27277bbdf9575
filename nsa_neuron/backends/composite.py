"""`nsa_attention` for backends that have kernels for its parts but none for the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nsa_neuron.ops.nsa_attention import PART_SPECS, PARTS, compose_backward, compose_forward
from nsa_neuron.registry import Supported, Unsupported, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from nsa_neuron.registry import Lowered
    from nsa_neuron.spec import Bound

WHOLE = {
    "nsa_attention": "forward",
    "nsa_attention_forward": "forward",
    "nsa_attention_backward": "backward",
}


def supports(bound: Bound, supports_part: Callable[[Bound], Verdict]) -> Verdict:
    """Supported if every part is; the plan maps each part to its plan."""
    plans = {}
    for name in PARTS[WHOLE[bound.spec.name]]:
        verdict = supports_part(replace(bound, spec=PART_SPECS[name]))
        if isinstance(verdict, Unsupported):
            return Unsupported(verdict.rule, f"its part {name}: {verdict.reason}")
        plans[name] = verdict.plan
    return Supported(plans)


def lower_parts(
    bound: Bound, plans: dict[str, Any], lower_part: Callable[[Bound, Any], Lowered]
) -> dict[str, Lowered]:
    """The lowering of each part by name."""
    return {
        name: lower_part(replace(bound, spec=PART_SPECS[name]), plan)
        for name, plan in plans.items()
    }


def lower(
    bound: Bound, plans: dict[str, Any], lower_part: Callable[[Bound, Any], Lowered]
) -> Lowered:
    """The whole, made of the parts' lowerings."""
    parts = lower_parts(bound, plans, lower_part)
    if bound.spec.direction == "backward":
        return lambda **values: compose_backward(parts.__getitem__, values)
    if len(bound.spec.returns) > 1:  # with what the backward pass needs
        return lambda **values: compose_forward(parts.__getitem__, values)
    return lambda **values: compose_forward(parts.__getitem__, values)[0]
