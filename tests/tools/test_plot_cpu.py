"""`plot_cpu.py`: the page says what rows of `nsa bench --target cpu` say, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from tools import plot_cpu, plot_results

HERE = {
    "cpu": "Test CPU",
    "cores": 2,
    "threads": "2",
    "revision": "abc",
    "versions": {"torch": "9"},
}


def row(bench, name, value, kind="measured", **facts):
    shape = {"Hq": 16, "Hkv": 1, "Dk": 128, "dtype": "float32", "load": 1.0}
    shape |= {"tokens": 4096, "threads": 2}
    found = {"when": facts.pop("when", "2026-01-02T03:04:05+00:00"), "environment": HERE}
    found |= {"bench": bench, "name": name, "facts": {**shape, **facts}, "kind": kind}
    return {**found, "reason": value} if kind == "absent" else {**found, "median": value}


FORWARD = {"pass": "forward"}
LATER = "2026-01-03T03:04:05+00:00"  # a run with nothing but rates: they are nobody's
SAMPLE = [
    row("native", "gemm", 200.0), row("native", "read", 10.0),
    row("native", "gemm", 1.0, when=LATER), row("native", "read", 1.0, when=LATER),
    row("native", "sdpa", 999.0, **FORWARD), row("native", "sdpa", 300.0, **FORWARD),
    row("native", "cpu:native", 200.0, **FORWARD),
    row("native", "cpu:native", 50.0, **FORWARD, Hq=4),
    row("native", "decode", 0.5, **{"pass": "decode"}, bytes=2_000_000),
    row("native", "sdpa decode", 2.0, **{"pass": "decode"}, bytes=2_000_000),
    row("native stages", "selected", 50.0, **FORWARD, input="random", replaced=0.8, gflops=100),
    row("native stages", "whole", 200.0, **FORWARD, input="random", replaced=0.8),
    row("native memory", "cpu:native", 8.0, **FORWARD),
    row("native peers", "cpu:native", 200.0, **FORWARD, attention="nsa"),
    row("native peers", "lucidrains", "not here", "absent", **FORWARD, attention="nsa"),
    row("overhead", "ratio", 1.25, op="attention", mode="forward"),
    row("attention", "ratio", 7.0),
]  # fmt: skip


SAID = [
    "Test CPU, 2 cores, 2 threads, torch 9, revision abc, 2026-01-02",
    "| `sdpa`, forward | 300 |",
    "| SDPA / `cpu:native`, forward | **1.50** |",
    "4/1 heads, D = 128, float32:",
    "| 16/1 D=128 float32, 4K | 0.500 | 0.200 | 2.000 | 4.0 |",
    "| selected | 50 | 25% | 100 | 50% |",
    "| `cpu:native`, forward | 8 | 2.0 |",
    "| 4K, nsa | lucidrains | not here |",
    "| attention | forward | 1.25 |",
]


def test_the_page_says_what_the_last_rows_say(tmp_path):
    file, page = tmp_path / "rows.jsonl", tmp_path / "docs/page.md"
    file.write_text("".join(json.dumps(r) + "\n" for r in SAMPLE))
    page.parent.mkdir()
    page.write_text("<!-- floors -->\n<!-- /floors -->\na\n<!-- cpu -->\nx\n<!-- /cpu -->\nb")
    assert plot_results.main([str(file), "--page", str(page)]) == 0
    text = page.read_text()
    assert not [said for said in SAID if said not in text]
    assert "999" not in text and "\nx\n" not in text and text.endswith("b")
    assert (page.parent / "figures/cpu.svg").stat().st_size > 1000


def test_the_shipped_page_is_what_the_committed_rows_say():
    root = Path(plot_results.ROOT)
    text = (root / "docs/performance.md").read_text()
    rows = plot_results.load_cpu([root / "benchmarks/results/cpu-native-2026-11-28.jsonl"])
    figures = ["figures/cpu.svg"]
    assert plot_results.replace_between(text, "cpu", plot_cpu.render(rows, figures)) == text
