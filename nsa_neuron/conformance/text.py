"""A report as text: the matrix, the cells, the failures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nsa_neuron.conformance.between import worst_of_pairs
from nsa_neuron.conformance.outcome import Status
from nsa_neuron.terminal import table

if TYPE_CHECKING:
    from nsa_neuron.conformance.report import Cell, Report

SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
GLYPHS = {
    Status.PASS: "✓",
    Status.FAIL: "✗",
    Status.GAP: "△",
    Status.UNSUPPORTED: "–",
    Status.NOT_RUN: "·",
}
PARTIAL = "◐"
STYLES = {
    Status.PASS: "good",
    Status.FAIL: "bad",
    Status.GAP: "warn",
    Status.UNSUPPORTED: "dim",
    Status.NOT_RUN: "dim",
}
LEGEND = (
    f"{GLYPHS[Status.PASS]} pass   {PARTIAL} pass, some cases refused   {GLYPHS[Status.FAIL]} fail"
    f"   {GLYPHS[Status.GAP]} known gap   {GLYPHS[Status.UNSUPPORTED]} unsupported"
    f"   {GLYPHS[Status.NOT_RUN]} not run here"
)


def glyph(cell: Cell) -> str:
    """One character for a cell."""
    return PARTIAL if cell.partial else GLYPHS[cell.status]


def matrix(report: Report) -> str:
    """Ops x targets, one glyph per dtype, and a legend."""
    found = {(cell.op, cell.target, cell.dtype): cell for cell in report.cells}
    ops = dict.fromkeys(cell.op for cell in report.cells)
    targets = [str(place.target) for place in report.places]
    dtypes = {
        target: list(dict.fromkeys(c.dtype for c in report.cells if c.target == target))
        for target in targets
    }
    rows, styles = [], []
    for op in ops:
        cells = [[found.get((op, t, dtype)) for dtype in dtypes[t]] for t in targets]
        marks = [[glyph(cell) if cell else " " for cell in each] for each in cells]
        rows.append([op, *("    ".join(each).rstrip() for each in marks)])
        failed = any(cell and cell.status is Status.FAIL for each in cells for cell in each)
        styles.append("bad" if failed else "")
    heads = [
        f"{target}\n{' '.join(SHORT[dtype] for dtype in dtypes[target])}" for target in targets
    ]
    return f"{table('', ['op', *heads], rows, styles)}\n{LEGEND}{_hindrances(report)}"


def _hindrances(report: Report) -> str:
    lines = [f"\n{p.target} was not run: {p.hindrance}" for p in report.places if p.hindrance]
    return "".join(lines)


def cell_table(report: Report) -> str:
    """One line per cell that was run: cases, worst error of its budget, or the reason."""
    cells = [cell for cell in report.cells if cell.status is not Status.NOT_RUN]
    rows = [
        [cell.op, cell.target, SHORT[cell.dtype], cell.status.value, _cases(cell), cell.summary]
        for cell in cells
    ]
    headers = ["op", "target", "dtype", "status", "cases", "worst error of its budget, or reason"]
    return table("", headers, rows, [STYLES[cell.status] for cell in cells])


def _cases(cell: Cell) -> str:
    passed = cell.counts[Status.PASS]
    others = [
        f"{n} {status.value}" for status, n in cell.counts.items() if status is not Status.PASS
    ]
    return ", ".join([f"{passed} pass", *others]) if passed else ", ".join(others)


def failures(report: Report) -> str:
    """One line per failed case; empty when there is none."""
    return "\n".join(
        f"FAIL {row.op} on {row.target} {SHORT[row.dtype]}, case {row.case}: {row.detail}"
        for row in report.failures
    )


def between(report: Report) -> str:
    """How far each pair of targets is apart, at the problem that uses most of the budget."""
    rows = [
        [
            a.one, a.other, a.op, SHORT[a.dtype], a.case, a.result,
            f"{a.difference:.2g} of {a.budget:.2g}",
        ]
        for a in worst_of_pairs(report.between)
    ]  # fmt: skip
    title = "furthest apart from each other (two that are right are within the budget)"
    heads = ["target", "target", "op", "dtype", "case", "result", "difference"]
    return table(title, heads, rows) if rows else ""


def refusals(report: Report) -> str:
    """What each target refuses, once per op and reason, with the number of cases."""
    counts: dict[tuple[str, str, str], int] = {}
    for row in report.rows:
        if row.status is Status.UNSUPPORTED:
            key = (row.target, row.op, row.detail)
            counts[key] = counts.get(key, 0) + 1
    rows = [[target, op, str(n), why] for (target, op, why), n in counts.items()]
    return table("refused", ["target", "op", "cases", "rule: reason"], rows) if rows else ""
