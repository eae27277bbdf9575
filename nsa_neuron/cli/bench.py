"""Measure on this machine: the operations (`--target cpu`) or the simulator (`--simulator`).

`--target cpu` measures what one call of torch.ops.nsa costs beyond an empty op, and the reference
NSA against scaled_dot_product_attention. `--simulator` measures the simulator's own time and memory
against NumPy doing the same arithmetic on the same tiles, and what profiling adds. Everything is
measured on this computer; modelled times of a NeuronCore come from `nsa profile`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nsa_neuron import bench, environment
from nsa_neuron.bench.record import Record
from nsa_neuron.cli import need_torch

if TYPE_CHECKING:
    import argparse

# What was measured, and what prints it.
Part = tuple[Sequence[Record], Callable[[Sequence[Record]], str]]


def configure(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--target", choices=("cpu",), help="measure here")
    what.add_argument(
        "--simulator",
        action="store_true",
        help="the simulator's speed and memory against NumPy's, measured here",
    )
    parser.add_argument(
        "--part", choices=("overhead", "attention"), help="one part of --target cpu only"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=150, help="interleaved rounds of overhead")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append JSON lines to a file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    here = environment.describe()
    parts = _simulator() if args.simulator else _cpu(args)
    records = [record for measured, _ in parts for record in measured]
    lines = bench.to_lines(records, here)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))
    texts = [to_text(measured) for measured, to_text in parts]
    print("\n".join(lines) if args.json else "\n\n".join([bench.head(here), *texts]))
    return 0


def _simulator() -> list[Part]:
    from nsa_neuron.bench import simulator

    return [(simulator.measure(), simulator.to_text)]


def _cpu(args: argparse.Namespace) -> list[Part]:
    need_torch("nsa bench --target cpu")
    from nsa_neuron.bench import attention, overhead

    parts: list[Part] = []
    if args.part in (None, "overhead"):
        parts.append((overhead.measure(rounds=args.rounds), overhead.to_text))
    if args.part in (None, "attention"):
        parts.append((attention.measure(args.tokens), attention.to_text))
    return parts
