"""Compile the Triton kernels at every shipped plan for an H200, on a machine without one.

Nothing is executed: this says that a kernel fits the machine, not how fast or how right it is.
Exit code 1 when a kernel has a problem.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from nsa_neuron import compile_check
from nsa_neuron.cli import FAILED, shared, values
from nsa_neuron.errors import NsaError
from nsa_neuron.terminal import progress, table

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--all", action="store_true",
        help="every dtype and group size at four pairs of head dims, packed or not (an hour of "
        "CPU time); default: what reaches every row of every plan, and every dtype",
    )  # fmt: skip
    parser.add_argument("--op", help="only the kernels of this op")
    parser.add_argument("--processes", type=values.whole(), default=_cores())
    shared.add_json(parser)


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(args: argparse.Namespace) -> int:
    every = compile_check.jobs(full=args.all)
    jobs = [job for job in every if args.op in (None, job.entry.op)]
    if not jobs:
        known = ", ".join(sorted({job.entry.op for job in every}))
        raise NsaError(f"--op: '{args.op}' has no kernel; there are those of {known}")
    rows = []
    with progress("compile-check", len(jobs)) as advance:
        for row in compile_check.run(jobs, args.processes):
            advance(f"{row.op} {row.kernel}")
            rows.append(row)
    if args.json:
        shared.print_json([asdict(row) for row in rows])
    else:
        print(_text(rows))
    left_over = compile_check.outlived(jobs, rows)
    print(*left_over, sep="\n", end="\n" * bool(left_over), file=sys.stderr)
    return FAILED if left_over or any(row.problems for row in rows) else 0


def _text(rows: list[compile_check.Row]) -> str:
    lines = [
        [
            row.op, row.kernel, f"{row.dk}/{row.dv}", str(row.group), row.dtype,
            *(
                "-" if value is None else str(value)
                for value in (row.shared_bytes, row.registers, row.local_bytes, row.products)
            ),
            row.verdict, row.exempt or "; ".join(row.accepted.values()),
        ]
        for row in rows
    ]  # fmt: skip
    styles = ["bad" if row.problems else "" for row in rows]
    headers = "op kernel Dk/Dv G dtype shared_B regs local_B products verdict".split()
    bad = sum(bool(row.problems) for row in rows)
    return "\n".join(
        [
            table(
                "compiled for sm_90, not run",
                [*headers, "why not wgmma, and what the plan accepts"],
                lines,
                styles,
            ),
            f"{len(rows)} kernels and plans, {bad} with a problem",
        ]
    )
