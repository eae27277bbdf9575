"""Every planted fault is refused by the right rule, its twin passes, and no rule is left out."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path

import pytest
from planted import FAULTS
from told import held, told

from nsa_neuron.simulator import SimulationError
from nsa_neuron.simulator.rules.table import RULES

MODULES = ("placement", "pe", "elementwise", "dma", "memory", "control")
for _module in MODULES:
    importlib.import_module(f"faults_{_module}")

# Rules that no kernel can be planted for, and why.
UNPLANTED: dict[str, str] = {}


def everything(run):
    """All relaxed violations of a run."""
    return [e.rule for r in run.runs for core in r.cores for e in core.relaxed]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.rule}-{f.name}")
def test_wrong_is_refused_by_its_rule_at_its_line(fault):
    for _ in range(2):  # the second time through the cache of checks
        with pytest.raises(SimulationError) as caught:
            fault.run(True)
        error = caught.value
        assert error.rule == fault.rule, error
        assert error.source == RULES[fault.rule].source
        assert type(error) is RULES[fault.rule].error
        assert told(error) == held(Path(__file__).parent)[fault.name]
        if error.location is not None:
            assert "/rules/" in error.location.filename, error


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.rule}-{f.name}")
def test_right_passes(fault):
    assert not everything(fault.run(False))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.rule}-{f.name}")
def test_wrong_breaks_no_other_rule(fault):
    """With its rule relaxed it runs and says so, or cannot go on for the same rule's sake."""
    try:
        broken = everything(fault.run(True, relax=(fault.rule, *fault.follows)))
    except SimulationError as error:
        assert error.rule in (fault.rule, *fault.follows), error
    else:
        assert set(broken) == {fault.rule, *fault.follows}


def test_every_rule_has_a_planted_fault():
    planted = Counter(fault.rule for fault in FAULTS)
    missing = RULES.keys() - planted.keys() - UNPLANTED.keys()
    assert not missing, f"rules without a planted fault: {sorted(missing)}"
    assert not planted.keys() & UNPLANTED.keys()
    assert UNPLANTED.keys() <= RULES.keys()
    assert len(FAULTS) >= 60 and len({f.name for f in FAULTS}) == len(FAULTS)
