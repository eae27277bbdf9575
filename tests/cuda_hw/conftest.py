"""Tests of the kernels on an NVIDIA GPU (marker `gpu`); skipped, with the reason, without one.

`NSA_HW_TESTS_ON_CPU=1` runs those that need no CUDA feature on the interpreter at tiny sizes, which
tests the tests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest_hw import ON_CPU, TARGET, hindrance


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu_only: needs CUDA itself, not only our kernels")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = f"{Path(__file__).parent}{os.sep}"
    reason = hindrance()
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.gpu)
            needs_cuda = item.get_closest_marker("gpu_only") or not ON_CPU
            if reason and needs_cuda:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test that ends its process has a line that it began."""
    _record({"test": nodeid, "outcome": "began"})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line per test, written at once: what is killed leaves what it had, with tracebacks."""
    if report.when == "call" or report.outcome != "passed":
        row = {"test": report.nodeid, "outcome": report.outcome, "phase": report.when}
        _record(row | {"seconds": round(report.duration, 3), "why": report.longreprtext})


def _record(row: dict[str, object]) -> None:
    """Appends to `NSA_HW_RESULTS`; with pytest-xdist the workers run the tests and the first
    process reports them."""
    path = os.environ.get("NSA_HW_RESULTS")
    if path and "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(path).open("a") as file:
            file.write(json.dumps(row) + "\n")


@pytest.fixture
def device() -> str:
    """Where tensors of a test lie."""
    return "cpu" if ON_CPU else "cuda"


@pytest.fixture
def target() -> str:
    """The backend under test."""
    return TARGET


@pytest.fixture
def dtype() -> torch.dtype:
    """The dtype that matters; interpreted Triton multiplies bfloat16 after an upcast."""
    return torch.float16 if ON_CPU else torch.bfloat16


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
