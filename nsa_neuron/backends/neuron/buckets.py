"""Few static shapes for hardware: calls are filled up with tokens to one of a few lengths.

AWS's compiler makes a program for every shape, minutes each. So on a Trainium a call of S queries
and T keys runs as one of `of(S)` queries and `T - S + of(S)` keys: the new tokens lie behind all
others, where no query of the call sees them, and their results are cut off. A length is filled up
to the next of `STEPS` lengths per octave, so by at most an eighth; lengths up to `SMALLEST` share
one program.

Packed calls stay as they are: their sequences end where `cu_seqlens` says. So does `decode`, whose
shapes are the pools' and the tables'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from nsa_neuron.ops.common import compressed_blocks

if TYPE_CHECKING:
    from nsa_neuron.registry import Lowered
    from nsa_neuron.spec import Bound, OpSpec

STEPS = 8
SMALLEST = 128
NO_BLOCK = -1  # fills lists of block ids


def of(tokens: int) -> int:
    """The length that `tokens` are filled up to."""
    if tokens <= SMALLEST:
        return SMALLEST
    step = 1 << ((tokens - 1).bit_length() - STEPS.bit_length())
    return -(-tokens // step) * step


def padding(bound: Bound) -> int:
    """Tokens that a call is filled up with."""
    sizes = bound.sizes
    if "N1" in sizes or bound.spec.paged:
        return 0
    tokens = int(sizes["S"] if "S" in sizes else sizes["T"])
    return of(tokens) - tokens


def bucketed(spec: OpSpec, launch: Lowered) -> Lowered:
    """The launcher with calls filled up, and its results cut to what was asked for."""

    def call(**values: Any) -> Any:
        bound = spec.bind(values)
        more = padding(bound)
        if more == 0:
            return launch(**values)
        results = launch(**_filled(bound, values, more))
        several = isinstance(results, tuple)
        shapes = [shape for _, shape, _ in bound.returns()]
        pairs = zip(results if several else (results,), shapes, strict=True)
        cut = tuple(_cut(x, shape) for x, shape in pairs)
        return cut if several else cut[0]

    return call


def _filled(bound: Bound, values: dict[str, Any], more: int) -> dict[str, Any]:
    """The arguments of the longer call."""
    sizes = dict(bound.sizes)
    for symbol in ("S", "T"):
        if symbol in sizes:
            sizes[symbol] += more
    for symbol in ("Nc", "Nc_out"):
        if symbol in sizes:
            sizes[symbol] = compressed_blocks(sizes["T"], sizes["l"], sizes["d"])
    filled = dict(values)
    if filled.get("kv_len") is not None:
        filled["kv_len"] += more
    for arg in bound.spec.tensors:
        x = values.get(arg.name)
        if x is not None:
            form = next(form for form in arg.forms if len(form) == x.dim())
            shape = [sizes.get(symbol, n) for symbol, n in zip(form, x.shape, strict=True)]
            filled[arg.name] = _fill(x, shape, NO_BLOCK if arg.dtype == "i32" else 0)
    return filled


def _fill(x: Tensor, shape: list[int], value: int) -> Tensor:
    """x with `value` behind its end in every dimension."""
    behind = [want - have for want, have in zip(shape, x.shape, strict=True)]
    if not any(behind):
        return x
    pairs = [n for extra in reversed(behind) for n in (0, extra)]
    return F.pad(x, pairs, value=value)


def _cut(x: Tensor, shape: tuple[Any, ...]) -> Tensor:
    if tuple(x.shape) == shape:
        return x
    rows = tuple(slice(0, n) for n in shape)
    return x[rows].contiguous()
