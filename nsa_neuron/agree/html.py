"""An agreement as one self-contained web page: no script, no network."""

from __future__ import annotations

from html import escape
from string import Template
from typing import TYPE_CHECKING

from nsa_neuron import environment
from nsa_neuron.agree.report import BACKWARD, module_name
from nsa_neuron.agree.text import POLICY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nsa_neuron.agree.report import Agreement, Run

PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>nsa agree: $subject</title>
<style>
:root { color-scheme: light dark; --edge: #8884; --pass: #2da44e; --fail: #d1242f }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2.5rem auto;
  padding: 0 1.25rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
p { margin: .4rem 0 } .quiet { opacity: .7 } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid var(--edge);
  vertical-align: top }
.mono { font-family: ui-monospace, monospace; font-size: .92em }
.ok { color: var(--pass) } .bad { color: var(--fail); font-weight: 600 }
.bar { display: inline-block; width: 7rem; height: .5rem; background: #8881;
  border-radius: .25rem; margin-right: .5rem }
.bar i { display: block; height: 100%; border-radius: .25rem; background: var(--pass) }
.bar.bad i { background: var(--fail) }
</style>
<h1>nsa agree</h1>
<p><b>$subject</b>: $description</p>
<p class="$kind">$verdict</p>
<p class="quiet">$setting</p>
<p class="quiet">$policy</p>
$notes
$runs
</html>
""")


def page(agreement: Agreement) -> str:
    """The page as text."""
    parting = [run.target for run in agreement.runs if not run.ok]
    verdict = f"{', '.join(parting)}: parts" if parting else "every target agrees"
    return PAGE.substitute(
        subject=escape(agreement.subject),
        description=escape(agreement.description),
        kind="bad" if parting else "ok",
        verdict=escape(verdict),
        setting=escape(_setting()),
        policy=escape(POLICY),
        notes="".join(f"<p>{escape(note)}</p>" for note in agreement.notes),
        runs="\n".join(map(_run, agreement.runs)),
    )


def _setting() -> str:
    here = environment.describe()
    found = [f"{name} {version}" for name, version in environment.versions().items()]
    revision = [f"revision {here['revision']}"] if here["revision"] else []
    return " · ".join([str(here["cpu"]), *found, *revision])


def _run(run: Run) -> str:
    kind, word = ("ok", "agrees") if run.ok else ("bad", "parts")
    first = f"<p>First parts at {escape(run.first)}</p>" if run.first else ""
    calls = [
        [
            str(call.number), call.phase, escape(module_name(call.module)), call.op, call.status,
            _bar(call.error, call.budget, call.status == "right"),
            escape(call.detail), escape(call.inputs),
        ]
        for call in run.calls
    ]  # fmt: skip
    points = [
        [
            point.phase, ("gradient of " if point.phase == BACKWARD else "")
            + escape(module_name(point.name)), "within" if point.ok else "beyond",
            _bar(point.error, point.budget, point.ok), escape(point.detail),
        ]
        for point in run.points
    ]  # fmt: skip
    tokens = [
        [
            str(t.row), str(t.step), str(t.wanted), str(t.got), f"{t.margin:.3g}",
            "tie" if t.tie else "differs",
        ]
        for t in run.tokens
    ]  # fmt: skip
    return "\n".join(
        [
            f'<h2>{escape(run.target)}: <span class="{kind}">{word}</span></h2>',
            first,
            f"<p>{escape(run.failure)}</p>" if run.failure else "",
            _table("# phase module op verdict error detail inputs".split(), calls),
            _table(["phase", "module", "verdict", "error", "detail"], points),
            _table("row step wanted got margin verdict".split(), tokens),
        ]
    )


def _bar(error: float, budget: float, ok: bool) -> str:
    if not budget:
        return ""
    width = min(100.0, 100 * error / budget)
    kind = "bar" if ok else "bar bad"
    return (
        f'<span class="{kind}"><i style="width:{width:.0f}%"></i></span>{error:.2g} of {budget:.2g}'
    )


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    if not rows:
        return ""
    head = "".join(f"<th>{name}</th>" for name in headers)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>'
