"""Measure on this machine (`--target cpu`), or model on the simulator (`--simulator`).

`--target cpu` measures what one call of torch.ops.nsa costs beyond an empty op, and the reference
NSA against scaled_dot_product_attention. Measured times and modelled cycles never share a table.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from nsa_neuron.cli import exists, need_torch
from nsa_neuron.errors import NsaError

if TYPE_CHECKING:
    import argparse

SIMULATOR = "nsa_neuron.simulator.command.bench"


def configure(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--target", choices=("cpu",), help="measure here")
    what.add_argument("--simulator", action="store_true", help="modelled cycles of a NeuronCore")
    parser.add_argument(
        "--part", choices=("overhead", "attention"), help="one part of --target cpu only"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=150, help="interleaved rounds of overhead")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append JSON lines to a file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    if args.simulator:
        if not exists(SIMULATOR):
            raise NsaError("this version has no benchmark of the simulator")
        return int(importlib.import_module(SIMULATOR).main(args) or 0)
    need_torch("nsa bench --target cpu")
    from nsa_neuron import bench

    records = []
    if args.part in (None, "overhead"):
        records += bench.overhead.measure(rounds=args.rounds)
    if args.part in (None, "attention"):
        records += bench.attention.measure(args.tokens)
    lines = bench.to_lines(records)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))
    print("\n".join(lines) if args.json else bench.to_text(records))
    return 0
