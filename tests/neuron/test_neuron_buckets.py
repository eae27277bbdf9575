"""Calls that are filled up to a few lengths give what they would give as they are."""

from __future__ import annotations

import pytest
import torch
from judged import complete, results, within_budget

from nsa_neuron.backends import neuron
from nsa_neuron.backends.neuron import buckets
from nsa_neuron.ops import get

pytestmark = pytest.mark.sim


def test_lengths_are_few_and_near():
    found = {tokens: buckets.of(tokens) for tokens in range(1, 70_000)}
    assert all(tokens <= longer for tokens, longer in found.items())
    assert all(longer * 8 <= tokens * 9 for tokens, longer in found.items() if tokens > 128)
    assert len(set(found.values())) == 1 + 8 * 9 + 1  # 128; to 65,536; one beyond
    assert [found[n] for n in (1, 128, 129, 144, 145, 1024, 1025, 65536)] == [
        128, 128, 144, 144, 160, 1024, 1152, 65536,
    ]  # fmt: skip
    assert found == {tokens: buckets.of(longer) for tokens, longer in found.items()}


@pytest.mark.parametrize("case_name", ["packed", "decode"])
def test_packed_calls_and_decode_stay(case_name):
    name = "decode" if case_name == "decode" else "attention"
    spec = get(name)
    case = next(c for c in spec.cases if name == "decode" or "packed" in c.name)
    bound = spec.bind(spec.arguments(case, torch.float32))
    assert buckets.padding(bound) == 0


def cases():
    """Of each op with kernels a case that is filled up, and one with T > S if there is one."""
    for name in neuron.OPS:
        known = [c for c in get(name).cases if {"smoke", "edge"} & set(c.tags)]
        fitting = [c for c in known if not c.lengths]
        longer = [c for c in fitting if c.size("T") > c.sizes.get("S", c.size("T"))]
        chosen = {case.name: case for case in [*fitting[:1], *longer[:1]] if name != "decode"}
        yield from (pytest.param(name, case, id=f"{name}-{case.name}") for case in chosen.values())


@pytest.mark.parametrize(("name", "case"), list(cases()))
def test_filled_up_calls_are_right(name, case):
    """On the simulator, which takes calls as they are unless it is asked like this."""
    spec = get(name)
    given = complete(name, spec.arguments(case, torch.float32), torch.float32)
    bound = spec.bind(given)
    verdict = neuron.BACKEND.supports(bound, "sim")
    seen = []

    def launch(**values):
        for arg in spec.tensors:
            if arg.dtype == "i32" and values[arg.name] is not None:
                assert (values[arg.name][:, given["q"].shape[1] :] == buckets.NO_BLOCK).all()
        seen.append(spec.bind(values))
        return neuron.BACKEND.lower(seen[-1], verdict.plan)(**values)

    with torch.no_grad():
        found = buckets.bucketed(spec, launch)(**given)
    within_budget(name, given, results(found))
    symbol = "S" if "S" in bound.sizes else "T"
    assert [b.sizes[symbol] for b in seen] == [buckets.of(bound.sizes[symbol])]
    if "S" in bound.sizes and "T" in bound.sizes:
        assert seen[0]["T"] - seen[0]["S"] == bound["T"] - bound["S"]
