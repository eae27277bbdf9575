"""Skips, with the reason, what needs Triton's interpreter where it cannot run our kernels.

Only the interpreter's own refusal counts (`toolchain.interpreter_hindrance`), at import of a test
file or inside a test; where the interpreter works, nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

try:
    from nsa_neuron.toolchain import interpreter_hindrance

    HINDRANCE = interpreter_hindrance()
except ImportError:  # the test files skip themselves where triton is missing
    HINDRANCE = ""
HERE = Path(__file__).parent


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.failed and _refused(collector.path, str(report.longrepr)):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {HINDRANCE}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and call.excinfo and _refused(item.path, str(call.excinfo.value)):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, f"Skipped: {HINDRANCE}")
    return report


def _refused(path: Path, text: str) -> bool:
    """Whether a file of this folder failed by the interpreter's refusal."""
    return bool(HINDRANCE) and HERE in path.parents and HINDRANCE in text
