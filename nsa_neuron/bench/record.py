"""One quantity, measured or modelled."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Record:
    """A measured quantity and its spread.

    Attributes:
        bench: which benchmark.
        name: what was measured.
        unit: of the numbers: `"us"`, `"ms"`, `"1/ms"`, or `"ratio"`.
        median, p20, p80: over the runs.
        runs: how many.
        facts: shape, dtype, threads: what the numbers depend on.
    """

    bench: str
    name: str
    unit: str
    median: float
    p20: float
    p80: float
    runs: int
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, bench: str, name: str, unit: str, values: Sequence[float], **facts: Any) -> Record:
        """The record of some runs, at least one."""
        p20, p80 = _percentile(values, 0.2), _percentile(values, 0.8)
        return cls(bench, name, unit, statistics.median(values), p20, p80, len(values), facts)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kind": "measured"}

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.p20:.3g} to {self.p80:.3g})"


@dataclass(frozen=True)
class Modelled:
    """A modelled quantity and the band of the model's constants.

    Attributes:
        bench: which benchmark.
        name: what was modelled.
        unit: of the numbers.
        low, central, high: at that end of all constants.
        facts: shape, dtype, cores: what the numbers depend on.
    """

    bench: str
    name: str
    unit: str
    low: float
    central: float
    high: float
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kind": "modelled"}

    def __str__(self) -> str:
        return f"{self.central:.4g} ({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True)
class Absent:
    """A quantity that could not be measured.

    Attributes:
        bench: which benchmark.
        name: what was to be measured.
        reason: why it was not.
        facts: shape, dtype, threads.
    """

    bench: str
    name: str
    reason: str
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kind": "absent"}


def _percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the runs lies, interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
