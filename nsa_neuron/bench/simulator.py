"""`nsa bench --simulator`: the simulator's time over plain NumPy on the same tiles, and its memory.

Both are run alternately in one process, so that a busy machine slows both; a record holds the
median over rounds. These are times of this computer, not of a NeuronCore.
"""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from nsa_neuron.bench import modelling
from nsa_neuron.bench.record import Record
from nsa_neuron.simulator.kernels import bench as kernels
from nsa_neuron.simulator.nki.launching import simulate
from nsa_neuron.terminal import table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BENCH = "simulator"
SMALL = 2000  # instructions of the overhead measurement


@dataclass(frozen=True)
class Case:
    """A kernel, the same in NumPy, its arguments, and how far the results may differ."""

    name: str
    kernel: Callable[..., Any]
    plain: Callable[..., Any]
    arguments: tuple[Any, ...]
    tolerance: float


def cases() -> list[Case]:
    """The kernels of the comparison; random normal inputs, seed 0."""
    rng = np.random.default_rng(0)

    def normal(dtype: Any, *shape: int) -> Any:
        return rng.standard_normal(shape).astype(dtype)

    bf16 = ml_dtypes.bfloat16
    return [
        Case(
            "matmul 1024x1024x1024 bf16",
            kernels.matmul,
            kernels.matmul_numpy,
            (normal(bf16, 1024, 1024), normal(bf16, 1024, 1024)),
            0.5,  # one bf16 step at the largest values, about 128
        ),
        Case(
            "softmax 4096x4096 fp32",
            kernels.softmax,
            kernels.softmax_numpy,
            (normal(np.float32, 4096, 4096),),
            1e-6,
        ),
        Case(
            "causal attention 2048x128 bf16",
            kernels.attention,
            kernels.attention_numpy,
            (normal(bf16, 128, 2048), normal(bf16, 128, 2048), normal(bf16, 2048, 128)),
            0.02,  # one bf16 step at values up to 4
        ),
    ]


def measure(rounds: int = 7) -> list[Record]:
    """Measures everything.

    Args:
        rounds: alternations of NumPy and simulator per case.
    """
    records: list[Record] = []
    for case in cases():
        records += _compare(case, rounds)
        records.append(_memory(case))
    records.append(_overhead(rounds))
    for case in cases():
        records.append(modelling.overhead(case.name, case.kernel, case.arguments, rounds))
    return records + modelling.shape_only(rounds) + modelling.bookkeeping(rounds)


def _compare(case: Case, rounds: int) -> list[Record]:
    """Ratio, time beyond NumPy per instruction, and both times."""
    simulated = simulate(case.kernel)
    error = np.abs(
        simulated(*case.arguments).astype(np.float64)
        - case.plain(*case.arguments).astype(np.float64)
    ).max()
    if not error <= case.tolerance:
        raise AssertionError(f"{case.name}: simulator and NumPy differ by {error}")
    assert simulated.run is not None
    count = len(simulated.run.instructions)
    plain, slow = [], []
    for _ in range(rounds):
        plain.append(_seconds(case.plain, case.arguments))
        slow.append(_seconds(simulated, case.arguments))
    facts = {"instructions": count, "max_abs_difference": float(error)}
    pairs = list(zip(plain, slow, strict=True))
    return [
        Record.of(BENCH, case.name, "ratio", [b / a for a, b in pairs], **facts),
        Record.of(BENCH, f"{case.name}, NumPy", "ms", [a * 1e3 for a in plain]),
        Record.of(BENCH, f"{case.name}, simulated", "ms", [b * 1e3 for b in slow]),
        Record.of(
            BENCH,
            f"{case.name}, beyond NumPy per instruction",
            "us",
            [(b - a) / count * 1e6 for a, b in pairs],
            **facts,
        ),
    ]


def _overhead(rounds: int) -> Record:
    """Time per instruction of one element, less NumPy's own for the same addition."""
    x = np.zeros((1, 1), np.float32)
    simulated = simulate(kernels.small_instructions)
    simulated(x, SMALL)
    per = []
    for _ in range(rounds):
        base = _seconds(kernels.small_instructions_numpy, (x, SMALL))
        per.append((_seconds(simulated, (x, SMALL)) - base) / SMALL * 1e6)
    name = "tensor_tensor of one element, beyond NumPy"
    return Record.of(BENCH, name, "us", per, instructions=SMALL)


def _memory(case: Case) -> Record:
    """Peak of allocated memory over the tensors simulated (arguments, results, live tiles)."""
    simulated = simulate(case.kernel)
    tracemalloc.start()
    try:
        result = simulated(*case.arguments)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    record = simulated.run
    assert record is not None
    arguments = sum(a.nbytes for a in case.arguments)
    tiles = sum(128 * (core["sbuf"] + core["psum"]) for core in record.peaks)
    tensors = arguments + result.nbytes + tiles
    facts = {"tensor_bytes": tensors, "peak_bytes": peak + arguments}
    ratio = (peak + arguments) / tensors
    return Record.of(BENCH, f"{case.name}, memory", "ratio", [ratio], **facts)


def _seconds(call: Callable[..., Any], arguments: Sequence[Any]) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def to_text(records: Sequence[Record]) -> str:
    """The aligned table of this benchmark's records; empty if there are none."""
    mine = [record for record in records if record.bench == BENCH]
    if not mine:
        return ""
    title = "the simulator against NumPy on the same tiles: median (20th to 80th percentile)"
    return table(title, ["what", "unit", ""], [[r.name, r.unit, str(r)] for r in mine])
