"""An agreement for people, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nsa_neuron.agree.report import module_name
from nsa_neuron.terminal import table

if TYPE_CHECKING:
    from nsa_neuron.agree.report import Agreement, Run

SHOWN = 8  # wrong calls and parted modules of a run; --json has all
POLICY = (
    "The truth is a float64 run of the reference. A call or result may be off by twice the error\n"
    "of plain torch in its dtype plus rounding; calls are judged on the inputs that they got."
)


def to_text(agreement: Agreement) -> str:
    """Verdicts, then what parts first, then the calls, modules, gradients and tokens that part."""
    rows = [_summary(run) for run in agreement.runs]
    styles = ["good" if run.ok else "bad" for run in agreement.runs]
    headers = ["target", "nsa calls", "modules, gradients", "decoded", "verdict"]
    head = f"{agreement.subject}: {agreement.description}\n{POLICY}"
    parts = [head, table("", headers, rows, styles)]
    parts += [f"{run.target} first parts at {run.first}" for run in agreement.runs if not run.ok]
    parts += [text for run in agreement.runs if (text := _details(run))]
    if between := _between(agreement):
        parts.append(between)
    parts += agreement.notes
    return "\n\n".join(parts)


def _summary(run: Run) -> list[str]:
    bad = {"wrong": 0, "refused": 0}
    for call in run.bad_calls:
        bad[call.status] += 1
    calls = [f"{len(run.calls) - len(run.bad_calls)} right"]
    calls += [f"{count} {status}" for status, count in bad.items() if count]
    points = [f"{len(run.points) - len(run.parted)} within"]
    points += [f"{len(run.parted)} beyond"] if run.parted else []
    decoded = f"{run.decoded} each" if run.decoded else "-"
    if run.tokens:
        decoded += (
            f", {len(run.wrong_tokens)} differ, {len(run.tokens) - len(run.wrong_tokens)} tie"
        )
    verdict = "agrees" if run.ok else "PARTS"
    return [run.target, ", ".join(calls), ", ".join(points), decoded, verdict]


def _details(run: Run) -> str:
    lines = []
    for call in run.bad_calls[:SHOWN]:
        part = f" [{', '.join(call.parts)}]" if call.parts else ""
        lines.append(
            f"  {call.phase:8} call {call.number:3}  {module_name(call.module)}  {call.op}{part}\n"
            f"      {call.status}: {call.detail}\n      on {call.inputs}"
        )
    if run.saved:
        lines.append(f"  try it again: nsa agree {run.saved} --targets {run.target}")
    for point in run.parted[:SHOWN]:
        lines.append(f"  {point.phase:8} {module_name(point.name)}  {point.detail}")
    for token in run.tokens[:SHOWN]:
        kind = "tie" if token.tie else "differs"
        lines.append(
            f"  decode   row {token.row}, step {token.step}: {token.got}, not {token.wanted}: "
            f"{kind} (margin {token.margin:.3g}, ties up to {token.allowed:.3g})"
        )
    hidden = max(0, len(run.bad_calls) - SHOWN) + max(0, len(run.parted) - SHOWN)
    if hidden:
        lines.append(f"  ... and {hidden} more; --json has all")
    if run.failure:
        lines.append(f"  {run.failure}")
    return "\n".join([run.target, *lines]) if lines else ""


def _between(agreement: Agreement) -> str:
    pairs = [
        [one.target, other, f"{apart:.3g}"]
        for i, one in enumerate(agreement.runs)
        for other, apart in one.between.items()
        if other in [later.target for later in agreement.runs[i + 1 :]]
    ]
    title = "largest difference of the final output between targets"
    return table(title, ["target", "target", "difference"], pairs) if pairs else ""
