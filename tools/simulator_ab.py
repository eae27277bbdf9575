"""Shape-only timing of two versions of the simulator, by turns in one process.

    python -m tools.simulator_ab REVISION [--rounds 7] [--tokens 12288] [--matrix 4096]

The speed of a shared machine drifts by more than what a change is worth, so the simulator as it
stands and the one of REVISION (of this repository, from edd1381 on) time the same kernels by turns,
and the ratio of each pair counts. Times are CPU time of this machine.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NAME = "simulator_before"


def extract(revision: str, folder: Path) -> None:
    """Put the simulator of a revision into a folder, as a package of its own."""
    wanted = ["git", "archive", revision, "nsa_neuron/simulator"]
    archive = subprocess.run(wanted, cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    (folder / "nsa_neuron" / "simulator").rename(folder / NAME)


class Version:
    """The simulator in one package.

    Args:
        package: its dotted name.
        tokens: of attention.
        matrix: rows and columns of the matmul's operands.
    """

    def __init__(self, package: str, tokens: int, matrix: int) -> None:
        def module(name: str) -> Any:
            return importlib.import_module(f"{package}.{name}")

        self.cost = module("cost")
        shapes = module("run.arguments").ShapeDtype
        simulate = module("nki.launching").simulate
        sizes = [(128, tokens), (128, tokens), (tokens, 128)]
        self.kernels = {
            "attention": (
                simulate(module("kernels.bench").attention, data=False),
                [shapes(size, "bfloat16") for size in sizes],
            ),
            "hoisted matmul": (
                simulate(module("kernels.matmul").loads_hoisted, data=False),
                [shapes((matrix, matrix), "float32")] * 2,
            ),
        }

    def times(self, kernel: str) -> tuple[float, float, int]:
        """CPU seconds of a record and of its central timeline; instructions."""
        simulated, shapes = self.kernels[kernel]
        with self.cost.paused_gc():
            start = time.process_time()
            simulated(*shapes)
            recorded = time.process_time()
            run = simulated.run
            again = time.process_time()
            self.cost.central(run)
            timed = time.process_time()
        return recorded - start, timed - again, len(run.instructions)


def compare(old: Version, new: Version, kernel: str, rounds: int) -> str:
    """One line: both speeds at their best, and the median ratio of the pairs."""
    pairs = []
    for k in range(rounds + 1):
        order = (old, new) if k % 2 else (new, old)
        found = {version: version.times(kernel) for version in order}
        if k:  # the first warms up
            pairs.append((found[old], found[new]))
    count = pairs[0][1][2]
    ratio = statistics.median((b[0] + b[1]) / (a[0] + a[1]) for a, b in pairs)
    best = [min(side[k][0] + side[k][1] for side in pairs) for k in (0, 1)]
    before, now = (count / seconds / 1e3 for seconds in best)
    return (
        f"{kernel}: {count:,} instructions, {before:.1f} then and {now:.1f} thousand/s now at "
        f"their best; CPU time x {ratio:.3f} (median of {rounds} pairs)"
    )


def main(argv: list[str] | None = None) -> int:
    """Print one line per kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", help="what to compare with")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=12_288)
    parser.add_argument("--matrix", type=int, default=4096)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        extract(args.revision, Path(folder))
        sys.path.insert(0, folder)
        try:
            old = Version(NAME, args.tokens, args.matrix)
        finally:
            sys.path.remove(folder)
        new = Version("nsa_neuron.simulator", args.tokens, args.matrix)
        for kernel in new.kernels:
            print(compare(old, new, kernel, args.rounds), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
