"""The comparison and the long documents of examples/, at a tiny scale."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_the_comparison_trains_evaluates_and_is_read_again(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("train_bytes", EXAMPLES / "train_bytes.py")
    compare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compare)
    monkeypatch.setattr(compare, "LENGTHS", {"mqar": (128,), "needle": (256,)})
    monkeypatch.setattr(compare, "PIECES", 2)
    words = ["train_bytes.py", str(tmp_path), "--steps", "2", "--seeds", "3"]
    monkeypatch.setattr(sys, "argv", [*words, "--attention", "nsa", "--only", "mqar", "needle"])
    compare.main()
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["task"], row["steps"]) for row in rows] == [("mqar", 2), ("needle", 2)]
    assert all(0 <= found["accuracy"] <= 1 for row in rows for found in row["held_out"].values())
    begun = json.loads((tmp_path / "needle-nsa-3" / "evaluation.json").read_text())
    assert begun == rows[1] and "needle" in capsys.readouterr().out
    monkeypatch.setattr(compare, "train", None)  # finished runs are not trained again
    compare.main()
    assert json.loads((tmp_path / "results.json").read_text()) == rows


@pytest.mark.slow
def test_long_documents(tmp_path):
    words = "--lengths 2048 --trials 2 --attention nsa --documents record".split()
    command = [sys.executable, str(EXAMPLES / "long_documents.py"), str(tmp_path), *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    (row,) = json.loads((tmp_path / "long.json").read_text())
    assert row["facts"] == 16 and row["bytes"] == 2048 and row["peak_mib"] > 100
    assert row["right"] > 0.5 and len(row["by_quarter"]) == 4 and "record" in done.stdout
    assert "blood pressure" in (tmp_path / "long-record.html").read_text()
