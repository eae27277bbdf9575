"""`nsa bench --simulator`: the simulator's time over plain NumPy on the same tiles, and its memory.

Both are run alternately in one process, so that a busy machine slows both; a record holds the
median over rounds. These are times of this computer, not of a NeuronCore.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
import tracemalloc
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ..kernels import bench as kernels
from ..nki.launching import simulate
from . import bench_profile

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

SMALL = 2000  # instructions of the overhead measurement


@dataclass(frozen=True)
class Row:
    """One measured quantity.

    Attributes:
        name: what was measured.
        unit: "ratio", "us", "ms" or "1/ms".
        median, low, high: over the rounds; low and high are the 20th and 80th percentile.
        rounds: how many.
        facts: shapes, dtypes, instruction counts, threads.
    """

    name: str
    unit: str
    median: float
    low: float
    high: float
    rounds: int
    facts: dict[str, Any] = field(default_factory=dict)


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


def run(rounds: int = 7) -> list[Row]:
    """Measure everything.

    Args:
        rounds: alternations of NumPy and simulator per case.
    """
    rows: list[Row] = []
    for case in cases():
        rows += _compare(case, rounds)
        rows.append(_memory(case))
    rows.append(_overhead(rounds))
    rows += [_row(*measured) for measured in _modelling(rounds)]
    return rows


def _modelling(rounds: int) -> Iterator[bench_profile.Measurement]:
    """What the cycle model costs."""
    for case in cases():
        yield bench_profile.overhead(case.name, case.kernel, case.arguments, rounds)
    yield from bench_profile.shape_only(rounds)


def _compare(case: Case, rounds: int) -> list[Row]:
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
        _row(case.name, "ratio", [b / a for a, b in pairs], facts),
        _row(f"{case.name}, NumPy", "ms", [a * 1e3 for a in plain], {}),
        _row(f"{case.name}, simulated", "ms", [b * 1e3 for b in slow], {}),
        _row(
            f"{case.name}, beyond NumPy per instruction",
            "us",
            [(b - a) / count * 1e6 for a, b in pairs],
            facts,
        ),
    ]


def _overhead(rounds: int) -> Row:
    """Time per instruction of one element, less NumPy's own for the same addition."""
    x = np.zeros((1, 1), np.float32)
    simulated = simulate(kernels.small_instructions)
    simulated(x, SMALL)
    per = []
    for _ in range(rounds):
        base = _seconds(kernels.small_instructions_numpy, (x, SMALL))
        per.append((_seconds(simulated, (x, SMALL)) - base) / SMALL * 1e6)
    return _row("tensor_tensor of one element, beyond NumPy", "us", per, {"instructions": SMALL})


def _memory(case: Case) -> Row:
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
    return _row(f"{case.name}, memory", "ratio", [(peak + arguments) / tensors], facts)


def _seconds(call: Callable[..., Any], arguments: Sequence[Any]) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def _row(name: str, unit: str, values: Sequence[float], facts: dict[str, Any]) -> Row:
    low, high = (float(np.percentile(values, q)) for q in (20, 80))
    return Row(name, unit, statistics.median(values), low, high, len(values), facts)


def to_lines(rows: Sequence[Row]) -> list[str]:
    """Rows as JSON lines, each complete in itself."""
    here = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "note": "shared machine: other work ran at the same time",
    }
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return [
        json.dumps(
            {"bench": "simulator", **asdict(row), "kind": "measured", "when": when, "on": here}
        )
        for row in rows
    ]


def to_text(rows: Sequence[Row]) -> str:
    """Rows as an aligned table."""
    width = max(len(row.name) for row in rows)
    head = f"load {os.getloadavg()[0]:.2f}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}"
    lines = [f"simulator against NumPy on the same tiles, on this computer ({head})"]
    lines += [
        f"{row.name:{width}}  {row.median:8.2f} {row.unit:5} ({row.low:.2f} to {row.high:.2f})"
        for row in rows
    ]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> int:
    """Carries out `nsa bench --simulator`."""
    rows = run()
    lines = to_lines(rows)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))
    print("\n".join(lines) if args.json else to_text(rows))
    return 0
