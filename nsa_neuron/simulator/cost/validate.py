"""`nsa profile --validate`: published figures against the model, with bands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..nki.launching import simulate
from .estimate import estimate, paused_gc
from .figures import CASES, HELD_OUT, Case, Figure
from .parameters import DEFAULT_SET
from .timeline import Band

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

GOAL, BOUND = 0.10, 0.20
_NS = {"ns": 1.0, "us": 1e3, "ms": 1e6}


@dataclass(frozen=True)
class Comparison:
    """A published figure and the modelled one.

    Attributes:
        case, figure: what is compared.
        modelled: in the figure's unit.
    """

    case: Case
    figure: Figure
    modelled: Band

    @property
    def ratio(self) -> float:
        """Modelled (central) over published."""
        return self.modelled.central / self.figure.published

    @property
    def verdict(self) -> str:
        """ "ok" within 10 %, "near" within 20 %, else "MISS"; "-" where it is only shown."""
        if self.figure.role != HELD_OUT:
            return "-"
        off = abs(self.ratio - 1)
        return "ok" if off <= GOAL else "near" if off <= BOUND else "MISS"


def compare(case: Case, params: str = DEFAULT_SET) -> list[Comparison]:
    """Run a case's kernel shape-only and compare its figures."""
    with paused_gc():
        simulated = simulate(case.kernel, data=False, relax=case.relax)
        simulated(*case.args)
    assert simulated.run is not None
    modelled = estimate(simulated.run, params)
    result = []
    for figure in case.figures:
        scale = _NS[figure.unit]
        low, central, high = (
            figure.measure(t) / scale for t in (modelled.low, modelled.central, modelled.high)
        )
        band = Band(min(low, central), central, max(high, central))
        result.append(Comparison(case, figure, band))
    return result


def validate(params: str = DEFAULT_SET, cases: Sequence[Case] = CASES) -> Iterator[Comparison]:
    """All comparisons, case by case."""
    for case in cases:
        yield from compare(case, params)


def table(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as text."""
    header = ("kernel", "figure", "published", "modelled", "low .. high", "ratio", "role", "")
    rows = [header]
    notes: list[str] = []
    last = ""
    for c in comparisons:
        f, m = c.figure, c.modelled
        mark = ""
        if f.note:
            if f.note not in notes:
                notes.append(f.note)
            mark = f" [{notes.index(f.note) + 1}]"
        rows.append(
            (
                c.case.name if c.case.name != last else "",
                f.name + mark,
                f"{f.published:.4g} {f.unit}",
                f"{m.central:.4g}",
                f"{m.low:.4g} .. {m.high:.4g}",
                f"{c.ratio:.3f}",
                f.role,
                c.verdict,
            )
        )
        last = c.case.name
    widths = [max(len(r[k]) for r in rows) for k in range(len(header))]
    lines = ["  ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    lines += [f"[{k}] {text}" for k, text in enumerate(notes, 1)]
    held = [c for c in comparisons if c.figure.role == HELD_OUT]
    worst = max(held, key=lambda c: abs(c.ratio - 1), default=None)
    if worst:
        within = sum(abs(c.ratio - 1) <= GOAL for c in held)
        lines.append(
            f"held out: {within} of {len(held)} within 10 %; furthest {worst.case.name}, "
            f"{worst.figure.name}: {worst.ratio:.3f}"
        )
    lines.append("Modelled, not measured: no figure here was run on hardware by this project.")
    return "\n".join(lines)
