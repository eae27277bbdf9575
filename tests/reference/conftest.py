"""The rules hold on every backend that runs anywhere, so each test runs once on each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nsa_neuron.registry import requesting

AUTOMATIC = "automatic"  # cpu:native where it can be compiled, but cpu:torch for float64
TARGETS = ("reference:eager", "cpu:torch", AUTOMATIC)
EXACT = ("test_gradients", "test_rules")  # in float64, but for tests that take a dtype


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every target; the automatic one not where it is another one for sure."""
    marks = metafunc.definition.iter_markers("parametrize")
    if any("backend" in mark.args[0] for mark in marks):
        return  # the test says it itself
    float64 = metafunc.module.__name__ in EXACT and "dtype" not in metafunc.fixturenames
    targets = [target for target in TARGETS if target != AUTOMATIC or not float64]
    metafunc.parametrize("backend", targets, indirect=True)


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The target that the test's calls run on."""
    with requesting(None if request.param == AUTOMATIC else request.param):
        yield request.param
