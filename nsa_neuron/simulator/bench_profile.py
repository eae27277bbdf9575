"""What modelling time costs here, in CPU time: beside a simulation, and without data."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from . import bench_kernels as kernels
from . import cost
from .arguments import ShapeDtype
from .launch import simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .launch import Simulated
    from .record import Run

TOKENS = 12_288  # some 27,000 instructions

# name, unit, a value per round, facts
Measurement = tuple[str, str, list[float], dict[str, Any]]


def overhead(
    name: str, kernel: Callable[..., Any], arguments: Sequence[Any], rounds: int
) -> Measurement:
    """Time of a profile with data over that of its simulation.

    A profile is a simulation and three timelines of its record, so these are timed one after the
    other: the difference of two whole runs would drown in what else the machine does.
    """
    simulated = simulate(kernel)
    ratios = []
    for _ in range(rounds):
        base = _seconds(lambda: simulated(*arguments))
        ratios.append(1 + _seconds(lambda: cost.estimate(_run(simulated))) / base)
    facts = {"instructions": len(_run(simulated).instructions)}
    return f"{name}, profiled over simulated", "ratio", ratios, facts


def shape_only(rounds: int) -> Iterator[Measurement]:
    """Instructions per second without data: the record alone, and the record with one timeline."""
    sizes = ((128, TOKENS), (128, TOKENS), (TOKENS, 128))
    shapes = [ShapeDtype(size, "bfloat16") for size in sizes]
    simulated = simulate(kernels.attention, data=False)
    record, timed, count = [], [], 0

    def model() -> None:
        simulated(*shapes)
        cost.central(_run(simulated))

    for _ in range(rounds):
        with cost.paused_gc():
            first = _seconds(lambda: simulated(*shapes))
            second = _seconds(model)
        count = len(_run(simulated).instructions)
        record.append(count / first / 1e3)
        timed.append(count / second / 1e3)
    facts = {"instructions": count, "kernel": f"causal attention {TOKENS}x128 bf16"}
    yield "instructions recorded without data, thousands per second", "1/ms", record, facts
    yield "instructions recorded and timed, thousands per second", "1/ms", timed, facts


def _run(simulated: Simulated) -> Run:
    """The record of the latest call."""
    assert simulated.run is not None
    return simulated.run


def _seconds(call: Callable[[], Any]) -> float:
    """CPU seconds, which other work on the machine disturbs less than wall time."""
    start = time.process_time()
    call()
    return time.process_time() - start
