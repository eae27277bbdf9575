"""Reads and writes tile-plan files (`nsa_neuron/backends/cuda/plans`), one row per line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

Rows = dict[str, list[dict[str, Any]]]
SIXTEEN_BIT = ["bfloat16", "float16"]
"""Both have the same tiles and rates on a GPU, so one row serves them."""


@dataclass(frozen=True)
class Point:
    """What a row was measured for."""

    dk: int
    dv: int
    group: int
    dtype: str = "bfloat16"

    def bounds(self) -> dict[str, Any]:
        """The bounds of a row for this point: these dims or smaller ones, this group size."""
        dtypes = SIXTEEN_BIT if self.dtype in SIXTEEN_BIT else [self.dtype]
        return {
            "max_dk": self.dk, "max_dv": self.dv, "min_g": self.group, "max_g": self.group,
            "dtypes": dtypes,
        }  # fmt: skip

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row's bounds hold, by the rule of `plans.find`."""
        return (
            self.dk <= row.get("max_dk", self.dk)
            and self.dv <= row.get("max_dv", self.dv)
            and self.dtype in row.get("dtypes", [self.dtype])
            and row.get("min_g", 1) <= self.group <= row.get("max_g", self.group)
        )


def put(rows: Rows, kernel: str, point: Point, constants: dict[str, Any], measured: Any) -> None:
    """Makes `constants` what a lookup at `point` finds; every other row stays.

    The new row goes right before the first one that fits the point: rows for smaller dims, which
    come earlier, still win where they did. A row that was measured for this very point before is
    replaced.

    Args:
        measured: where the constants come from, kept in the row for readers.
    """
    new = {**point.bounds(), "constants": constants, "measured": measured}
    listed = rows[kernel]
    first = next((i for i, row in enumerate(listed) if point.fits(row)), len(listed))
    same = first < len(listed) and _bounds(listed[first]) == point.bounds()
    listed[first : first + same] = [new]


def _bounds(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("constants", "measured")}


def to_text(rows: Rows) -> str:
    """The file's text: kernels in their order, one row per line."""
    parts = []
    for kernel, listed in rows.items():
        lines = ",\n".join(f"    {json.dumps(row)}" for row in listed)
        parts.append(f"  {json.dumps(kernel)}: [\n{lines}\n  ]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write(path: Path, rows: Rows) -> None:
    """Replaces a plan file at once, so that an interrupted run leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(to_text(rows))
    draft.replace(path)


def bundle(folder: Path) -> dict[str, Rows]:
    """Every plan file of a device's folder, by op."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def install(bundled: Mapping[str, Rows], folder: Path) -> None:
    """Writes a bundle back as files."""
    for op, rows in bundled.items():
        write(folder / f"{op}.json", rows)
