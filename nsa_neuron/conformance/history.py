"""Earlier reports, as `nsa conform --json` wrote them, for the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nsa_neuron.errors import NsaError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Past:
    """One report.

    Attributes:
        revision: of the repository; empty where it was not known.
        when: ISO time; empty in reports from before they had one.
        cells: status by op, target, dtype.
        counts: cases by target and status.
    """

    revision: str
    when: str
    cells: Mapping[tuple[str, str, str], str]
    counts: Mapping[str, Mapping[str, int]]

    @property
    def name(self) -> str:
        return f"{self.revision or 'unknown revision'} {self.when[:16].replace('T', ' ')}".strip()


def load(paths: Sequence[Path]) -> list[Past]:
    """Earlier reports, oldest first.

    Raises:
        NsaError: a file is no report.
    """
    found = []
    for path in paths:
        try:
            found.append(of(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise NsaError(
                f"{path} is no report of `nsa conform --json`: {type(error).__name__}: {error}"
            ) from error
    return sorted(found, key=lambda past: past.when)


def of(report: Mapping[str, Any]) -> Past:
    """A report's plain data as a part of the history."""
    counts: dict[str, dict[str, int]] = {}
    for cell in report["cells"]:
        mine = counts.setdefault(cell["target"], {})
        for status, number in cell["cases"].items():
            mine[status] = mine.get(status, 0) + number
    return Past(
        report["environment"]["revision"],
        report.get("when", ""),
        {(c["op"], c["target"], c["dtype"]): c["status"] for c in report["cells"]},
        counts,
    )


def changes(before: Past, after: Past) -> list[str]:
    """Cells whose status changed, in words; cells that only one of the reports has are left out."""
    return [
        f"{op} on {target} in {dtype}: {before.cells[op, target, dtype]} → {status}"
        for (op, target, dtype), status in after.cells.items()
        if before.cells.get((op, target, dtype), status) != status
    ]
