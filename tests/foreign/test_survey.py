"""The survey's own machinery: limits, rounds, rules relaxed in turn, an atomic record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from nsa_neuron.simulator import SimulationError

from . import survey
from .manager import Outcome


@dataclass(frozen=True)
class Stub:
    """Stands for a test function; what a run of it does depends on the relaxed rules."""

    does: Any

    def run(self, pick: int, relax: Any = ()) -> Outcome:
        return self.does(pick, set(relax))


def refusing(*rules: str, then: str = "") -> Any:
    def run(pick: int, relax: set[str]) -> Outcome:
        for rule in rules:
            if rule not in relax:
                raise SimulationError("no\nmore", rule=rule)
        return Outcome(instructions=5, results=1, failures=[then] if then else [])

    return run


def test_a_refused_case_runs_again_without_its_rules():
    entry = survey.attempt(Stub(refusing("enum", "dge")), 0)
    assert (entry["status"], entry["rule"], entry["message"]) == ("refused", "enum", "no")
    assert entry["relaxed"]["rules"] == {"enum": "no", "dge": "no"}
    assert entry["relaxed"]["status"] == "agrees" and survey.outcome_of(entry) == "relaxed"


def test_numbers_that_differ_without_the_rule_differ():
    entry = survey.attempt(Stub(refusing("enum", then="out: error 3")), 0)
    assert entry["status"] == "refused" and survey.outcome_of(entry) == "differs"


def test_a_run_that_issues_nothing_compares_nothing():
    assert survey.attempt(Stub(lambda *_: Outcome(results=1)), 0)["status"] == "compared nothing"
    assert survey.attempt(Stub(refusing()), 0)["status"] == "agrees"


def test_a_failure_says_whose_it_is():
    def fails(pick: int, relax: set[str]) -> Outcome:
        raise KeyError("absent")

    entry = survey.attempt(Stub(fails), 0)
    assert (entry["status"], entry["where"]) == ("fails", "test")
    assert entry["message"] == "KeyError: 'absent'"


def busy(pick: int, relax: set[str]) -> Outcome:
    while True:
        pass


def hungry(pick: int, relax: set[str]) -> Outcome:
    return Outcome(results=len(bytearray(1 << 40)))


@pytest.mark.parametrize(("does", "said"), [(busy, "over 1 s of processor time"),
                                            (hungry, "out of memory")])  # fmt: skip
def test_a_case_that_exceeds_its_limits_is_too_large(does, said):
    entry = survey.limited(Stub(does), 0, seconds=1, gib=64)
    assert (entry["status"], entry["message"]) == ("too large", said)


def test_rounds_take_the_smallest_of_each_first_and_none_after_one_too_large():
    agrees, large = {"status": "agrees"}, {"status": "too large"}
    record = {
        "functions": {
            "a": {"cases": 3, "skipped": "", "tried": {"0": agrees}},
            "b": {"cases": 2, "skipped": "", "tried": {}},
            "c": {"cases": 9, "skipped": "AWS's mark", "tried": {}},
            "d": {"cases": 9, "skipped": "", "tried": {"0": large}},
        }
    }
    assert list(survey.rounds(record, 3, set())) == [("b", 0), ("a", 1), ("b", 1), ("a", 2)]
    assert next(iter(survey.rounds(record, 1, {"too large"}))) == ("b", 0)
    assert ("d", 0) in survey.rounds(record, 1, {"too large"})


def test_a_record_is_written_and_read_back(tmp_path):
    record = {
        "repository": "r",
        "functions": {"f": {"cases": 2, "skipped": "", "tried": {"1": {"a": 1}, "0": {"b": 2}}}},
    }
    survey.save(record, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == record
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
