"""The parametrizations of AWS's tests, smallest first."""

from __future__ import annotations

import itertools
import math
import types
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_OPTIONS = {
    "filter",
    "coverage",
    "enable_automatic_boundary_tests",
    "enable_invalid_combination_tests",
}


def cases_of(function: Callable[..., Any]) -> list[dict[str, Any]]:
    """Keyword arguments of each case of a test function, by rising product of their integers.

    Understands `pytest.mark.parametrize`, AWS's `coverage_parametrize` (every combination that its
    filter calls valid) and AWS's ranged tests.
    """
    if hasattr(function, "range_test_config"):
        from test.utils.ranged_test_harness import RangeTestHarness

        _, ranged = RangeTestHarness(function.range_test_config).get_unique_test_cases()
        found = [{"range_test_options": c} for c in ranged if not c.is_negative_test_case]
        return sorted(found, key=lambda c: _size(_flat(c["range_test_options"].tensors)))
    axes = [_axis(m) for m in getattr(function, "pytestmark", []) if m.name.endswith("parametrize")]
    found = [
        {k: v for part in combination for k, v in part.items()}
        for combination in itertools.product(*axes)
    ]
    return sorted(found, key=_size)


def _axis(mark: Any) -> list[dict[str, Any]]:
    if mark.name == "coverage_parametrize":
        return _combinations(mark.kwargs)
    names, rows = mark.args[:2]
    names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
    found = []
    for row in rows:
        values = row.values if isinstance(row, type(pytest.param())) else row
        if len(names) == 1 and not (type(values) is tuple and len(values) == 1):
            values = (values,)
        found.append(dict(zip(names, values, strict=True)))
    return found


def _combinations(options: dict[str, Any]) -> list[dict[str, Any]]:
    axes = {k: _values(v) for k, v in options.items() if k not in _OPTIONS}
    keep = options.get("filter")
    found = []
    for values in itertools.islice(itertools.product(*axes.values()), 4000):
        row = dict(zip(axes, values, strict=True))
        if keep is None or keep(**row).name == "VALID":
            found.append({**row, "is_negative_test_case": False})
    return found


def _values(axis: Any) -> list[Any]:
    if isinstance(axis, list | tuple):
        return list(axis)
    return list(axis.values) if hasattr(axis, "values") else [axis]


def _flat(tensors: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{t}.{d}": v for t, dims in tensors.items() for d, v in dims.items()}


def _size(values: dict[str, Any]) -> float:
    numbers: Iterable[int] = (v for v in values.values() if type(v) is int and v > 0)
    return sum(math.log(n) for n in numbers)


def fill(name: str) -> Any:
    """The value of a fixture of AWS's suite."""
    if name == "platform_target":
        from test.utils.common_dataclasses import Platforms

        return Platforms.TRN2
    if name == "collector":
        from test.utils.metrics_collector import NoopMetricsCollector

        return NoopMetricsCollector()
    if name == "request":
        spec = types.SimpleNamespace(id="case")
        node = types.SimpleNamespace(name="case", callspec=spec, get_closest_marker=lambda _: None)
        return types.SimpleNamespace(node=node)
    return False if name == "is_negative_test_case" else None
