"""How a training step would spread over many accelerators: memory, bytes, modelled time.

Everything is counted or modelled: nothing was measured on such machines. Each number's source is
printed. For every number of devices: the best mesh that fits, and its neighbours.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from nsa_neuron.cli import shared, values
from nsa_neuron.distributed.plan.machines import MACHINES, Machine
from nsa_neuron.distributed.plan.model import ASSUMED, Problem, best, neighbours
from nsa_neuron.errors import NsaError
from nsa_neuron.terminal import table

if TYPE_CHECKING:
    from nsa_neuron.distributed.plan.model import Estimate

SIZES = ("layers", "dim", "hidden", "vocabulary", "heads", "kv_heads", "dk", "dv", "batch")
UNITS = {"K": 2**10, "M": 2**20}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=count, default=2**20, help="of a sequence; 64K, 1M")
    known = {f.name: f.default for f in dataclasses.fields(Problem)}
    for name in SIZES:
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=count, default=known[name], help=f"default {known[name]}")
    parser.add_argument("--target", choices=tuple(MACHINES), default="trn2")
    parser.add_argument(
        "--devices", nargs="+", default=["64"], help="numbers, or ranges of doublings: 16..4096"
    )
    parser.add_argument(
        "--rows", type=values.whole(0), default=6, help="neighbours shown; default 6"
    )
    shared.add_json(parser)


def run(args: argparse.Namespace) -> int:
    problem = Problem(tokens=args.tokens, **{name: getattr(args, name) for name in SIZES})
    machine = MACHINES[args.target]
    answers = []
    for devices in numbers(args.devices):
        found = best(problem, devices, machine)
        if not found:
            raise NsaError(f"--devices: no mesh of {devices} divides this model, batch and length")
        near = neighbours(found[0], found)[: args.rows]
        answers.append((devices, [found[0], *near]))
    if args.json:
        shared.print_json(
            {
                "modelled": True, "problem": dataclasses.asdict(problem), "target": machine.name,
                "sources": sources(machine),
                "plans": [
                    {"devices": n, "meshes": [as_data(e) for e in rows]} for n, rows in answers
                ],
            }
        )  # fmt: skip
        return 0
    print(header(problem, machine))
    for devices, rows in answers:
        print(f"\n{text(devices, rows, machine)}")
    print("\nSources and assumptions:")
    for line in sources(machine):
        print(f"  - {line}")
    return 0


def sources(machine: Machine) -> list[str]:
    """Where the numbers come from, and what is assumed."""
    return [*machine.sources, *(link.source for link in machine.links), *ASSUMED]


def count(word: str) -> int:
    """A whole number, `64K` or `1M`."""
    unit = UNITS.get(word[-1:].upper(), 1)
    digits = word[:-1] if unit > 1 else word
    if not digits.isdecimal() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"'{word}' is no whole number above 0, such as 64K or 1M")
    return int(digits) * unit


def numbers(words: list[str]) -> list[int]:
    """Numbers of devices; `16..4096` doubles from the first to the last."""
    found = []
    for word in words:
        first, dots, last = word.partition("..")
        bad = not first.isdecimal() or (dots and not last.isdecimal())
        if bad or not 1 <= int(first) <= int(last or first):
            raise NsaError(f"--devices: '{word}' is no number, nor a range such as 16..4096")
        at = int(first)
        while at <= int(last or first):
            found.append(at)
            at *= 2
    return found


def header(problem: Problem, machine: Machine) -> str:
    p = problem
    return (
        f"MODELLED, not measured: one training step of {p.batch} x {p.tokens} tokens, {p.layers} "
        f"layers, {p.parameters / 1e9:.1f} G parameters,\n"
        f"heads {p.heads}/{p.kv_heads}/{p.dk}/{p.dv}, bfloat16, every block run again in the "
        f"backward pass; device: {machine.device}"
    )


def text(devices: int, rows: list[Estimate], machine: Machine) -> str:
    """A table of meshes, the best first, and what it consists of."""
    chosen = rows[0]
    lines = [
        [
            mesh_name(e), f"{sum(e.memory.values()) / 1e9:.1f}" + ("" if e.fits else " too much"),
            *(f"{e.sent[axis] / 1e9:.2f}" for axis in ("tp", "cp", "dp", "pp")),
            f"{e.total:.3g}", e.bound,
        ]
        for e in rows
    ]  # fmt: skip
    columns = ["mesh pp x dp x cp x tp", "GB", "tp", "cp", "dp", "pp", "s / step", "bound by"]
    title = f"{devices} devices: GB per device, GB sent per device and step by axis, modelled time"
    parts = ", ".join(f"{name} {s:.3g} s" for name, s in chosen.seconds.items() if s > 0)
    memory = ", ".join(f"{name} {x / 1e9:.2f}" for name, x in chosen.memory.items())
    warning = "" if chosen.fits else "\n  NO MESH FITS: those of least memory are shown"
    return (
        f"{table(title, columns, lines)}{warning}\n  best: {parts}\n  its GB of "
        f"{machine.memory / 1e9:.0f}: {memory}"
    )


def mesh_name(e: Estimate) -> str:
    m = e.mesh
    return f"{m.pp} x {m.dp} x {m.cp} x {m.tp}"


def as_data(e: Estimate) -> dict[str, Any]:
    """Plain data."""
    return {
        "mesh": dataclasses.asdict(e.mesh), "fits": e.fits, "memory_bytes": e.memory,
        "sent_bytes": e.sent, "seconds": e.seconds, "seconds_per_step": e.total, "bound": e.bound,
    }  # fmt: skip
