"""`nsa_attention` out of parts: every part is asked, and a refusal names its part and reason."""

from __future__ import annotations

import pytest
import torch

from nsa_neuron.backends import composite
from nsa_neuron.ops import get
from nsa_neuron.ops.nsa_attention import PARTS
from nsa_neuron.registry import Supported, Unsupported

WHOLE = [(whole, part) for whole, side in composite.WHOLE.items() for part in PARTS[side]]


def bound_of(name: str):
    spec = get(name)
    case = next(case for case in spec.cases if case.name == "batch2_kv2")
    return spec.bind(spec.arguments(case, torch.float32))


@pytest.mark.parametrize(("whole", "refusing"), WHOLE)
def test_a_part_that_refuses_refuses_the_whole_by_its_own_rule(whole: str, refusing: str) -> None:
    def supports(bound):
        if bound.spec.name == refusing:
            return Unsupported("head_dim", f"{bound['Dk']} is too much")
        return Supported(bound.spec.name)

    verdict = composite.supports(bound_of(whole), supports)
    assert verdict == Unsupported("head_dim", f"its part {refusing}: 32 is too much")


@pytest.mark.parametrize("whole", composite.WHOLE)
def test_each_part_is_asked_once_and_keeps_its_plan(whole: str) -> None:
    asked = []

    def supports(bound):
        asked.append(bound.spec.name)
        return Supported(("plan of", bound.spec.name))

    verdict = composite.supports(bound_of(whole), supports)
    parts = PARTS[composite.WHOLE[whole]]
    assert tuple(asked) == parts
    assert verdict == Supported({part: ("plan of", part) for part in parts})


@pytest.mark.parametrize("whole", composite.WHOLE)
def test_the_whole_runs_the_lowerings_of_its_parts_by_their_plans(whole: str) -> None:
    """And gives what the reference gives."""
    spec, bound = get(whole), bound_of(whole)
    plans = {part: object() for part in PARTS[composite.WHOLE[whole]]}
    lowered, ran = {}, []

    def lower(part, plan):
        lowered[part.spec.name] = plan
        assert part.sizes == bound.sizes and part.dtype == bound.dtype

        def run(**values):
            ran.append(part.spec.name)
            return part.spec.reference(**values)

        return run

    values = spec.arguments(next(c for c in spec.cases if c.name == "batch2_kv2"), torch.float32)
    got = composite.lower(bound, plans, lower)(**values)
    assert lowered == plans and sorted(ran) == sorted(plans)
    torch.testing.assert_close(got, spec.reference(**values), rtol=0, atol=0, equal_nan=True)
