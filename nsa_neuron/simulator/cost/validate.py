"""`nsa profile --validate`: published figures against the model, with bands."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..nki.launching import jit, simulate
from ..run.activation import activate
from .estimate import estimate, paused_gc
from .figures import CASES, HELD_OUT, Case, Figure
from .parameters import DEFAULT_SET
from .timeline import Band

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

GOAL, BOUND = 0.10, 0.20
_NS = {"ns": 1.0, "us": 1e3, "ms": 1e6, "GB/s": 1.0}


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
        """ "OUTSIDE" the band; held out, "ok" within 10 %, "near" within 20 %, else "MISS".

        "-" inside the band where nothing is held out.
        """
        if not self.modelled.low <= self.figure.published <= self.modelled.high:
            return "OUTSIDE"
        if self.figure.role != HELD_OUT:
            return "-"
        off = abs(self.ratio - 1)
        return "ok" if off <= GOAL else "near" if off <= BOUND else "MISS"

    @property
    def failed(self) -> bool:
        """The model contradicts the figure."""
        return self.verdict in ("MISS", "OUTSIDE")


def compare(case: Case, params: str = DEFAULT_SET) -> list[Comparison]:
    """Run a case's kernel shape-only and compare its figures.

    Raises:
        LookupError: the kernel is in a library that is not here.
    """
    with library_kernel(case.kernel) as kernel, paused_gc():
        simulated = simulate(jit(kernel)[case.lnc], data=False, relax=case.relax)
        simulated(*case.args, **dict(case.options))
    assert simulated.run is not None
    modelled = estimate(simulated.run, params)
    result = []
    for figure in case.figures:
        scale = case.times / _NS[figure.unit]
        levels = (modelled.low, modelled.central, modelled.high)
        measures = (figure.measure, figure.least, figure.most)
        found = [m(t) * scale for m in measures if m is not None for t in levels]
        band = Band(min(found), figure.measure(modelled.central) * scale, max(found))
        result.append(Comparison(case, figure, band))
    return result


@contextmanager
def library_kernel(kernel: Callable[..., Any] | str) -> Iterator[Any]:
    """A kernel, or the one that "module:name" names in the checkout of NKI_LIBRARY_PATH."""
    if not isinstance(kernel, str):
        yield kernel
        return
    folder = os.environ.get("NKI_LIBRARY_PATH")
    if not folder:
        raise LookupError("NKI_LIBRARY_PATH names no checkout of aws-neuron/nki-library")
    module, _, name = kernel.partition(":")
    before, path = set(sys.modules), list(sys.path)
    sys.path[:0] = [str(Path(folder) / "src" / "nkilib_src")]
    try:
        with activate():
            yield getattr(importlib.import_module(module), name)
    finally:
        sys.path[:] = path
        root = module.partition(".")[0]
        for added in [m for m in sys.modules if m not in before and m.split(".")[0] == root]:
            del sys.modules[added]


def validate(params: str = DEFAULT_SET, cases: Sequence[Case] = CASES) -> Iterator[Comparison]:
    """All comparisons, case by case, but for kernels of a library that is not here."""
    for case in cases:
        if runnable(case):
            yield from compare(case, params)


def runnable(case: Case) -> bool:
    """Whether its kernel is here."""
    return not isinstance(case.kernel, str) or bool(os.environ.get("NKI_LIBRARY_PATH"))


def not_run(cases: Sequence[Case] = CASES) -> list[str]:
    """Names of the cases that `validate` leaves out."""
    return [case.name for case in cases if not runnable(case)]


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
    left = not_run()
    if left:
        lines.append(
            f"not run: {len(left)} kernels ({left[0]}, ...): NKI_LIBRARY_PATH names no checkout of "
            "aws-neuron/nki-library"
        )
    inside = sum(not c.failed or c.verdict == "MISS" for c in comparisons)
    lines.append(f"inside their band: {inside} of {len(comparisons)}")
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
