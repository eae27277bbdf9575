"""Benchmark rows (JSON lines) as tables and plots in `docs/performance.md`.

    python -m tools.plot_results benchmarks/results/2026-12-01-h200.jsonl
    python -m tools.plot_results benchmarks/results/cpu-native-2026-11-28.jsonl

Rows of `tools/h200.sh` replace what stands between `<!-- results -->` and `<!-- /results -->`;
those that were not measured on a GPU are refused, since interpreted kernels have no speed. Rows of
`nsa bench --target cpu` replace what stands between `<!-- cpu -->` and `<!-- /cpu -->`
(`plot_cpu.py`). Plots are written beside the page.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tools import plot_cpu
from tools.floors import floor_of, table

ROOT = Path(__file__).resolve().parents[1]

Row = dict[str, Any]
OWN = "nsa-neuron"
DENSE = {"nsa": "dense", "decode": "dense_decode"}
"""The dense stage that a whole NSA stage stands against."""
MARKS = {"mismatch": "wrong", "failed": "failed", "skipped": "no time"}


def load(paths: Iterable[Path], allow_cpu: bool = False) -> list[Row]:
    """The rows of some files, the last of each cell and pass.

    Raises:
        ValueError: a row was not measured on a GPU.
    """
    found: dict[str, Row] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if "bench" in row or row.get("stage") in (None, "import"):
                continue
            if row["device"] == "cpu" and not allow_cpu:
                raise ValueError(f"{path} holds rows of a CPU: they say nothing about speed")
            found[json.dumps([*row["key"], row["direction"]])] = row
    return list(found.values())


def load_cpu(paths: Iterable[Path]) -> list[Row]:
    """The rows of `nsa bench --target cpu` in some files, in their order."""
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return [row for row in rows if row.get("bench") in plot_cpu.BENCHES]


def best_dense(rows: list[Row], row: Row) -> float | None:
    """Median of the fastest right dense kernel on the same problem and pass."""
    stage = DENSE.get(row["stage"])
    same = ("heads", "tokens", "batch", "direction")
    times = [
        other["median_ms"]
        for other in rows
        if other["stage"] == stage
        and other["status"] == "ok"
        and all(other[name] == row[name] for name in same)
    ]
    return min(times, default=None)


def entry(row: Row | None) -> str:
    """A cell of a table: the median, or why there is none. A wrong result has no time."""
    if row is None:
        return ""
    return f"{row['median_ms']:.3f}" if row["status"] == "ok" else MARKS[row["status"]]


def tables(rows: list[Row]) -> str:
    """One table per problem: stages and passes down, implementations across."""
    parts = []
    problems = dict.fromkeys((r["heads"], r["tokens"], r["dist"], r["batch"]) for r in rows)
    for heads, tokens, dist, batch in problems:
        mine = [
            r for r in rows if (r["heads"], r["tokens"], r["dist"], r["batch"]) ==
            (heads, tokens, dist, batch)
        ]  # fmt: skip
        peers = sorted(dict.fromkeys(r["peer"] for r in mine), key=lambda name: name != OWN)
        kind = f"decode, {batch} sequences" if batch > 1 else dist
        head = ["stage", "pass", *peers, "floor", "over floor", "best dense / ours"]
        lines = [f"#### {heads}, {tokens} tokens, {kind} (median ms)", ""]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for stage, direction in dict.fromkeys((r["stage"], r["direction"]) for r in mine):
            cells = {
                r["peer"]: r for r in mine if (r["stage"], r["direction"]) == (stage, direction)
            }
            lines.append("| " + " | ".join([stage, direction, *line(rows, cells, peers)]) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def line(rows: list[Row], cells: dict[str, Row], peers: list[str]) -> list[str]:
    """The cells of one stage and pass, the floor, and how ours stands to it and to dense."""
    floor = floor_of(next(iter(cells.values())))
    own = cells.get(OWN)
    ours = own["median_ms"] if own is not None and own["status"] == "ok" else None
    dense = best_dense(rows, own) if own is not None and ours else None
    return [
        *(entry(cells.get(name)) for name in peers),
        "" if floor is None else f"{floor:.3f}",
        f"{ours / floor:.1f}x" if ours and floor else "",
        f"{dense / ours:.1f}x" if ours and dense else "",
    ]


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Time of the whole against length, per head shape and pass: ours, the peers, dense."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    right = [r for r in rows if r["status"] == "ok" and r["batch"] == 1 and r["dist"] == "random"]
    for heads in dict.fromkeys(r["heads"] for r in right):
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
        for axis, direction in zip(axes, ("fwd", "bwd"), strict=True):
            for stage, style in (("nsa", "-o"), ("dense", "--s")):
                chosen = [
                    r for r in right
                    if (r["heads"], r["stage"], r["direction"]) == (heads, stage, direction)
                ]  # fmt: skip
                for peer in dict.fromkeys(r["peer"] for r in chosen):
                    points = sorted(
                        (r["tokens"], r["median_ms"]) for r in chosen if r["peer"] == peer
                    )
                    axis.plot(*zip(*points, strict=True), style, label=f"{peer} ({stage})")
            axis.set(xscale="log", yscale="log", xlabel="tokens", title=f"{heads} {direction}")
            axis.set_xscale("log", base=2)
            axis.grid(visible=True, which="both", alpha=0.3)
        axes[0].set_ylabel("median ms")
        if axes[0].get_legend_handles_labels()[0]:
            axes[0].legend(fontsize=7)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"h200-{heads.replace('/', '-')}.svg"
        figure.tight_layout()
        figure.savefig(path)
        pyplot.close(figure)
        written.append(path)
    return written


def replace_between(text: str, name: str, content: str) -> str:
    """The text with what stands between `<!-- name -->` and `<!-- /name -->` replaced.

    Raises:
        ValueError: a marker is missing.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"the page lacks the markers {begin} and {end}")
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{content}\n{end}{after}"


def render(rows: list[Row], figures: list[str]) -> str:
    """The results section: where and when, plots, tables."""
    first = rows[0]
    devices = ", ".join(dict.fromkeys(r["device"] for r in rows))
    revisions = ", ".join(dict.fromkeys(r.get("revision") or "unknown" for r in rows))
    versions = ", ".join(f"{name} {value}" for name, value in first["versions"].items())
    head = f"Measured on {devices}; {versions}; revision {revisions}; {first.get('when', '')[:10]}."
    images = "\n".join(f"![time against length]({name})" for name in figures)
    return f"\n{head}\n\n{images}\n\n{tables(rows)}\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, help="JSON lines; none: floors only")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/performance.md")
    parser.add_argument("--allow-cpu", action="store_true", help="for tests of this tool")
    args = parser.parse_args(argv)
    text = replace_between(args.page.read_text(), "floors", table())
    folder = args.page.parent / "figures"
    for marker, rows, draw, write in (
        ("results", load(args.results, args.allow_cpu), plot, render),
        ("cpu", load_cpu(args.results), plot_cpu.plot, plot_cpu.render),
    ):
        if rows:
            names = [str(path.relative_to(args.page.parent)) for path in draw(rows, folder)]
            text = replace_between(text, marker, write(rows, names))
    args.page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
