"""The outcome of a run: rows, and cells by op, target and dtype; `text` and `html` show it."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nsa_neuron import environment
from nsa_neuron.conformance.between import Apart, worst_of_pairs
from nsa_neuron.conformance.outcome import Outcome, Status

if TYPE_CHECKING:
    from nsa_neuron.conformance.targets import Place

SCHEMA = 1


@dataclass(frozen=True)
class Cell:
    """All cases of one op on one target in one dtype.

    Attributes:
        op, target, dtype: which.
        outcomes: its cases.
    """

    op: str
    target: str
    dtype: str
    outcomes: tuple[Outcome, ...]

    @property
    def counts(self) -> Counter[Status]:
        return Counter(outcome.status for outcome in self.outcomes)

    @property
    def status(self) -> Status:
        """The most telling of its cases': fail, known gap, pass, unsupported, not run."""
        order = (Status.FAIL, Status.GAP, Status.PASS, Status.UNSUPPORTED, Status.NOT_RUN)
        return next(status for status in order if self.counts[status])

    @property
    def partial(self) -> bool:
        """It passes, but refuses some cases."""
        return self.status is Status.PASS and self.counts[Status.UNSUPPORTED] > 0

    @property
    def worst(self) -> Outcome:
        """The case that decides: of those with the cell's status, the closest to its budget."""
        same = [outcome for outcome in self.outcomes if outcome.status is self.status]
        return max(same, key=lambda outcome: outcome.share)

    @property
    def summary(self) -> str:
        """One line: the worst error and its budget, or the reason."""
        worst = self.worst
        if self.status is not Status.PASS:
            return f"{worst.case}: {worst.detail}" if worst.case else worst.detail
        if worst.error is None or worst.budget is None:
            return ""
        return f"{worst.error:.2g} of {worst.budget:.2g} ({worst.result}, {worst.case})"

    def to_dict(self) -> dict[str, Any]:
        counts = {status.value: n for status, n in sorted(self.counts.items())}
        reasons = sorted({o.detail for o in self.outcomes if o.status is Status.UNSUPPORTED})
        return {
            "op": self.op,
            "target": self.target,
            "dtype": self.dtype,
            "status": self.status.value,
            "cases": counts,
            "summary": self.summary,
            "unsupported": reasons,
        }


@dataclass
class Report:
    """Outcomes of a run.

    Attributes:
        places: the targets that were asked for, in order.
        rows: one outcome per problem and target.
        between: how far the targets' results of each problem are apart.
    """

    places: tuple[Place, ...]
    rows: list[Outcome] = field(default_factory=list)
    between: list[Apart] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.rows.append(outcome)
        self.__dict__.pop("cells", None)

    @property
    def ok(self) -> bool:
        """Nothing failed. What was not run is not a failure, nor a pass: see `ran`."""
        return not self.failures

    @property
    def ran(self) -> int:
        """How many cases were run."""
        ran = (Status.PASS, Status.FAIL, Status.GAP)
        return sum(row.status in ran for row in self.rows)

    @property
    def failures(self) -> list[Outcome]:
        return [row for row in self.rows if row.status is Status.FAIL]

    @cached_property
    def cells(self) -> list[Cell]:
        """Cells by op, target and dtype, in the order of the run."""
        groups: dict[tuple[str, str, str], list[Outcome]] = {}
        for row in self.rows:
            groups.setdefault((row.op, row.target, row.dtype), []).append(row)
        return [Cell(*key, tuple(rows)) for key, rows in groups.items()]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {
            "schema": SCHEMA,
            "ok": self.ok,
            "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "environment": environment.describe(),
            "targets": [
                {"target": str(p.target), "device": p.device, "hindrance": p.hindrance}
                for p in self.places
            ],
            "cells": [cell.to_dict() for cell in self.cells],
            "between": [
                {**apart.to_dict(), "difference": _number(apart.difference)}
                for apart in worst_of_pairs(self.between)
            ],
            "rows": [
                {**asdict(row), "status": row.status.value, **_finite(row)} for row in self.rows
            ],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)


def _finite(row: Outcome) -> dict[str, float | str | None]:
    """JSON has neither infinity nor NaN: such an error is written as text."""
    return {"error": _number(row.error), "budget": _number(row.budget)}


def _number(value: float | None) -> float | str | None:
    return str(value) if value is not None and not math.isfinite(value) else value
