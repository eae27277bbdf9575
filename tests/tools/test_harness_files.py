"""What survives of a run that is cut: rows of JSON lines, profiles; and how a process restarts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tools import profile_nsa, runs

ROOT = Path(__file__).parents[2]


def test_a_cut_line_costs_that_row_only(tmp_path):
    file = tmp_path / "sub/rows.jsonl"
    assert runs.read_rows(file) == []
    runs.write_rows(file, [{"a": 1}, {"a": 2}])
    file.write_text(file.read_text() + '{"a": 3, "b"')
    assert runs.read_rows(file) == [{"a": 1}, {"a": 2}]
    assert list(file.parent.iterdir()) == [file]


def test_a_replaced_process_holds_no_device_file(tmp_path):
    """The CUDA driver's files may be inheritable: they must not keep a lost context alive."""
    program = """
import os, sys
from tools import runs
kept = os.open("/dev/null", os.O_RDONLY)
os.set_inheritable(kept, True)
look = "import os; print([f for f in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{f}') and os.readlink(f'/proc/self/fd/{f}') == '/dev/null' and int(f) > 2])"
runs.replace_process([sys.executable, "-c", look])
"""  # noqa: E501
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stderr


NCU = """==PROF== Connected to process 7
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes.sum"
"","","ms","Gbyte"
"0","forward","1.5","2.0"
"1","select","3.5","0.1"
"""


def test_counters_of_ncu():
    first, second = profile_nsa.parse_counters(NCU)
    assert first["kernel"] == "forward" and first["duration"] == "1.5"
    assert first["units"]["duration"] == "ms" and second["dram_bytes"] == "0.1"
    assert second["tensor_percent"] is None
    assert profile_nsa.parse_counters("==ERROR== no permission") == []
    assert profile_nsa.parse_counters('"ID","Kernel Name"\n') == []


def run(monkeypatch, out, rows, *options):
    monkeypatch.setattr(profile_nsa, "profiled", lambda args: iter(rows))
    arguments = ["--dry-run", "--revision", "r", "--out", str(out), *options]
    assert profile_nsa.main(arguments) == 0
    return [(row["pass"], row["kernel"]) for row in map(json.loads, out.read_text().splitlines())]


def test_a_profile_keeps_the_passes_that_are_not_made_again(tmp_path, monkeypatch):
    out = tmp_path / "profile.jsonl"
    row = {"ms": 1.0, "share": 1.0}
    first = [("forward", [{"kernel": "a", **row}]), ("decode", [{"kernel": "b", **row}])]
    assert run(monkeypatch, out, first) == [("forward", "a"), ("decode", "b")]
    again = [("forward", [{"kernel": "c", **row}])]
    assert run(monkeypatch, out, again) == [("decode", "b"), ("forward", "c")]


def test_a_profile_that_is_cut_keeps_what_was_done(tmp_path, monkeypatch):
    def cut():
        yield "forward", [{"kernel": "a", "ms": 1.0, "share": 1.0}]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path / "profile.jsonl", cut())
    (row,) = runs.read_rows(tmp_path / "profile.jsonl")
    assert row["pass"] == "forward" and row["revision"] == "r"


def test_no_ncu_is_a_row(monkeypatch):
    monkeypatch.setattr(profile_nsa.shutil, "which", lambda name: None)
    (row,) = profile_nsa.counters(profile_nsa.parse([]))
    assert row == {"status": "skipped", "reason": "ncu is not installed"}
