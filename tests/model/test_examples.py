"""The comparison and the workloads of examples/, at a tiny scale."""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.fixture
def workloads(monkeypatch):
    """The modules of examples/workloads."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "workloads"))
    names = ("lookup", "documentation", "codebase", "patients")
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        del sys.modules[name]


DEFINED = {  # what stands before a name's definition
    "documentation": re.compile(rb"\n$"),
    "codebase": re.compile(rb"\bdef $"),
    "patients": re.compile(rb"\n\d{4}-\d\d-\d\d visit, code $"),
}


@pytest.mark.parametrize("name", DEFINED)
def test_workloads_ask_for_what_the_text_defines(workloads, name):
    kinds = {"documentation": "Documentation", "codebase": "CodeBase", "patients": "Patients"}
    source = getattr(workloads[name], kinds[name])()
    lookup = workloads["lookup"]
    draw = random.Random(1)
    document = source.whole(20_000, draw)
    assert len(document.text) == 20_000 and 3 <= len(document.places) <= lookup.ASKED
    capitals = {chr(c) for c in document.text if chr(c).isupper()}
    assert capitals == set(document.places)
    order = list(document.places)
    asked = lookup.asked(document, order)
    assert asked.startswith(document.text) and len(asked) == 20_000 + 2 * len(order)
    for i, letter in enumerate(order):
        place = document.places[letter]
        assert document.text[place] == ord(letter) and DEFINED[name].search(document.text[:place])
        assert 97 <= document.text[place + 1] <= 122
        assert asked[20_000 + 2 * i :][:2] == document.text[place : place + 2]
        others = [m.start() for m in re.finditer(letter.encode(), document.text)]
        defined = [at for at in others if DEFINED[name].search(document.text[:at])]
        assert name == "documentation" or defined == [place]
    batch = lookup.Lookup(source).batch(2, 1024, torch.Generator().manual_seed(0))
    again = lookup.Lookup(source).batch(2, 1024, torch.Generator().manual_seed(0))
    assert torch.equal(batch.tokens, again.tokens) and batch.tokens.shape == (2, 1024)
    assert batch.counted.sum(1).tolist() == [2 * lookup.ASKED] * 2
    for row, flags in zip(batch.tokens, batch.counted, strict=True):
        text = bytes(row.tolist())
        for at in flags.nonzero()[:, 0].tolist():
            pair = text[at - 1 : at + 1]
            assert pair[:1].isupper() and pair in text[: 1024 - 4 * lookup.ASKED]


@pytest.mark.slow
def test_a_workload_trains_reads_and_writes_its_page(tmp_path):
    words = "--only record --attention nsa --steps 1 --lengths 2048".split()
    command = [sys.executable, str(EXAMPLES / "workloads" / "run.py"), str(tmp_path), *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    (row,) = json.loads((tmp_path / "workloads.json").read_text())
    assert row["asked"] == 12 == len(row["answers"]) and row["bytes"] == 2048
    assert all(0 < distance < 2048 for distance, _ in row["answers"])
    assert row["right"] == sum(right for _, right in row["answers"]) / 12
    assert row["trained"]["steps"] == 1 and row["peak_mib"] > 100 and "record" in done.stdout
    assert "blood pressure" in (tmp_path / "workload-record.html").read_text()
