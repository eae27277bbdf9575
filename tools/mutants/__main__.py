"""Plants faults in a copy of the project, one at a time, and runs the tests that should notice.

    make mutants                                    everything, on every core
    python -m tools.mutants --wing simulator        one wing
    python -m tools.mutants --name scale --show     which faults there are
    python -m tools.mutants --drawn 40 --seed 1     faults nobody chose, in every wing (`drawn`)

A fault is caught when its tests fail, crash or hit the limit of CPU time; it survives when they
pass. Tests that fail without the fault prove nothing and are an error. Outcomes are kept in
`build/mutants/outcomes.jsonl` and not run again while neither the fault nor the project changes.

Exit code: 0 every wing at 95 % or more, 1 a wing below, 2 faults that no longer match.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from .drawn import draw
from .faults import Fault, StaleFault, files, load, stale
from .runner import Runner
from .score import FLOOR, shares, table

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).parents[2]
WARM = ("torch", "numpy", "ml_dtypes", "hypothesis")  # not triton: its interpreter is chosen before


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        faults = _drawn(args) if args.drawn else _chosen(load(), args)
    except StaleFault as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    if problems := stale(faults, ROOT):
        print("\n".join(f"mutants: {problem}" for problem in problems), file=sys.stderr)
        return 2
    if args.show:
        print("\n".join(f"{fault!s:50} {fault.file}: {fault.why}" for fault in faults))
        return 0
    runner = Runner(ROOT, ROOT / "build" / "mutants", args.limit, args.wide, WARM)
    outcomes = runner.run(faults, args.workers, fresh=args.fresh)
    print(table(outcomes))
    return 0 if all(share >= FLOOR for share in shares(outcomes).values()) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutants", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--wing", action="append", help="may be repeated; default: all")
    parser.add_argument("--name", help="faults whose name contains this")
    parser.add_argument("--sample", type=int, metavar="N", help="N of them, always the same ones")
    parser.add_argument("--drawn", type=int, metavar="N", help="N drawn faults in each wing")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--limit", type=int, default=300, help="CPU seconds per run of tests")
    parser.add_argument("--wide", action="store_true", help="survivors meet their wing's tests too")
    parser.add_argument("--fresh", action="store_true", help="run again what is known")
    parser.add_argument("--show", action="store_true", help="list the faults, run nothing")
    return parser


def _chosen(faults: list[Fault], args: argparse.Namespace) -> list[Fault]:
    _check_wings(args.wing or (), {fault.wing for fault in faults})
    chosen = [
        fault for fault in faults
        if (not args.wing or fault.wing in args.wing) and (args.name or "") in fault.name
    ]  # fmt: skip
    if args.sample is not None and args.sample < len(chosen):
        chosen = sorted(Random(0).sample(chosen, args.sample), key=str)
    return chosen


def _drawn(args: argparse.Namespace) -> list[Fault]:
    recorded, wings = ROOT / "build" / "mutants" / "lines.json", files()
    _check_wings(args.wing or (), set(wings))
    if not recorded.is_file():
        raise StaleFault(f"no {recorded}: which tests execute which line is not recorded yet; "
                         "run python -m tools.mutants.lines")  # fmt: skip
    drawn = [
        draw(ROOT, wing, patterns, args.drawn, args.seed, recorded)
        for wing, patterns in wings.items() if not args.wing or wing in args.wing
    ]  # fmt: skip
    return [fault for each in drawn for fault in each if (args.name or "") in fault.name]


def _check_wings(asked: Iterable[str], wings: set[str]) -> None:
    for wing in asked:
        if wing not in wings:
            raise StaleFault(f"no wing '{wing}'; there are {', '.join(sorted(wings))}")


if __name__ == "__main__":
    raise SystemExit(main())
