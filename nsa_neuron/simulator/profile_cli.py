"""`nsa profile`: the modelled timeline of a kernel, and `--validate`, the model against hardware.

Exit code 0 fine, 1 a rule is broken or a held-out figure is more than 20 % off, 2 could not be
carried out. Does not import torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from . import cost, loading
from .activation import activate
from .cli import FAILED, UNUSABLE, _refused, add_kernel_options
from .cost.validate import Comparison, table, validate
from .errors import SimulationError
from .launch import simulate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .cost import Estimate, Timeline
    from .record import Run


def profile_main(argv: Sequence[str]) -> int:
    """Carries out `nsa profile`."""
    parser = argparse.ArgumentParser(
        prog="nsa profile",
        description="Model where a NKI kernel spends its time on a Trainium2. Not a measurement.",
    )
    if "--validate" in argv:
        parser.add_argument("--json", action="store_true", help="print JSON instead of text")
        parser.add_argument("--validate", action="store_true", help="model published figures")
    else:
        add_kernel_options(parser)
        parser.add_argument(
            "--validate", action="store_true", help="model published figures instead of a kernel"
        )
        parser.add_argument(
            "--data", action="store_true", help="run with data: where control depends on it"
        )
        parser.add_argument(
            "--trips",
            type=int,
            metavar="N",
            help="without data, the value of registers that data would set (loop bounds)",
        )
    parser.add_argument("--params", choices=cost.SETS, default=cost.DEFAULT_SET)
    args = parser.parse_args(argv)
    if args.validate:
        return _validate(args)
    try:
        with (
            activate(args.target, relax=args.relax),
            loading.imported(loading.split(args.kernel)[0]) as module,
        ):
            facts = describe(_estimate(args, module))
    except SimulationError as error:
        return _refused(error, args.json)
    except (loading.LoadingError, ValueError) as error:
        print(f"nsa profile: {error}", file=sys.stderr)
        return UNUSABLE
    print(json.dumps(facts, indent=1) if args.json else text(facts))
    return 0


def _estimate(args: argparse.Namespace, module: Any) -> Estimate:
    kernel = loading.find_kernel(module, loading.split(args.kernel)[1])
    if args.lnc:
        kernel = kernel[args.lnc]
    values = loading.parse_arguments(kernel, args.arg, args.seed, args.data)
    trips = args.trips
    unknown = None if trips is None else lambda register: trips
    with cost.paused_gc():
        simulated = simulate(kernel, data=args.data, unknown=unknown)
        simulated(**values)
        assert simulated.run is not None
        estimate = cost.estimate(simulated.run, args.params)
    if trips is not None:
        for timeline in (estimate.low, estimate.central, estimate.high):
            timeline.assumptions.append(f"registers that data would set count as {trips}")
    return estimate


def describe(estimate: Estimate) -> dict[str, Any]:
    """The facts of an estimate, for JSON."""
    t = estimate.central
    return {
        "modelled": True,
        "kernel": t.run.kernel,
        "target": t.run.target,
        "params": t.parameters.set,
        "time_us": {k: v / 1e3 for k, v in asdict(estimate.band).items()},
        "instructions": len(t.instructions),
        "assumptions": t.assumptions,
        "cores": [_core(t, core, t.run) for core in range(t.run.lnc)],
    }


def _core(t: Timeline, core: int, run: Run) -> dict[str, Any]:
    lanes = {}
    for lane in dict.fromkeys(t.lanes):
        if len(t.members(lane, core)):
            lanes[lane] = {
                "instructions": len(t.members(lane, core)),
                "busy_us": t.busy(lane, core) / 1e3,
                "stall_us": {c.name: v / 1e3 for c, v in t.stalls(lane, core).items()},
            }
    return {
        "engines": lanes,
        "dma_bytes": run.cores[core].dma_bytes,
        "peak_bytes_per_partition": run.peaks[core],
    }


def text(facts: dict[str, Any]) -> str:
    """The facts as text."""
    time = facts["time_us"]
    lines = [
        f"{facts['kernel']} on {facts['target']}: {time['central']:.2f} us MODELLED, between "
        f"{time['low']:.2f} and {time['high']:.2f} (constants: {facts['params']}; not measured)",
        *(f"  assumed: {a}" for a in facts["assumptions"]),
    ]
    for number, core in enumerate(facts["cores"]):
        lines.append(f"  core {number}: DMA wrote {core['dma_bytes']:,} bytes")
        for name, lane in core["engines"].items():
            share = lane["busy_us"] / time["central"] if time["central"] else 0.0
            stalls = ", ".join(f"{c} {v:.2f}" for c, v in lane["stall_us"].items())
            lines.append(
                f"    {name:<11} {lane['instructions']:>8} instructions, busy "
                f"{lane['busy_us']:10.2f} us ({share:6.1%})"
                + (f"; waited us: {stalls}" if stalls else "")
            )
    return "\n".join(lines)


def _validate(args: argparse.Namespace) -> int:
    comparisons = list(validate(args.params))
    if args.json:
        print(json.dumps([_comparison(c) for c in comparisons], indent=1))
    else:
        print(table(comparisons))
    return FAILED if any(c.verdict == "MISS" for c in comparisons) else 0


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
