"""`nsa simulate`; exit code 0 fine, 1 a rule is broken or a check fails, 2 not carried out.

Imports no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..machine.dtypes import resolve
from ..machine.trn2 import machine_for
from ..nki.launching import simulate
from ..rules.errors import SimulationError, SimulationWarning
from ..rules.session import PACKAGE
from ..rules.table import RULES
from ..rules.versions import NEWEST
from ..run.activation import activate
from ..run.arguments import ShapeDtype
from . import check, loading

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..issue.record import Run
    from ..run.launch import Simulated

FAILED, UNUSABLE = 1, 2


def add_kernel_options(parser: argparse.ArgumentParser) -> None:
    """Options that name a kernel and its call; `nsa profile` has them too."""
    parser.add_argument("kernel", metavar="FILE.py::KERNEL", help="the only kernel may go unnamed")
    parser.add_argument(
        "--arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"an argument of the kernel; may be repeated. VALUE: {loading.HELP}",
    )
    parser.add_argument("--lnc", type=int, choices=(1, 2), help="number of cores")
    parser.add_argument("--relax", action="append", default=[], metavar="RULE")
    parser.add_argument("--target", default="trn2", help="machine (default trn2)")
    parser.add_argument("--nki", default=NEWEST, help=f"version of NKI (default {NEWEST})")
    parser.add_argument("--seed", type=int, default=0, help="of random arguments (default 0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def simulate_main(argv: Sequence[str]) -> int:
    """Carries out `nsa simulate`."""
    parser = argparse.ArgumentParser(
        prog="nsa simulate",
        description="Run a NKI kernel on the simulator, strictly.",
        epilog=f"rules that can be relaxed: {', '.join(sorted(RULES))}",
    )
    add_kernel_options(parser)
    parser.add_argument(
        "--shape-only", action="store_true", help="check and count without data or arithmetic"
    )
    parser.add_argument("--strict", action="store_true", help="refuse what is only warned of")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write results as .npy files")
    parser.add_argument(
        "--check",
        metavar="FILE.py::FUNCTION",
        help="print the largest error against a NumPy function of the same arguments, and where",
    )
    parser.add_argument(
        "--within",
        type=float,
        metavar="X",
        help="with --check: end with code 1 where the error is above X of the largest magnitude",
    )
    args = parser.parse_args(argv)
    if args.within is not None and not args.check:
        parser.error("--within needs --check")
    if args.check and args.shape_only:
        parser.error("--check needs data, which --shape-only leaves out")
    try:
        with (
            warnings.catch_warnings(),  # printed with the rest of what the run says
            activate(args.target, relax=args.relax, strict=args.strict, nki=args.nki),
            loading.imported(loading.split(args.kernel)[0]) as module,
        ):
            warnings.simplefilter("ignore", SimulationWarning)
            return _simulate(args, module)
    except (loading.LoadingError, ValueError) as error:
        if isinstance(error, SimulationError):
            return refused(error, args.json)
        print(f"nsa simulate: {error}", file=sys.stderr)
        return UNUSABLE
    except SimulationError as error:
        return refused(error, args.json)
    except BrokenPipeError:
        raise
    except Exception as error:
        _print_without_simulator(error)
        return FAILED


def _simulate(args: argparse.Namespace, module: Any) -> int:
    kernel = loading.find_kernel(module, loading.split(args.kernel)[1])
    if args.lnc:
        kernel = kernel[args.lnc]
    values = loading.parse_arguments(kernel, args.arg, args.seed, not args.shape_only)
    want = _wanted(args.check, values) if args.check else []
    simulated = simulate(kernel, data=not args.shape_only)
    result = simulated(**values)
    results = () if result is None else result if isinstance(result, tuple) else (result,)
    facts = describe(simulated, results)
    lines = []
    if args.check:
        facts["check"] = check.compare(results, want, args.within)
        lines = check.text(facts["check"], args.check, args.within)
    if args.save and not args.shape_only:
        args.save.mkdir(parents=True, exist_ok=True)
        for i, array in enumerate(results):
            np.save(args.save / f"{kernel.fn.__name__}_{i}.npy", array)
    text = json.dumps(facts, indent=1, default=str) if args.json else _text(facts)
    print("\n".join([text, *([] if args.json else lines)]))
    return 0 if all(f["agrees"] for f in facts.get("check", ())) else FAILED


def _wanted(target: str, values: dict[str, Any]) -> list[Any]:
    """What the reference gives, before the kernel may change its arguments."""
    path, name = loading.split(target)
    with loading.imported(path) as module:
        return check.wanted(check.find_reference(module, name), values)


def describe(simulated: Simulated, results: Sequence[Any]) -> dict[str, Any]:
    """What a run did, for JSON."""
    run = simulated.run
    assert run is not None
    machine = machine_for(run.target)
    limits = {"sbuf": machine.sbuf_bytes, "psum": machine.psum_bytes}
    written = {a.allocation.id for i in run.instructions for a in i.writes}
    return {
        "kernel": run.kernel,
        "target": run.target,
        "nki": simulated.options.nki,
        "cores": run.lnc,
        "data": run.data,
        "arguments": [
            {"name": a.name, "shape": a.shape, "dtype": str(a.dtype), "written": a.id in written}
            for a in run.arguments
        ],
        "results": [_summary(array) for array in results],
        "instructions": len(run.instructions),
        "per_engine": dict(Counter(i.engine for i in run.instructions).most_common()),
        "per_opcode": dict(Counter(i.opcode for i in run.instructions).most_common()),
        "dma_bytes": run.dma_bytes,
        "peak_bytes_per_partition": [
            {k: {"live": core[k], "limit": limits[k]} for k in core} for core in run.peaks
        ],
        "relaxed": _relaxed(run),
        "warnings": list(dict.fromkeys(line for core in run.cores for line in core.warnings)),
    }


def _relaxed(run: Run) -> dict[str, int]:
    return dict(Counter(error.rule for core in run.cores for error in core.relaxed))


def _summary(array: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {"shape": list(array.shape), "dtype": str(resolve(array.dtype))}
    if isinstance(array, ShapeDtype):
        return facts
    wide = np.asarray(array).astype(np.float64)
    finite = wide[np.isfinite(wide)]
    if finite.size:
        facts |= {"min": float(finite.min()), "max": float(finite.max())}
        facts |= {"mean": float(finite.mean())}
    facts["not_finite"] = int(wide.size - finite.size)
    return facts


def _text(facts: dict[str, Any]) -> str:
    how = "simulated" if facts["data"] else "shapes only, no data"
    cores = f"{facts['cores']} core{'s' * (facts['cores'] > 1)}"
    lines = [f"{facts['kernel']} on {facts['target']}, NKI {facts['nki']}, {cores}: {how}"]
    for a in facts["arguments"]:
        note = "  (written by the kernel)" if a["written"] else ""
        lines.append(f"  argument {a['name']:<12} {a['dtype']} {list(a['shape'])}{note}")
    for i, r in enumerate(facts["results"]):
        numbers = ""
        if "min" in r:
            numbers = f"  min {r['min']:.6g}  max {r['max']:.6g}  mean {r['mean']:.6g}"
        if r.get("not_finite"):
            numbers += f"  {r['not_finite']} not finite"
        lines.append(f"  result {i:<14} {r['dtype']} {r['shape']}{numbers}")
    engines = ", ".join(f"{engine} {n}" for engine, n in facts["per_engine"].items())
    lines.append(f"  instructions {facts['instructions']} ({engines})")
    lines.append(f"  DMA wrote {facts['dma_bytes']:,} bytes")
    for i, core in enumerate(facts["peak_bytes_per_partition"]):
        peaks = ", ".join(f"{k.upper()} {v['live']:,} of {v['limit']:,}" for k, v in core.items())
        lines.append(f"  core {i} live at most, bytes per partition: {peaks}")
    for rule, count in facts["relaxed"].items():
        lines.append(f"  RELAXED {rule}: broken {count} times")
    lines.extend(f"  warning: {line}" for line in facts["warnings"])
    return "\n".join(lines)


def refused(error: SimulationError, as_json: bool) -> int:
    """Reports a broken rule."""
    if as_json:
        where = error.location
        facts = {
            "rule": error.rule,
            "source": error.source,
            "message": error.message,
            "instruction": error.instruction,
            "operand": error.operand,
            "value": error.value,
            "limit": error.limit,
            "hint": error.hint,
            "file": where.filename if where else None,
            "line": where.lineno if where else None,
            "operands": error.table,
        }
        print(json.dumps({"error": facts}, indent=1, default=str))
    else:
        print(f"refused: {error}", file=sys.stderr)
    return FAILED


def _print_without_simulator(error: Exception) -> None:
    """The traceback of an exception inside a kernel, without the simulator's own frames."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((PACKAGE, "<frozen"))]
    print("Traceback (most recent call last):", file=sys.stderr)
    print("".join(traceback.format_list(own or frames)), end="", file=sys.stderr)
    print("".join(traceback.format_exception_only(error)), end="", file=sys.stderr)
