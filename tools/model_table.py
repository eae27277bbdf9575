"""The tables of `nsa bench --target cpu`, parts `layer` and `model`, in docs/performance.md.

    python -m tools.model_table benchmarks/results/model-cpu.jsonl

The last row of each name and length counts. `make bench-model` measures, then calls this.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from nsa_neuron import layer_bench, model_bench
from nsa_neuron.bench.record import Record

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
MARK = "<!-- whole models, measured: tools/model_table.py -->"
FIELDS = ("bench", "name", "unit", "median", "p20", "p80", "runs", "facts")


def _record(row: dict[str, Any]) -> Record:
    known: dict[str, Any] = {name: row[name] for name in FIELDS if name in row}
    return Record(**known)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Tables, and on what they were measured."""
    latest = {(row["name"], row["facts"]["tokens"], row["facts"].get("width")): row for row in rows}
    records = [_record(row) for row in latest.values()]
    parts = [f"Measured on {_where(list(latest.values()))}. Times in ms."]
    for title, headers, cells in layer_bench.tables(records) + model_bench.tables(records):
        head = f"| {' | '.join(headers)} |\n|{'--:|' * len(headers)}"
        body = "\n".join(f"| {' | '.join(row)} |" for row in cells)
        parts.append(f"{title[0].upper()}{title[1:]}:\n\n{head}\n{body}")
    return "\n\n".join(parts)


def _where(rows: list[dict[str, Any]]) -> str:
    """Machine, threads and revisions of rows; of each part by itself, if they differ."""
    places: dict[str, list[str]] = {}
    for row in rows:
        machine, facts = row["environment"], row["facts"]
        place = (
            f"{machine['cpu']}, {machine['cores']} cores, {facts['threads']} threads of torch, "
            f"revision {machine['revision']}"
        )
        names = places.setdefault(place, [])
        names += [row["bench"]] if row["bench"] not in names else []
    if len(places) == 1:
        return next(iter(places))
    return "; ".join(f"{place} ({', '.join(names)})" for place, names in places.items())


def rewrite(page: str, rows: list[dict[str, Any]]) -> str:
    """The page with the part between its two marks made anew."""
    before, _, rest = page.partition(f"{MARK}\n")
    _, _, after = rest.partition(MARK)
    return f"{before}{MARK}\n{markdown(rows)}\n{MARK}{after}"


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text().splitlines()
    PAGE.write_text(rewrite(PAGE.read_text(), [json.loads(line) for line in lines]))
