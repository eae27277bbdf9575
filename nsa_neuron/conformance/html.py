"""A report as one self-contained web page: no script, no network."""

from __future__ import annotations

from html import escape
from string import Template
from typing import TYPE_CHECKING

from nsa_neuron import environment
from nsa_neuron.conformance import history
from nsa_neuron.conformance.between import worst_of_pairs
from nsa_neuron.conformance.outcome import Status
from nsa_neuron.conformance.text import SHORT, glyph

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nsa_neuron.conformance.history import Past
    from nsa_neuron.conformance.report import Cell, Report

KINDS = {
    Status.PASS: "pass",
    Status.FAIL: "fail",
    Status.GAP: "gap",
    Status.UNSUPPORTED: "refused",
    Status.NOT_RUN: "idle",
}

PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>nsa-neuron conformance</title>
<style>
:root { color-scheme: light dark; --edge: #8884; --soft: #8881;
  --pass: #2da44e; --partial: #83b81a; --fail: #d1242f; --gap: #d4a017; --refused: #8c959f; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2.5rem auto;
  padding: 0 1.25rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
p { margin: .4rem 0 } .quiet { opacity: .7 }
.verdict { font-weight: 600 } .verdict.fail { color: var(--fail) }
.verdict.pass { color: var(--pass) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid var(--edge);
  vertical-align: top }
th { font-weight: 600 } td.num { font-variant-numeric: tabular-nums; white-space: nowrap }
code, .mono { font-family: ui-monospace, monospace; font-size: .92em }
.matrix td, .matrix th { white-space: nowrap; padding: .3rem .5rem }
.cell { display: inline-block; min-width: 2.2rem; margin: 0 .1rem; padding: .1rem .3rem;
  border-radius: .3rem; text-align: center; color: #fff; font-size: .8rem; cursor: help }
.cell.pass { background: var(--pass) } .cell.partial { background: var(--partial) }
.cell.fail { background: var(--fail) } .cell.gap { background: var(--gap) }
.cell.refused { background: var(--refused) }
.cell.idle { background: none; color: inherit; border: 1px dashed var(--edge) }
details { margin: .3rem 0; border: 1px solid var(--edge); border-radius: .4rem;
  padding: .4rem .8rem }
summary { cursor: pointer } summary .cell { cursor: pointer }
.bar { display: inline-block; width: 7rem; height: .5rem; background: var(--soft);
  border-radius: .25rem; margin-right: .5rem }
.bar i { display: block; height: 100%; border-radius: .25rem; background: var(--pass) }
</style>
<h1>nsa-neuron conformance</h1>
<p class="verdict $kind">$verdict</p>
<p class="quiet">$setting</p>
<p>$tried. Each case is judged against the float64 reference on the same inputs. The budget is twice
the error of plain torch in the same dtype plus a rounding band of the result.</p>
<h2>Matrix</h2>
<p>$legend</p>
<div class="scroll"><table class="matrix"><thead><tr><th>op</th>$heads</tr></thead>
<tbody>$rows</tbody></table></div>
$hindrances
$failures
$between
$history
<h2>Cells</h2>
$details
</html>
""")


def page(report: Report, past: Sequence[Past] = (), tried: str = "") -> str:
    """The page as text.

    Args:
        report: of now.
        past: earlier ones, oldest first.
        tried: which cases, ops and dtypes were chosen, in words; empty: all there are.
    """
    failed = len(report.failures)
    verdict = f"{failed} of {report.ran} cases fail" if failed else f"{report.ran} cases, no fail"
    targets = [str(place.target) for place in report.places]
    return PAGE.substitute(
        kind="pass" if report.ok else "fail",
        verdict=verdict,
        setting=escape(_setting()),
        tried=escape(f"A selection: {tried}" if tried else "Every case of every op"),
        legend=_legend(),
        heads="".join(f"<th>{escape(target)}</th>" for target in targets),
        rows=_rows(report, targets),
        hindrances=_hindrances(report),
        failures=_failures(report),
        between=_between(report),
        history=_history([*past, history.of(report.to_dict())]) if past else "",
        details="\n".join(_detail(cell) for cell in report.cells if cell.worst.case),
    )


def _setting() -> str:
    here = environment.describe()
    found = environment.versions()
    parts = [str(here["cpu"]), str(here["accelerator"]), f"Python {here['python']}"]
    parts += [f"{name} {version}" for name, version in found.items()]
    parts += [f"revision {here['revision']}"] if here["revision"] else []
    return " · ".join(part for part in parts if part)


def _badge(cell: Cell, text: str) -> str:
    kind = "partial" if cell.partial else KINDS[cell.status]
    title = escape(f"{cell.status.value}: {cell.summary}")
    return f'<span class="cell {kind}" title="{title}">{text}</span>'


def _legend() -> str:
    kinds = {**{KINDS[status]: status.value for status in Status}, "partial": "some cases refused"}
    return " ".join(f'<span class="cell {kind}">{text}</span>' for kind, text in kinds.items())


def _rows(report: Report, targets: list[str]) -> str:
    groups: dict[str, dict[str, list[Cell]]] = {}
    for cell in report.cells:
        groups.setdefault(cell.op, {}).setdefault(cell.target, []).append(cell)
    lines = []
    for op, by_target in groups.items():
        badges = (
            "".join(_badge(cell, SHORT[cell.dtype]) for cell in by_target.get(target, []))
            for target in targets
        )
        columns = "".join(f"<td>{each}</td>" for each in badges)
        lines.append(f'<tr><td class="mono">{escape(op)}</td>{columns}</tr>')
    return "\n".join(lines)


def _hindrances(report: Report) -> str:
    blocked = [place for place in report.places if place.hindrance]
    return "".join(
        f"<p><b>{escape(str(place.target))}</b> was not run: {escape(place.hindrance)}</p>"
        for place in blocked
    )


def _failures(report: Report) -> str:
    if report.ok:
        return ""
    lines = "".join(
        f'<tr><td class="mono">{escape(row.op)}</td><td>{escape(row.target)}</td>'
        f"<td>{SHORT[row.dtype]}</td><td>{escape(row.case)}</td><td>{escape(row.detail)}</td></tr>"
        for row in report.failures
    )
    return f'<h2>Failures</h2><div class="scroll"><table>{lines}</table></div>'


def _between(report: Report) -> str:
    rows = "".join(
        f"<tr><td>{escape(a.one)}</td><td>{escape(a.other)}</td>"
        f'<td class="mono">{escape(a.op)}</td><td>{SHORT[a.dtype]}</td><td>{escape(a.case)}</td>'
        f'<td class="num">{a.difference:.2g} of {a.budget:.2g}</td></tr>'
        for a in worst_of_pairs(report.between)
    )
    if not rows:
        return ""
    head = (
        "<h2>Targets against each other</h2><p>Where each pair is furthest apart; two that are "
        "right are within the budget.</p>"
    )
    return f'{head}<div class="scroll"><table>{rows}</table></div>'


def _history(reports: Sequence[Past]) -> str:
    """Cases by status of every report, newest first, and what changed since the one before."""
    targets = dict.fromkeys(target for past in reports for target in past.counts)
    lines = []
    for i, past in reversed([*enumerate(reports)]):
        cells = "".join(
            "<td>"
            + escape(", ".join(f"{n} {status}" for status, n in past.counts.get(t, {}).items()))
            + "</td>"
            for t in targets
        )
        changed = history.changes(reports[i - 1], past) if i else []
        words = "<br>".join(map(escape, changed)) or ("nothing" if i else "")
        lines.append(f'<tr><td class="mono">{escape(past.name)}</td>{cells}<td>{words}</td></tr>')
    heads = "".join(f"<th>{escape(target)}</th>" for target in targets)
    return (
        f'<h2>History</h2><div class="scroll"><table><tr><th>revision</th>{heads}<th>changed</th>'
        f"</tr>{''.join(lines)}</table></div>"
    )


def _detail(cell: Cell) -> str:
    lines = []
    for row in cell.outcomes:
        used = ""
        if row.error is not None and row.budget is not None:
            width = min(100.0, 100 * row.share)
            used = f'<span class="bar"><i style="width:{width:.0f}%"></i></span>'
            used += f"{row.error:.2g} of {row.budget:.2g}"
        lines.append(
            f"<tr><td>{escape(row.case)}</td><td>{row.status.value}</td>"
            f'<td class="num">{used}</td><td>{escape(row.result)}</td>'
            f'<td class="num">{row.seconds:.2f} s</td><td>{escape(row.detail)}</td></tr>'
        )
    opened = " open" if cell.status is Status.FAIL else ""
    head = f"<code>{escape(cell.op)}</code> on {escape(cell.target)}"
    return (
        f"<details{opened}><summary>{_badge(cell, f'{glyph(cell)} {SHORT[cell.dtype]}')} {head} "
        f'<span class="quiet">{escape(cell.summary)}</span></summary>'
        f'<div class="scroll"><table>{"".join(lines)}</table></div></details>'
    )
