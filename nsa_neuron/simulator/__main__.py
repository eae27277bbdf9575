"""Run a script whose `import nki` means the simulator.

python -m nsa_neuron.simulator [--relax RULE] [--target trn2] [--nki 0.7] SCRIPT.py [ARGUMENT ...]
python -m nsa_neuron.simulator [options] -m MODULE [ARGUMENT ...]
python -m nsa_neuron.simulator --path
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nsa_neuron.simulator import activate
from nsa_neuron.simulator.rules.versions import NEWEST

if TYPE_CHECKING:
    from collections.abc import Sequence

UNUSABLE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Activates the simulator and runs the script as `__main__`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m nsa_neuron.simulator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python -m nsa_neuron.simulator [options] SCRIPT.py [ARGUMENT ...]",
    )
    parser.add_argument("--path", action="store_true", help="print the folder for PYTHONPATH")
    parser.add_argument("--relax", action="append", default=[], metavar="RULE")
    parser.add_argument(
        "--target", default=os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")
    )
    parser.add_argument("--nki", default=NEWEST, help=f"version of NKI (default {NEWEST})")
    parser.add_argument("-m", dest="module", metavar="MODULE", nargs=argparse.REMAINDER)
    parser.add_argument("script", nargs=argparse.REMAINDER, help="script and its arguments")
    args = parser.parse_args(argv)
    if args.path:
        print(Path(__file__).parent / "site")
        return 0
    words = args.module or args.script
    if not words:
        parser.print_usage(sys.stderr)
        return UNUSABLE
    if args.module is None and not Path(words[0]).exists():
        print(f"python -m nsa_neuron.simulator: no file {words[0]}", file=sys.stderr)
        return UNUSABLE
    try:
        active = activate(args.target, relax=args.relax, nki=args.nki)
    except ValueError as error:
        print(f"python -m nsa_neuron.simulator: {error}", file=sys.stderr)
        return UNUSABLE
    with active:
        _run(words, args.module is not None)
    return 0


def _run(words: Sequence[str], module: bool) -> None:
    """Runs a script or module as Python itself would."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = list(words)
    sys.path.insert(0, os.getcwd() if module else str(Path(words[0]).resolve().parent))
    try:
        if module:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path


if __name__ == "__main__":
    sys.exit(main())
