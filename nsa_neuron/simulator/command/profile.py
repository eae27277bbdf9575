"""`nsa profile`: the modelled timeline of a kernel; `--validate` holds the model against hardware.

Exit code 0 fine, 1 a rule is broken or a held-out figure is more than 20 % off, 2 could not be
carried out. Does not import torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import cost
from ..cost.validate import Comparison, not_run, table, validate
from ..profiler import diff, profile
from ..rules.errors import SimulationError
from ..run.activation import activate
from . import loading
from .simulate import FAILED, UNUSABLE, add_kernel_options, refused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..profiler import Profile


def profile_main(argv: Sequence[str]) -> int:
    """Carries out `nsa profile`."""
    args = _parser(argv).parse_args(argv)
    if args.constants:
        return _constants(args)
    if args.validate:
        return _validate(args)
    try:
        if args.diff:
            return _diff(args)
        with (
            activate(args.target, relax=args.relax, nki=args.nki),
            loading.imported(loading.split(args.kernel)[0]) as module,
        ):
            found = _profile(args, module)
            missing = _write(args, found)
            print(json.dumps(found.to_dict(), indent=1) if args.json else found)
            if missing:
                print(f"nsa profile: {missing}", file=sys.stderr)
                return UNUSABLE
    except BrokenPipeError:
        raise  # whoever read the output has read enough; `nsa` ends quietly
    except SimulationError as error:
        return refused(error, args.json)
    except (loading.LoadingError, ValueError, LookupError, OSError, ImportError) as error:
        print(f"nsa profile: {error}", file=sys.stderr)
        return UNUSABLE
    return 0


def _trips(text: str) -> cost.trips.TripCounts:
    """`cost.trips.parse`, whose own words argparse would leave out."""
    try:
        return cost.trips.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The options; a kernel is asked for only where one is profiled."""
    parser = argparse.ArgumentParser(
        prog="nsa profile",
        description="Model where a NKI kernel spends its time on a Trainium2. Not a measurement.",
    )
    parser.add_argument(
        "--validate", action="store_true", help="model published figures instead of a kernel"
    )
    parser.add_argument(
        "--diff",
        nargs=2,
        type=Path,
        metavar=("A.json", "B.json"),
        help="compare two saved profiles instead of running a kernel",
    )
    parser.add_argument("--params", choices=cost.SETS, default=cost.DEFAULT_SET)
    parser.add_argument(
        "--constants", action="store_true", help="list the constants: value, band, source"
    )
    if any(word in ("--validate", "--diff", "--constants") for word in argv):
        parser.add_argument("--json", action="store_true", help="print JSON instead of text")
        return parser
    add_kernel_options(parser)
    parser.add_argument(
        "--data", action="store_true", help="run with data: where control depends on it"
    )
    parser.add_argument(
        "--trips",
        type=_trips,
        metavar="N|N,N,..|draw:N,N,..",
        help="without data, values of registers that data would set (loop bounds): one for all, a "
        "trace, or a sample to draw from",
    )
    parser.add_argument(
        "--iterations",
        type=int,
        metavar="N",
        help="without data, run N iterations (8 or more) of each hardware loop and continue the "
        "rest at their pace",
    )
    parser.add_argument(
        "--constant",
        type=_constant,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="replace a constant of the model at all levels; may be repeated",
    )
    parser.add_argument("--save", type=Path, metavar="FILE.json", help="for a later --diff")
    parser.add_argument("--trace", type=Path, metavar="FILE.json", help="open in ui.perfetto.dev")
    parser.add_argument(
        "--html", type=Path, metavar="FILE.html", help="timeline, source, memory, advice: one page"
    )
    parser.add_argument("--png", type=Path, metavar="FILE.png", help="roofline, engines, memory")
    return parser


def _profile(args: argparse.Namespace, module: Any) -> Profile:
    kernel = loading.find_kernel(module, loading.split(args.kernel)[1])
    if args.lnc:
        kernel = kernel[args.lnc]
    values = loading.parse_arguments(kernel, args.arg, args.seed, args.data)
    options = {"params": args.params, "unknown": args.trips, "constants": dict(args.constant)}
    made = profile(kernel, data=args.data, iterations=args.iterations, **options)
    return made(**values)


def _constant(text: str) -> tuple[str, float]:
    """NAME=VALUE of `--constant`."""
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=VALUE, dma_run_time=1900") from None


def _constants(args: argparse.Namespace) -> int:
    """Lists the constants of a set."""
    facts = cost.load(args.params).describe()
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    for name, c in facts.items():
        low, _, high = c["low, central, high"]
        band = f" ({low:g} to {high:g})" if low != high else ""
        guess = "guess; " if c["guess"] else ""
        print(f"{name:22} {c['value']:g}{band} {c['unit']}  [{guess}{c['source']}]")
    return 0


def _write(args: argparse.Namespace, found: Profile) -> str:
    """Writes the files asked for; returns why the picture could not be drawn, "" if it could."""
    if args.save:
        found.save(args.save)
    if args.trace:
        found.trace(args.trace)
    if args.html:
        found.html(args.html)
    if args.png:
        try:
            found.png(args.png)
        except ImportError as error:
            return str(error)
    return ""


def _diff(args: argparse.Namespace) -> int:
    one, other = map(diff.load, args.diff)
    found = diff.compare(one, other, [str(path) for path in args.diff])
    print(json.dumps(found, indent=1) if args.json else diff.render(found))
    return 0


def _validate(args: argparse.Namespace) -> int:
    comparisons = list(validate(args.params))
    if args.json:
        left = [{"kernel": name, "verdict": "not run"} for name in not_run()]
        print(json.dumps([*map(_comparison, comparisons), *left], indent=1))
    else:
        print(table(comparisons))
    return FAILED if any(c.failed for c in comparisons) else 0


def _comparison(c: Comparison) -> dict[str, Any]:
    f = c.figure
    return {
        "kernel": c.case.name,
        "figure": f.name,
        "published": f.published,
        "unit": f.unit,
        "source": f.source,
        "role": f.role,
        "modelled": asdict(c.modelled),
        "ratio": c.ratio,
        "verdict": c.verdict,
        "note": f.note,
    }
