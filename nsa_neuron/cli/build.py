"""Compile the C++ kernels of `cpu:native` now, instead of at first use.

They are kept in `$NSA_CACHE` (default: `nsa_neuron` in the user's cache folder), by torch's
version, sources, compiler flags and instruction set.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from nsa_neuron.backends.cpu.native_mode import build, extension
from nsa_neuron.cli import shared

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    shared.add_json(parser)


def run(args: argparse.Namespace) -> int:
    was_there = build.cached() is not None
    start = time.perf_counter()
    path = build.library()
    extension.load()
    seconds = time.perf_counter() - start
    facts = {
        "library": str(path),
        "instruction_set": build.instruction_set(),
        "compiled": not was_there,
        "seconds": round(seconds, 2),
    }
    if args.json:
        shared.print_json(facts)
    else:
        how = "was there already" if was_there else f"compiled in {seconds:.1f} s"
        print(f"{path} ({build.instruction_set()}): {how}")
    return 0
