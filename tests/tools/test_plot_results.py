"""`plot_results.py` and `floors.py`: tables say what rows say, floors what counting says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import floors, plot_results

ROOT = Path(__file__).parents[2]
PAPER = floors.Shape(64, 4, 192, 128)


def row(stage, direction, peer, ms, **change):
    base = {
        "heads": "64/4/192/128", "tokens": 65536, "dist": "random", "batch": 1, "stage": stage,
        "peer": peer, "direction": direction, "status": "ok", "device": "NVIDIA Test",
        "versions": {"torch": "2.11"}, "revision": "abc", "when": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    base |= {"median_ms": ms} if ms is not None else {"reason": "why"}
    base |= change
    names = ("heads", "tokens", "dist", "batch", "stage", "peer")
    return {**base, "key": [str(base[name]) for name in names]}


SAMPLE = [
    row("dense", "fwd", "sdpa-cudnn", 130.0),
    row("dense", "fwd", "flex", 90.0, status="mismatch"),
    row("nsa", "fwd", "nsa-neuron", 26.0),
    row("nsa", "fwd", "fla", None, status="failed"),
    row("slc", "fwd", "nsa-neuron", 4.0, status="mismatch"),
    row("nsa", "fwd", "nsa-neuron", 12.0, tokens=32768),
    row("decode", "graph", "nsa-neuron", 0.2, batch=32),
    row("dense_decode", "graph", "sdpa-flash", 2.0, batch=32),
]


@pytest.fixture
def results(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in SAMPLE))
    return file


def test_tables_name_what_is_wrong_and_compare_with_right_dense_only():
    text = plot_results.tables(SAMPLE)
    nsa = next(x for x in text.splitlines() if x.startswith("| nsa | fwd"))
    assert "| 26.000 |" in nsa and "failed" in nsa and nsa.endswith("| 2.0x | 5.0x |")
    slc = next(x for x in text.splitlines() if x.startswith("| slc"))
    assert "wrong" in slc and "4.000" not in slc
    decode = next(x for x in text.splitlines() if x.startswith("| decode"))
    assert decode.endswith("| 2.1x | 10.0x |")


def test_the_page_keeps_everything_else(results, tmp_path):
    page = tmp_path / "docs/page.md"
    page.parent.mkdir()
    page.write_text(
        "a\n<!-- floors -->\n<!-- /floors -->\nb\n<!-- results -->\nx\n<!-- /results -->c"
    )
    assert plot_results.main([str(results), "--page", str(page)]) == 0
    first = page.read_text()
    assert first.startswith("a\n") and first.endswith("c") and "\nx\n" not in first
    assert "NVIDIA Test; torch 2.11; revision abc; 2026-01-01" in first
    figure = page.parent / "figures/h200-64-4-192-128.svg"
    assert figure.stat().st_size > 1000 and f"(figures/{figure.name})" in first
    plot_results.main([str(results), "--page", str(page)])
    assert page.read_text() == first


def test_rows_of_a_cpu_are_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row("nsa", "fwd", "nsa-neuron", 1.0, device="cpu")))
    with pytest.raises(ValueError, match="nothing about speed"):
        plot_results.load([file])
    assert len(plot_results.load([file], allow_cpu=True)) == 1


def test_a_later_row_of_a_cell_replaces_the_earlier(tmp_path):
    file = tmp_path / "rows.jsonl"
    both = (row("nsa", "fwd", "nsa-neuron", ms) for ms in (1.0, 2.0))
    file.write_text("\n".join(json.dumps(r) for r in both))
    assert [r["median_ms"] for r in plot_results.load([file])] == [2.0]


def test_the_shipped_page_has_the_floors_and_no_result_of_another_machine():
    text = (ROOT / "docs/performance.md").read_text()
    assert plot_results.replace_between(text, "floors", floors.table()) == text
    results = text.split("<!-- results -->")[1].split("<!-- /results -->")[0]
    assert results.strip() == "None yet." or "NVIDIA H200" in results


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 500, 700])
def test_pairs_against_counting(tokens):
    t = range(tokens)
    counted = {
        "dense": sum(x + 1 for x in t),
        "cmp": sum(sum(i * 16 + 31 <= x for i in range(tokens)) for x in t),
        "window": sum(min(x + 1, 512) for x in t),
    }
    assert {name: PAPER.pairs(name, tokens) for name in counted} == counted


def test_floors_of_the_paper_at_64k():
    """The rooflines that were counted by hand when the kernels were designed."""
    flops = {s: PAPER.flops(s, "fwd", 65536) / 1e12 for s in ("cmp", "select", "slc", "window")}
    assert {k: round(v, 2) for k, v in flops.items()} == {
        "cmp": 5.49, "select": 3.3, "slc": 2.73, "window": 1.37
    }  # fmt: skip
    assert 13 < PAPER.milliseconds("nsa", "fwd", 65536) < 14
    assert 0.09 < PAPER.decode_milliseconds("decode", 32, 65536) < 0.1
