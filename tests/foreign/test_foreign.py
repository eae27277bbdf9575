"""Kernels of others run unmodified and agree with their references, as the records say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from nsa_neuron.simulator import SimulationError, simulate

from . import elsewhere, examples, table
from .checkouts import importable, path_of, why_missing
from .library import TestFunction
from .survey import RECORD, outcome_of
from .verdicts import VERDICTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .examples import ExampleCase

pytestmark = pytest.mark.sim

SLOW = 5.0  # seconds of processor time
SHORT = 0.5  # what the suite runs by default has at most these
SURVEY = json.loads(RECORD.read_text())


def recorded() -> list[Any]:
    """Cases of nki-library that agree by the record, with the rules that were relaxed."""
    if path_of("library") is None:
        return [pytest.param("", 0, (), marks=pytest.mark.skip(reason=why_missing("library")))]
    found = []
    for name, facts in SURVEY["functions"].items():
        for pick, entry in facts["tried"].items():
            if outcome_of(entry) in ("agrees", "relaxed"):
                rules = tuple(entry.get("relaxed", {}).get("rules", ()))
                marks = [pytest.mark.slow] if entry["seconds"] > SHORT else []
                label = f"{name.rpartition('/')[2].replace('::', '-')}-{pick}"
                found.append(pytest.param(name, int(pick), rules, id=label, marks=marks))
    return found


@pytest.fixture(scope="module")
def library_checkout() -> Iterator[None]:
    with importable("library", ".", "src"):
        yield


@pytest.mark.parametrize(("name", "pick", "rules"), recorded())
def test_nki_library(name: str, pick: int, rules: tuple[str, ...], library_checkout: None) -> None:
    outcome = TestFunction.named(name).run(pick, rules)
    assert not outcome.failures, "; ".join(outcome.failures)
    assert outcome.results > 0 and outcome.instructions > 0, "nothing was run or compared"
    assert set(rules) == set(outcome.relaxed), "relaxed without need"


def example(case: ExampleCase) -> Any:
    missing = path_of(case.repository) is None
    marks = [pytest.mark.skip(reason=why_missing(case.repository))] if missing else []
    return pytest.param(case, id=f"{case.repository}-{case.id}", marks=marks)


EXAMPLES = [*examples.CASES, *elsewhere.CASES]
KNOWN = {(name, k["kernel"]) for name, r in json.loads(table.EXAMPLES.read_text()).items()
         for k in r["kernels"] if k["verdict"] == "agrees"}  # fmt: skip


@pytest.mark.parametrize(
    "case", [example(c) for c in EXAMPLES if (c.repository, c.kernel) in KNOWN]
)
def test_example(case: ExampleCase) -> None:
    with importable(case.repository):
        outcome = case.run()
    assert not outcome.failures, "; ".join(outcome.failures)
    assert outcome.results > 0 and outcome.instructions > 0, "nothing was run or compared"


@pytest.mark.skipif(path_of("sdk") is None, reason=why_missing("sdk"))
def test_sdk_example_that_violates_a_layout_is_refused() -> None:
    import numpy as np

    with importable("sdk"):
        kernel = examples.load("sdk", "nki/examples/layout-violation.py").tensor_exp_kernel_
        with pytest.raises(SimulationError) as error:
            simulate(kernel)(np.ones((256, 512), np.float32))
    assert error.value.rule == "partition-limit"


def test_the_record_is_whole_and_the_document_shows_it() -> None:
    """Every test function stands there, and the tables are made of the records."""
    functions = SURVEY["functions"]
    assert len(functions) > 200
    for facts in functions.values():
        assert facts["tried"] or facts["skipped"] or not facts["cases"]
    refusing = {e["rule"] for f in functions.values() for e in f["tried"].values() if "rule" in e}
    assert refusing <= VERDICTS.keys()
    text = table.DOCUMENT.read_text()
    for line in table.library_section(SURVEY):
        assert line in text
    for repository, found in json.loads(table.EXAMPLES.read_text()).items():
        for line in table.example_section(repository, found):
            assert line in text
