"""Try every op on every backend; judge the results against float64, and against each other's.

Exit code: 0 no case fails, 1 some case fails, 2 wrong usage or nothing could be run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nsa_neuron import conformance
from nsa_neuron.cli import FAILED, UNUSABLE, shared, values
from nsa_neuron.conformance import history, html, text
from nsa_neuron.conformance.gaps import load_gaps
from nsa_neuron.conformance.problems import TAGS, problems
from nsa_neuron.errors import NsaError
from nsa_neuron.registry import REGISTRY

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        action="append",
        default=[],
        metavar="NAME[:MODE]",
        help="may be repeated; default: all there are",
    )
    parser.add_argument("--op", action="append", default=[], help="may be repeated; default: all")
    parser.add_argument("--case", help="one case only, by name")
    parser.add_argument(
        "--dtype",
        action="append",
        type=shared.dtype,
        help="may be repeated; default fp32, fp16, bf16, and fp64 on the reference",
    )
    parser.add_argument(
        "--tag", action="append", choices=TAGS, help="may be repeated; default: all of them"
    )
    parser.add_argument("--device", help="where tensors must lie; default: the target's own")
    parser.add_argument(
        "--known-gaps",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="known gaps of a third party's backend",
    )
    parser.add_argument("--html", type=values.new_file, metavar="FILE", help="write a page as well")
    parser.add_argument(
        "--history",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="earlier reports (--json) for the page",
    )
    parser.add_argument("--verbose", action="store_true", help="every cell and every refusal")
    shared.add_json(parser)


def run(args: argparse.Namespace) -> int:
    gaps = shared.pairs(args.known_gaps, "--known-gaps")
    past = history.load(args.history)
    if args.case and args.case not in (known := _cases(args)):
        raise NsaError(f"--case: no case '{args.case}'; there are {', '.join(known)}")
    report = conformance.run(
        args.backend,
        ops=args.op,
        dtypes=args.dtype,
        tags=args.tag,
        case=args.case,
        gaps={REGISTRY.resolve(name): load_gaps(path) for name, path in gaps.items()},
        device=args.device,
    )
    if args.html:
        args.html.write_text(html.page(report, past, _tried(args)), encoding="utf-8")
    if args.json:
        print(report.to_json())
    else:
        _print(report, args.verbose)
    if not report.ok:
        return FAILED
    return 0 if report.rows and report.ran else UNUSABLE


def _tried(args: argparse.Namespace) -> str:
    """What the options left of all cases, in words; empty: everything."""
    chosen = {
        "backend": args.backend,
        "op": args.op,
        "case": [args.case] if args.case else [],
        "dtype": [str(dtype).removeprefix("torch.") for dtype in args.dtype or ()],
        "cases tagged": args.tag or [],
    }
    return "; ".join(f"{name} {', '.join(values)}" for name, values in chosen.items() if values)


def _cases(args: argparse.Namespace) -> list[str]:
    """Names of the cases that the other options leave."""
    found = problems(args.op, tags=args.tag or TAGS)
    return list(dict.fromkeys(problem.case for problem in found))


def _print(report: conformance.Report, verbose: bool) -> None:
    if not report.rows:
        print("no case matches")
        return
    print(text.matrix(report))
    if verbose:
        print(f"\n{text.cell_table(report)}\n\n{text.refusals(report)}")
    if between := text.between(report):
        print(f"\n{between}")
    if not report.ok:
        print(f"\n{text.failures(report)}")
    verdict = f"{len(report.failures)} of {report.ran} cases fail"
    print(f"\n{verdict}" if report.ran else "\nnothing could be run here")
