"""What modelling time costs here, in CPU time: beside a simulation, and without data."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from nsa_neuron.bench.record import Record
from nsa_neuron.simulator import cost
from nsa_neuron.simulator.kernels import bench as kernels
from nsa_neuron.simulator.kernels.matmul import loads_hoisted
from nsa_neuron.simulator.machine.trn2 import machine_for
from nsa_neuron.simulator.nki.launching import simulate
from nsa_neuron.simulator.run import liveness
from nsa_neuron.simulator.run.arguments import ShapeDtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nsa_neuron.simulator.issue.record import Run
    from nsa_neuron.simulator.run.launch import Simulated

BENCH = "simulator"

TOKENS = 12_288  # some 27,000 instructions
MATRIX = 4096  # some 18,000
SIZES = (1_000, 10_000, 100_000, 300_000)  # instructions


def overhead(
    name: str, kernel: Callable[..., Any], arguments: Sequence[Any], rounds: int
) -> Record:
    """Time of a profile with data over that of its simulation.

    A profile is a simulation and three timelines of its record, so these are timed one after the
    other: the difference of two whole runs would drown in what else the machine does.
    """
    simulated = simulate(kernel)
    ratios = []
    for _ in range(rounds):
        base = _seconds(lambda: simulated(*arguments))
        ratios.append(1 + _seconds(lambda: cost.estimate(_run(simulated))) / base)
    count = len(_run(simulated).instructions)
    return Record.of(BENCH, f"{name}, profiled over simulated", "ratio", ratios, instructions=count)


def shape_only(rounds: int) -> list[Record]:
    """Thousands of instructions per second of CPU time, without data.

    Per kernel: the record alone, with the central timeline, and with all three of the band.
    """
    records = []
    loop = [(128, TOKENS), (128, TOKENS), (TOKENS, 128)]
    matrices = [(MATRIX, MATRIX), (MATRIX, MATRIX)]
    for name, kernel, sizes, dtype in (
        (f"attention {TOKENS}x128 bf16", kernels.attention, loop, "bfloat16"),
        (f"hoisted matmul {MATRIX} fp32", loads_hoisted, matrices, "float32"),
    ):
        shapes = [ShapeDtype(size, dtype) for size in sizes]
        record, central, band, facts = _rates(simulate(kernel, data=False), shapes, rounds)
        for what, values in (("recorded", record), ("timed", central), ("timed with band", band)):
            title = f"shape-only {name}, {what}"
            records.append(Record.of(BENCH, title, "1/ms", values, **facts))
    return records


def bookkeeping(rounds: int) -> list[Record]:
    """CPU time per instruction of what follows a run, from a thousand instructions on.

    Every instruction makes a tile at one of a few addresses, the worst case for the capacity of
    SBUF and for the search for tiles that destroy each other's data.
    """
    records = []
    for count in SIZES:
        simulated = simulate(kernels.rotating_tiles, data=False)
        with cost.paused_gc():
            simulated(ShapeDtype((128, 512), "bfloat16"), count)
            run = _run(simulated)
            check = partial(liveness.check, run.cores[0], machine_for(run.target))
            times = [_seconds(check) for _ in range(rounds)]
        title = f"bookkeeping after {count:,} instructions, each"
        records.append(Record.of(BENCH, title, "us", [t / count * 1e6 for t in times]))
    return records


def _rates(
    simulated: Simulated, shapes: Sequence[ShapeDtype], rounds: int
) -> tuple[list[float], list[float], list[float], dict[str, Any]]:
    """Instructions per ms: record, record and central timeline, record and three timelines."""
    record, central, band, count = [], [], [], 0
    for _ in range(rounds):
        with cost.paused_gc():
            base = _seconds(lambda: simulated(*shapes))
            run = _run(simulated)
            one = _seconds(lambda run=run: cost.central(run))  # type: ignore[misc]
            three = _seconds(lambda run=run: cost.estimate(run))  # type: ignore[misc]
        count = len(run.instructions)
        record.append(count / base / 1e3)
        central.append(count / (base + one) / 1e3)
        band.append(count / (base + three) / 1e3)
    return record, central, band, {"instructions": count}


def _run(simulated: Simulated) -> Run:
    """The record of the latest call."""
    assert simulated.run is not None
    return simulated.run


def _seconds(call: Callable[[], Any]) -> float:
    """CPU seconds, which other work on the machine disturbs less than wall time.

    Never 0: under a limit of CPU time (`ulimit -t`) the clock goes by the scheduler's ticks.
    """
    start = time.process_time()
    call()
    return max(time.process_time() - start, 1e-9)
