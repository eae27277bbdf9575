"""Cycle model: from the record of a run to a modelled timeline. Never a measurement.

    run = simulate(kernel, data=False)(...)  ->  .run
    estimate = cost.estimate(simulated.run)        # low, central and high timelines
    estimate.central.total                         # ns
    estimate.band.low, .central, .high             # ns

`parameters` holds every constant with unit, source and band; `instructions` and `dma` say what one
instruction costs; `dependencies` who waits for whom; `schedule` when; `timeline` is the result.
"""

from __future__ import annotations

from . import trips
from .estimate import Estimate, central, estimate, paused_gc, program_of
from .extrapolate import Extrapolation, extrapolate
from .guesses import guesses
from .parameters import CONSTANTS, DEFAULT_SET, LEVELS, SETS, Parameters, load
from .schedule import schedule
from .timeline import Band, Cause, Step, Timeline

__all__ = [
    "CONSTANTS",
    "DEFAULT_SET",
    "LEVELS",
    "SETS",
    "Band",
    "Cause",
    "Estimate",
    "Extrapolation",
    "Parameters",
    "Step",
    "Timeline",
    "central",
    "estimate",
    "extrapolate",
    "guesses",
    "load",
    "paused_gc",
    "program_of",
    "schedule",
    "trips",
]
