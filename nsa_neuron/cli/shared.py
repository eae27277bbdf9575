"""What commands share: dtypes and sizes on the command line, calls of given sizes, JSON."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from nsa_neuron.errors import NsaError
from nsa_neuron.ops import OPS, common
from nsa_neuron.spec import FLOATS, MAX_INT, Bound, OpSpec

ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}
PAGES = {"cmp": 64, "slc": 256, "win": 64}
"""Rows of a page of each paged cache, unless given as `page_cmp` and so on."""
DEFAULT_SIZES = {"B": 1, "S": 8192, "Hq": 16, "Hkv": 1, "Dk": 128, "Dv": 128}
"""Of a typical call, unless its spec says otherwise (`OpSpec.typical`)."""
# Weights that `compress` needs; other optional tensors are absent unless asked for.
WEIGHTS = {"linear": ("w1",), "mlp": ("w1", "b1", "w2", "b2")}


def dtype(text: str) -> torch.dtype:
    """Parses a floating dtype: `bf16`, `bfloat16`, `torch.bfloat16`."""
    name = text.removeprefix("torch.")
    found = getattr(torch, ALIASES.get(name, name), None)
    if found not in FLOATS:
        raise argparse.ArgumentTypeError(f"no dtype '{text}'; there are {', '.join(ALIASES)}")
    return found  # type: ignore[no-any-return]


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def add_call(parser: argparse.ArgumentParser) -> None:
    """Options that describe a call's sizes."""
    shown = " ".join(f"{name}={size}" for name, size in DEFAULT_SIZES.items())
    parser.add_argument(
        "--size",
        nargs="+",
        default=[],
        metavar="SYMBOL=N",
        help=f"sizes by the contract's symbols (default {shown} T=S; decode: one new token, S=1)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="ARG=VALUE",
        help="scalar arguments, e.g. window=256",
    )
    parser.add_argument("--dtype", type=dtype, default=torch.bfloat16, help="default bf16")


def pairs(words: Sequence[str], option: str) -> dict[str, str]:
    """Parses `NAME=VALUE` words."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name or not value:
            raise NsaError(f"{option}: '{word}' is not of the form NAME=VALUE")
        found[name] = value
    return found


def sizes_of(args: argparse.Namespace) -> dict[str, int]:
    """Sizes from the command line.

    Raises:
        NsaError: a symbol that no op has, or what is no whole number.
    """
    given = {}
    for name, text in pairs(args.size, "--size").items():
        _known(name)
        if not text.isdecimal() or int(text) > MAX_INT:
            raise NsaError(f"--size: {name} is '{text}'; it must be a whole number up to {MAX_INT}")
        given[name] = int(text)
    return given


def _known(symbol: str) -> None:
    """Refuses what is the symbol of no dimension of any op."""
    words = {word for spec in OPS for arg in spec.tensors for form in arg.forms for word in form}
    known = sorted(word for word in words if not word.isdigit())
    if symbol in known:
        return
    scalars = {arg.symbol: arg.name for spec in OPS for arg in spec.scalars if arg.symbol}
    if symbol in scalars:
        name = scalars[symbol]
        raise NsaError(f"--size: {symbol} is the argument {name}: --set {name}=N")
    raise NsaError(f"--size: no op has a size '{symbol}'; there are {', '.join(known)}")


def bind(
    spec: OpSpec, sizes: Mapping[str, int], scalars: Mapping[str, str], dtype: torch.dtype
) -> Bound:
    """A call of given sizes; allocates nothing.

    Args:
        spec: the op.
        sizes: by symbol; others are those of a typical call of the op, or follow (`Nc`, `D`).
        scalars: scalar arguments as text.
        dtype: the call's floating dtype.

    Raises:
        NsaError: an unknown argument, or sizes that break the contract.
    """
    values: dict[str, Any] = {**dict.fromkeys(spec.names), **spec.defaults}
    kinds = {arg.name: arg.kind for arg in spec.scalars}
    for name, text in scalars.items():
        if name not in kinds:
            known = ", ".join(kinds) or "none"
            raise NsaError(f"{spec.name} has no scalar argument '{name}'; it has {known}")
        values[name] = _scalar(name, text, kinds[name])
    full = {**DEFAULT_SIZES, **spec.typical, **sizes}
    full.setdefault("T", full["S"])
    full |= {a.symbol: values[a.name] for a in spec.scalars if a.symbol and values[a.name]}
    values |= {a.name: full[a.symbol] for a in spec.scalars if a.symbol and values[a.name] is None}
    _derive(full)
    for arg in spec.tensors:
        if not arg.optional or arg.name in WEIGHTS.get(str(values.get("method")), ()):
            kind = {"float": dtype, "i32": torch.int32}.get(arg.dtype, _stat(dtype))
            shape = [full[s] if s in full else int(s) for s in arg.forms[0]]
            if math.prod(shape) >= 2**60:
                raise NsaError(f"{spec.name}: {arg.name} of shape {shape} is more than fits memory")
            values[arg.name] = torch.empty(shape, dtype=kind, device="meta")
    return spec.bind(values)


def on_device(bound: Bound, device: str) -> Bound:
    """The same call with its tensors on another device, which need not exist here.

    Raises:
        NsaError: no device type of that name.
    """
    # torch knows the name "neuron" only once AWS's package has given it to its private device.
    for name in (device, {"neuron": "privateuseone"}.get(device, device)):
        try:
            return replace(bound, device=torch.device(name))
        except RuntimeError:
            continue
    raise NsaError(f"no device type '{device}'")


def _scalar(name: str, text: str, kind: str) -> Any:
    try:
        return {"int": int, "float": float, "str": str}[kind](text)
    except ValueError:
        raise NsaError(f"--set: {name} is '{text}'; it must be of type {kind}") from None


def _stat(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _derive(sizes: dict[str, int]) -> None:
    """Adds the symbols that follow from others."""
    sizes.setdefault("D", sizes["Dk"])
    sizes.setdefault("F", sizes["D"])
    sizes.setdefault("n", 16)
    if "l" in sizes:
        sizes.setdefault("lD", sizes["l"] * sizes["D"])
        sizes.setdefault("Nc", common.compressed_blocks(sizes["T"], sizes["l"], sizes["d"]))
    for name, page in PAGES.items():
        rows = sizes.get("Nc", 0) if name == "cmp" else sizes["T"]
        page = sizes.setdefault(f"page_{name}", page)
        most = sizes.setdefault(f"most_{name}", max(1, -(-rows // max(1, page))))
        sizes.setdefault(f"pages_{name}", sizes["B"] * most)


def print_json(value: object) -> None:
    """Prints plain data; JSON has neither infinity nor NaN, which are written as text."""
    print(json.dumps(_finite(value), indent=1, default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return value
