"""Compile the Triton kernels at every shipped plan for an H200, on a machine without one.

Nothing is executed: this says that a kernel fits the machine, not how fast or how right it is.
Exit code 1 when a kernel has a problem.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from nsa_neuron import compile_check
from nsa_neuron.backends.cuda.kernel_table import KERNELS, PACKED_KERNELS
from nsa_neuron.cli import FAILED, shared
from nsa_neuron.terminal import progress, table

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    shared.add_json(parser)


def run(args: argparse.Namespace) -> int:
    rows = []
    entries, dims = list(KERNELS + PACKED_KERNELS), list(compile_check.HEAD_DIMS)
    with progress("compile-check", len(entries) * len(dims)) as advance:
        found = compile_check.iterate(
            entries, "h200", dims, list(compile_check.DTYPES), list(compile_check.GROUPS)
        )
        for row in found:
            advance(f"{row.op} {row.kernel}")
            rows.append(row)
    if args.json:
        shared.print_json([asdict(row) for row in rows])
    else:
        print(_text(rows))
    return FAILED if any(row.problems for row in rows) else 0


def _text(rows: list[compile_check.Row]) -> str:
    lines = [
        [
            row.op, row.kernel, f"{row.dk}/{row.dv}", str(row.group), row.dtype,
            *(
                "-" if value is None else str(value)
                for value in (row.shared_bytes, row.registers, row.local_bytes)
            ),
            row.verdict,
        ]
        for row in rows
    ]  # fmt: skip
    styles = ["bad" if row.problems else "" for row in rows]
    headers = "op kernel Dk/Dv G dtype shared_B regs local_B verdict".split()
    return table("compiled for sm_90, not run", headers, lines, styles)
