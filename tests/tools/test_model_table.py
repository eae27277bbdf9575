"""The page's tables of whole models are made of a benchmark's rows."""

from __future__ import annotations

import json
from pathlib import Path

from tools import model_table

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "benchmarks" / "results" / "model-cpu-loaded-2026-11-28.jsonl"


def test_the_page_is_rewritten_between_its_marks_only() -> None:
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    page = model_table.PAGE.read_text()
    before, _, after = page.split(model_table.MARK)
    made = model_table.rewrite(page, rows)
    start, between, end = made.split(model_table.MARK)
    assert (start, end) == (before, after)
    decoded = [line for line in between.splitlines() if line.startswith("| 131072 |")]
    assert len(decoded) == 1 and "| 93.4 (79.8 to 112) | 1.14e+03 " in decoded[0]
    assert "| 0.08 | 0.09 | 759.9 | 128.0 |" in decoded[0]
    assert rows[0]["environment"]["revision"] in between
    assert model_table.rewrite(made, rows) == made


def test_the_shipped_page_is_what_the_newest_rows_say() -> None:
    newest = sorted(ROWS.parent.glob("model-cpu-2*.jsonl"))[-1]
    rows = [json.loads(line) for line in newest.read_text().splitlines()]
    page = model_table.PAGE.read_text()
    assert model_table.rewrite(page, rows) == page
    assert newest.name in page
