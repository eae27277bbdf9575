"""Compiles every candidate of `tune_candidates.json` for an H200, on a machine without a GPU.

    python -m tools.check_candidates [--processes 2] [--only select_blocks]

What wins on a GPU becomes a tile plan, and plans must pass `nsa compile-check`: shared memory, no
spills inside loops, wgmma. A candidate that could not pass would waste the time that a GPU is lent
for. Columns below 64 are no problem here: that is a trade which only a measurement settles.
Exit status 1: a candidate has a problem.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from nsa_neuron import compile_check
from nsa_neuron.backends.cuda import plans
from nsa_neuron.backends.cuda.kernel_table import KERNELS, Shape
from nsa_neuron.backends.cuda.plan_points import Point
from tools import tune

if TYPE_CHECKING:
    from tools.tune_units import Unit

DIMS = ((192, 128), (128, 128))
GROUP = 16
DTYPE = "bfloat16"


def jobs(units: Iterable[Unit]) -> Iterator[compile_check.Job]:
    """What to compile: each candidate of each unit, as changes to the shipped constants."""
    entries = {(entry.op, entry.kernel): entry for entry in KERNELS}
    for unit in units:
        entry = entries[unit.op, unit.kernel]
        for dk, dv in DIMS:
            wanted: dict[str, Any] = {"dk": dk, "dv": dv, "dtype": DTYPE, "group": GROUP}
            shipped = plans.find("h200", unit.op, **wanted)[unit.kernel]
            accepts = plans.accepted("h200", unit.op, unit.kernel, **wanted) | {"narrow": "a trade"}
            for change in unit.candidates:
                constants = {**shipped, **change}
                arguments = entry.constants(Shape(dk, dv, GROUP, constants))
                point = Point(dk, dv, DTYPE, GROUP)
                yield compile_check.Job(entry, point, constants, arguments, accepts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", default="", help="op or op.kernel, separated by commas")
    args = parser.parse_args(argv)
    todo = list(jobs(tune.parse(["--only", args.only]).units))
    wrong = 0
    for row in compile_check.run(todo, args.processes):
        if row.problems:
            wrong += 1
            print(f"{row.op}.{row.kernel} {row.dk}/{row.dv} {row.constants}: {row.verdict}")
    print(f"{len(todo)} candidates, {wrong} with a problem")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
