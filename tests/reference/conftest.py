"""The rules hold on every backend that runs anywhere, so each test runs once on each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nsa_neuron.registry import use_backend

TARGETS = ("reference:eager", "cpu:torch")


@pytest.fixture(autouse=True, params=TARGETS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The target that the test's calls run on."""
    with use_backend(request.param):
        yield request.param
