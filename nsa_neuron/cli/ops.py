"""What each operation takes, gives and costs.

Costs are counted from the sizes, not measured: floating-point operations of the matmuls, and every
byte read and written once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from nsa_neuron.cli import shared
from nsa_neuron.errors import NsaError
from nsa_neuron.ops import OPS, get
from nsa_neuron.spec import OpSpec, TensorArg
from nsa_neuron.terminal import table

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="*", help="names; default: all")
    shared.add_call(parser)
    shared.add_json(parser)


def run(args: argparse.Namespace) -> int:
    specs = [get(name) for name in args.op] or list(OPS)
    sizes = shared.sizes_of(args)
    scalars = shared.pairs(args.set, "--set")
    known = {arg.name for spec in OPS for arg in spec.scalars}
    if unknown := scalars.keys() - known:
        names = ", ".join(sorted(known))
        raise NsaError(f"--set: no op has a scalar argument '{min(unknown)}'; there are {names}")
    rows = [describe(spec, sizes, scalars, args.dtype, strict=bool(args.op)) for spec in specs]
    if args.json:
        shared.print_json(rows)
    elif args.op:
        print("\n\n".join(map(_page, rows)))
    else:
        print(_overview(rows))
    return 0


def describe(
    spec: OpSpec,
    sizes: Mapping[str, int],
    scalars: Mapping[str, str],
    dtype: torch.dtype,
    strict: bool,
) -> dict[str, Any]:
    """A spec and its cost at given sizes; not `strict`: scalars of other ops are passed over."""
    known = {arg.name for arg in spec.scalars}
    own = {name: text for name, text in scalars.items() if strict or name in known}
    bound = shared.bind(spec, sizes, own, dtype)
    cost = spec.cost(bound)
    return {
        "op": spec.name,
        "summary": (spec.reference.__doc__ or "").strip().splitlines()[0],
        "args": [_arg(spec, arg) for arg in spec.args],
        "returns": [
            {"name": name, "shape": list(shape), "dtype": str(kind).removeprefix("torch.")}
            for name, shape, kind in bound.returns()
        ],
        "backward": spec.backward,
        "call": {"shapes": bound.shapes, "dtype": str(dtype).removeprefix("torch.")},
        "cost": {"flops": cost.flops, "bytes": cost.bytes},
    }


def _arg(spec: OpSpec, arg: Any) -> dict[str, Any]:
    row = {"name": arg.name, "optional": arg.optional}
    if isinstance(arg, TensorArg):
        kind = {"float": "float", "stat": "float32", "i32": "int32"}[arg.dtype]
        return {**row, "kind": "tensor", "dims": arg.dims, "dtype": kind}
    row |= {"kind": arg.kind, "symbol": arg.symbol}
    if arg.name in spec.defaults:
        row["default"] = spec.defaults[arg.name]
    return row


def _overview(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        needed = (arg for arg in row["args"] if not arg["optional"] and "default" not in arg)
        args = ", ".join(arg["name"] for arg in needed)
        returns = ", ".join(item["name"] for item in row["returns"])
        lines.append([row["op"], args, returns, *_cost(row)])
    headers = ["op", "must be given", "returns", "GFLOP", "MB", "FLOP/byte"]
    note = "Costs are counted at the default sizes or those of --size; `nsa ops NAME` says more."
    return f"{table('', headers, lines)}\n{note}"


def _cost(row: Mapping[str, Any]) -> list[str]:
    flops, size = row["cost"]["flops"], row["cost"]["bytes"]
    return [f"{flops / 1e9:.2f}", f"{size / 1e6:.1f}", f"{flops / size:.1f}"]


def _page(row: Mapping[str, Any]) -> str:
    lines = []
    for arg in row["args"]:
        if arg["kind"] == "tensor":
            forms = [f"[{', '.join(form.split())}]" for form in arg["dims"].split("|")]
            what, kind = " or ".join(forms), arg["dtype"]
        else:
            what, kind = arg["symbol"], arg["kind"]
        default = f"{arg['default']}" if "default" in arg else ""
        lines.append([arg["name"], kind, what, default])
    headers = ["argument", "type", "dims or symbol", "default"]
    returns = ", ".join(f"{r['name']} {r['dtype']}{r['shape']}" for r in row["returns"])
    gflop, megabytes, intensity = _cost(row)
    return "\n".join(
        [
            f"{row['op']}: {row['summary']}",
            table("", headers, lines),
            f"returns {returns}",
            f"costs {gflop} GFLOP and {megabytes} MB at these sizes: {intensity} FLOP/byte",
        ]
    )
