"""Rows as a person reads them: a line each as they come, a table at the end."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.runs import Row

DENSE_OF = {"nsa": "dense", "decode": "dense_decode"}
"""The dense stage that a stage is compared with."""


def progress(row: Row) -> str:
    fields = ("heads", "tokens", "dist", "stage", "direction", "peer", "status")
    text = " ".join(str(row[field]) for field in fields if row.get(field))
    if "median_ms" not in row:
        return f"{text}: {row['reason'][:160]}"
    shown = [name for name in row["errors"] if not name.startswith("max_abs")]
    errors = " ".join(f"{name} {row['errors'][name]:.2g}" for name in shown)
    return f"{text}: {row['median_ms']:.3f} ms, {errors}"


def table(rows: list[Row]) -> str:
    """Median ms by problem, stage and implementation; the most important problems come last."""
    groups: dict[str, dict[str, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    dense: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if row["stage"] == "import":
            continue
        kind = f"decode x{row['batch']}" if row["batch"] > 1 else row["dist"]
        problem, line = (row["heads"], row["tokens"]), f"{row['stage']} {row['direction']}"
        groups["{} {} {}".format(*problem, kind)][line][row["peer"]] = row
        if row["status"] == "ok" and row["stage"] in DENSE_OF.values():
            best = dense.get((*problem, line), row["median_ms"])
            dense[(*problem, line)] = min(best, row["median_ms"])

    def entry(row: Row | None) -> str:
        if row is None:
            return ""
        mark = {"ok": "", "mismatch": "!", "failed": "x", "skipped": "."}[row["status"]]
        if "median_ms" not in row:
            return mark
        against = f"{DENSE_OF.get(row['stage'])} {row['direction']}"
        best = dense.get((row["heads"], row["tokens"], against))
        ratio = f" ({best / row['median_ms']:.1f})" if best else ""
        return f"{row['median_ms']:.3f}{mark}{ratio}"

    text = ["\nmedian ms (best right dense time / this); ! wrong, x failed, . out of time"]
    for label, lines in reversed(groups.items()):
        every = [row for cells in lines.values() for row in cells.values()]
        peers = list(dict.fromkeys(row["peer"] for row in every))
        text.append(f"\n{label:32}" + "".join(f"{name[:14]:>15}" for name in peers))
        unions: dict[str, float] = next((row["unions"] for row in every if row.get("unions")), {})
        text += [f"  blocks of {n} neighbours: {count:.1f}" for n, count in unions.items()]
        for line, cells in lines.items():
            text.append(f"  {line:30}" + "".join(f"{entry(cells.get(n)):>15}" for n in peers))
    return "\n".join(text)
