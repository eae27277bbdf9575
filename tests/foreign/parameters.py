"""The parametrizations of AWS's tests, smallest first."""

from __future__ import annotations

import itertools
import math
import random
import types
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

LISTED = 20_000  # combinations of one test that are looked at

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
    axes = [_axis(m) for m in getattr(function, "pytestmark", []) if m.name.endswith("parametrize")]
    if hasattr(function, "range_test_config"):
        axes.append(_ranged(function.range_test_config))
    found = [
        {k: v for part in combination for k, v in part.items()}
        for combination in itertools.product(*axes)
    ]
    return sorted(found, key=_size)


def _ranged(config: Any) -> list[dict[str, Any]]:
    from test.utils.ranged_test_harness import RangeTestHarness

    _, ranged = RangeTestHarness(config).get_unique_test_cases()
    return [{"range_test_options": c} for c in ranged if not c.is_negative_test_case]


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
    for values in _product(list(axes.values())):
        row = dict(zip(axes, values, strict=True))
        if keep is None or getattr(keep(**row), "name", "VALID") == "VALID":
            found.append({**row, "is_negative_test_case": False})
    return found


def _product(axes: list[list[Any]]) -> Iterable[tuple[Any, ...]]:
    """All combinations, or as many drawn at random where there are more than can be listed.

    AWS's own run takes a covering subset (each value once, or each pair); every one of its cases
    is one of these combinations.
    """
    if math.prod(map(len, axes)) <= LISTED:
        return itertools.product(*axes)
    draw = random.Random(0)
    return list(dict.fromkeys(tuple(draw.choice(a) for a in axes) for _ in range(LISTED)))


def _values(axis: Any) -> list[Any]:
    if isinstance(axis, list | tuple):
        return list(axis)
    return list(axis.values) if hasattr(axis, "values") else [axis]


def _flat(tensors: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{t}.{d}": v for t, dims in tensors.items() for d, v in dims.items()}


def _size(values: dict[str, Any]) -> float:
    ranged = values.get("range_test_options")
    values = values if ranged is None else {**values, **_flat(ranged.tensors)}
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
