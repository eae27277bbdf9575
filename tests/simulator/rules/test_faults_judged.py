"""The planted-fault suite notices a rule that is not checked, and a fault that plants another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_table as suite
from planted import FAULTS, Fault

FAULT = next(f for f in FAULTS if f.name == "stationary_of_129_columns")
MILD = next(f for f in FAULTS if f.name == "accumulation_without_a_start")  # can run on
OTHER = next(f for f in FAULTS if f.rule == "psum-bank")


def right_only(fault: Fault) -> Fault:
    """What a fault is where its rule is not checked: its wrong version runs through."""
    return replace(fault, run=lambda wrong, **options: fault.run(False, **options))


def wrong_only(fault: Fault) -> Fault:
    """What a fault is where the rule refuses too much: its right version is refused."""
    return replace(fault, run=lambda wrong, **options: fault.run(True, **options))


def at_first_only(fault: Fault) -> Fault:
    """What a fault is where the cache of checks forgets the refusal."""
    runs = iter([True, False])
    return replace(fault, run=lambda wrong, **options: fault.run(next(runs), **options))


def test_a_sound_fault_passes_all_three():
    suite.test_wrong_is_refused_by_its_rule_at_its_line(FAULT)
    suite.test_right_passes(FAULT)
    suite.test_wrong_breaks_no_other_rule(FAULT)


@pytest.mark.parametrize("spoil", [right_only, at_first_only])
def test_a_rule_that_refuses_nothing_is_noticed(spoil):
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        suite.test_wrong_is_refused_by_its_rule_at_its_line(spoil(FAULT))


def test_another_rule_that_refuses_is_noticed():
    with pytest.raises(AssertionError):
        suite.test_wrong_is_refused_by_its_rule_at_its_line(replace(FAULT, rule=OTHER.rule))
    with pytest.raises(AssertionError):
        suite.test_wrong_breaks_no_other_rule(replace(FAULT, follows=()))


def test_a_relaxed_rule_that_is_not_reported_is_noticed():
    with pytest.raises(AssertionError):
        suite.test_wrong_breaks_no_other_rule(right_only(FAULT))


def test_a_rule_that_refuses_too_much_is_noticed():
    with pytest.raises(Exception, match=FAULT.rule):
        suite.test_right_passes(wrong_only(FAULT))


def test_a_right_version_that_breaks_a_relaxed_rule_is_noticed():
    relaxed = replace(MILD, run=lambda wrong: MILD.run(True, relax=(MILD.rule,)))
    with pytest.raises(AssertionError):
        suite.test_right_passes(relaxed)


def test_a_rule_without_a_fault_is_noticed(monkeypatch):
    suite.test_every_rule_has_a_planted_fault()
    monkeypatch.setattr(suite, "FAULTS", [f for f in FAULTS if f.rule != FAULT.rule])
    with pytest.raises(AssertionError, match=FAULT.rule):
        suite.test_every_rule_has_a_planted_fault()
