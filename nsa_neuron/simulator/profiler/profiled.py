"""`simulator.profile(kernel)(...)`: run a kernel, model its time, hand both back."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import cost
from ..nki.launching import simulate
from . import page, report, text, trace
from .advice import advise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ..cost import Band, Estimate, Timeline
    from ..issue.record import Run
    from ..rules.registers import RunTimeScalar
    from .advice import Advice, Together


class Profile:
    """The modelled time of one run of a kernel.

    Attributes:
        estimate: timelines at the low, central and high end of the constants.
        result: what the kernel returned: arrays, or `ShapeDtype` without data.
    """

    def __init__(self, estimate: Estimate, result: Any = None) -> None:
        self.estimate = estimate
        self.result = result

    @property
    def timeline(self) -> Timeline:
        """The central timeline."""
        return self.estimate.central

    @property
    def run(self) -> Run:
        """The record it was made from."""
        return self.timeline.run

    @property
    def time(self) -> Band:
        """Modelled time, ns."""
        return self.estimate.band

    @cached_property
    def _advised(self) -> tuple[list[Advice], Together | None]:
        with cost.paused_gc():
            return advise(self.timeline)

    @property
    def advice(self) -> list[Advice]:
        """What to change, by modelled gain, largest first."""
        return self._advised[0]

    @property
    def together(self) -> Together | None:
        """What several pieces of advice gain at once; None where fewer than two help."""
        return self._advised[1]

    @cached_property
    def _facts(self) -> dict[str, Any]:
        with cost.paused_gc():
            return report.describe(self.estimate)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers, lists and strings; `nsa profile --json` prints it."""
        together = self.together
        return {
            **self._facts,
            "advice": [a.to_dict() for a in self.advice],
            "together": together.to_dict() if together else None,
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` to a file, for `nsa profile --diff`."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    def trace(self, path: str | Path) -> None:
        """Write a trace for ui.perfetto.dev or chrome://tracing."""
        trace.write(self.timeline, path)

    def html(self, path: str | Path) -> None:
        """Write one self-contained page: timeline, source, memory, advice.

        Raises:
            ValueError: more instructions than a page holds.
        """
        Path(path).write_text(page.render(self.timeline, self.to_dict()), encoding="utf-8")

    def png(self, path: str | Path) -> None:
        """Draw roofline, engines and memory; needs matplotlib.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from . import plots

        plots.save(self.estimate, path)

    def __str__(self) -> str:
        return text.render(self.to_dict())

    def __repr__(self) -> str:
        return f"<Profile of {self.run.kernel}: {self.time} ns, modelled>"


class Profiled:
    """A kernel bound to simulator and cycle model; calling it profiles the kernel."""

    def __init__(
        self,
        kernel: Any,
        params: str,
        constants: Mapping[str, float],
        options: dict[str, Any],
        assumptions: Iterable[str],
    ) -> None:
        self.simulated = simulate(kernel, **options)
        self.params = params
        self.constants = constants
        cost.load(params, given=tuple(constants.items()))  # refuse before the kernel runs
        self.assumptions = list(assumptions)
        self.unknown = options.get("unknown")

    def __call__(self, *args: Any, **kwargs: Any) -> Profile:
        """Run the kernel and model its time.

        Raises:
            SimulationError: the kernel breaks a rule; without data also where control depends on
                data.
            ValueError: unknown parameter set.
        """
        with cost.paused_gc():
            result = self.simulated(*args, **kwargs)
            assert self.simulated.run is not None
            estimate = cost.estimate(self.simulated.run, self.params, self.constants)
        assumed = list(self.assumptions)
        assumed += [f"{name} = {value:g}, as given" for name, value in self.constants.items()]
        if isinstance(self.unknown, cost.trips.TripCounts):
            assumed.append(self.unknown.describe())
        for timeline in (estimate.low, estimate.central, estimate.high):
            timeline.assumptions.extend(assumed)
        return Profile(estimate, result)


def profile(
    kernel: Any,
    *,
    data: bool = False,
    params: str = cost.DEFAULT_SET,
    relax: Iterable[str] | None = None,
    target: str | None = None,
    nki: str | None = None,
    unknown: Callable[[RunTimeScalar], int] | None = None,
    iterations: int | None = None,
    constants: Mapping[str, float] | None = None,
    assumptions: Iterable[str] = (),
) -> Profiled:
    """Make a profiled version of a kernel.

    Args:
        kernel: decorated with `nki.jit`, `kernel[2]`, or a plain function.
        data: True computes the results as well; needed only where control depends on data.
        params: set of constants, "measured-3p" or "documented".
        relax: ids of rules to note instead of raise.
        target: machine, "trn2".
        nki: version of NKI, "0.6" or "0.7".
        unknown: without data: value of a register that data would have set; `cost.trips` makes
            them from a number, a trace or a distribution, and the report says which.
        iterations: without data: how many iterations of each hardware loop are run, at least 8; the
            rest is continued at the pace that they settle to.
        constants: values of the cycle model's constants that replace the set's, by name;
            `nsa profile --constants` lists them.
        assumptions: further sentences for the report.

    Raises:
        ValueError: unknown parameter set or constant.

    Example:
        >>> found = simulator.profile(kernel)(ShapeDtype((128, 512), "bfloat16"))
        >>> found.time.central                         # ns, modelled
    """
    options = {
        "data": data,
        "relax": relax,
        "target": target,
        "nki": nki,
        "unknown": unknown,
        "iterations": iterations,
    }
    return Profiled(kernel, params, constants or {}, options, assumptions)
