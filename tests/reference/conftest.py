"""The rules hold on every backend that runs anywhere, so each test runs once on each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nsa_neuron.registry import requesting

# Automatic: cpu:native where it can be compiled, but cpu:torch for float64.
TARGETS = ("reference:eager", "cpu:torch", "automatic")


@pytest.fixture(autouse=True, params=TARGETS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The target that the test's calls run on."""
    with requesting(None if request.param == "automatic" else request.param):
        yield request.param
