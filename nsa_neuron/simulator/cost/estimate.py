"""From a record to an estimate: the timeline at the low, central and high end of the constants."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..machine.trn2 import machine_for
from .loops import Continued, continued
from .parameters import DEFAULT_SET, LEVELS, load
from .program import Program, analyse
from .schedule import schedule
from .timeline import Band, Timeline

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ..issue.record import Run


@dataclass(frozen=True)
class Estimate:
    """Modelled timelines of one run.

    Attributes:
        low, central, high: all constants at that end of their band.
        rest: at each level, what the iterations of hardware loops take that the run left out.
    """

    low: Timeline
    central: Timeline
    high: Timeline
    rest: tuple[Continued, Continued, Continued] = (Continued(), Continued(), Continued())

    @property
    def band(self) -> Band:
        """Total time in ns; sorted, since constants interact."""
        timelines = (self.low, self.central, self.high)
        low, central, high = (
            t.total + rest.added for t, rest in zip(timelines, self.rest, strict=True)
        )
        return Band(min(low, central), central, max(high, central))


@contextmanager
def paused_gc() -> Iterator[None]:
    """Keep the cyclic collector from walking millions of live records again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def estimate(
    run: Run, params: str = DEFAULT_SET, constants: Mapping[str, float] | None = None
) -> Estimate:
    """Model a run at all three levels.

    Args:
        run: a record, with or without data.
        params: "measured-3p" or "documented".
        constants: values that replace the set's at all levels, by name.

    Raises:
        ValueError: unknown parameter set or constant; a loop cut short whose pace has not settled.
    """
    given = tuple(sorted((constants or {}).items()))
    levels = [load(params, level, given) for level in LEVELS]
    with paused_gc():
        program = program_of(run)
        low, central, high = (schedule(program, p) for p in levels)
    if not any(core.trips for core in run.cores):
        return Estimate(low, central, high)
    rest = (continued(low), continued(central), continued(high))
    central.assumptions.append(rest[1].describe(central.total))
    return Estimate(low, central, high, rest)


def central(run: Run, params: str = DEFAULT_SET) -> Timeline:
    """Model a run with the central constants only, at a third of the work.

    Raises:
        ValueError: not all iterations of its loops were run, so a timeline is a part of the time.
    """
    if any(core.trips for core in run.cores):
        raise ValueError("a run of some iterations only has no timeline of its own: use estimate")
    with paused_gc():
        return schedule(program_of(run), load(params))


def program_of(run: Run) -> Program:
    """Dependencies of a run, for schedules with different constants."""
    return analyse(run, machine_for(run.target))
