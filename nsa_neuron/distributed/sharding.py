"""DTensor sharding rules of every op, forward and backward, derived from its spec.

What may be sharded follows from the dims that a spec names. Sequences of a batch do not meet, and
neither do kv heads with their query heads, so an op may be sharded by `B`, or by `Hq` and `Hkv`
together; the gradient of what has neither axis (the weights of phi) is then a partial sum. Other
placements, sharded tokens among them, are redistributed to one of these or to replicas, by what
torch counts as cheapest. Sequence-parallel attention is `context_attention`, not a sharding rule.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from nsa_neuron import functional  # noqa: F401 - the ops exist once it is imported
from nsa_neuron.ops import OPS

if TYPE_CHECKING:
    from nsa_neuron.spec import OpSpec, Return

Placements = list[Placement | None]
Sharding = tuple[Placements, Placements]
HEADS = ("Hq", "Hkv")


def register() -> None:
    """Tells DTensor how each op of `torch.ops.nsa` may be sharded; doing it again is harmless."""
    for spec in OPS:
        register_sharding(getattr(torch.ops.nsa, spec.name).default)(_rule(spec))


def _rule(spec: OpSpec) -> Callable[..., Sequence[Sharding]]:
    def acceptable(*args: Any, **scalars: Any) -> Sequence[Sharding]:
        given = list(args) + [None] * (len(spec.tensors) - len(args))
        tensors = dict(zip((arg.name for arg in spec.tensors), given, strict=True))
        return shardings(spec, {k: x for k, x in tensors.items() if x is not None})

    return acceptable


def shardings(spec: OpSpec, tensors: dict[str, Any]) -> list[Sharding]:
    """Placements of results and of the given tensors that one mesh dimension may have.

    Args:
        spec: the op.
        tensors: DTensor's specs of the given tensors (`shape`, `mesh`), by name.
    """
    dims = {name: _dims(spec, name, tensor.ndim) for name, tensor in tensors.items()}
    sizes = {
        symbol: int(size)
        for name, tensor in tensors.items()
        for symbol, size in zip(dims[name], tensor.shape, strict=True)
    }
    found = [_placed(spec, dims, ())]
    if "B" in sizes and not any(name.startswith("cu_seqlens") for name in tensors):
        found.append(_placed(spec, dims, ("B",)))
    mesh = next(iter(tensors.values())).mesh
    if heads_split(sizes, tuple(mesh.shape)):
        found.append(_placed(spec, dims, HEADS))
    return found


def heads_split(sizes: dict[str, int], mesh: tuple[int, ...]) -> bool:
    """Whether kv heads stay with their query heads however many mesh dimensions share them.

    DTensor splits unevenly where a size does not divide, and then query heads would lie on another
    rank than their kv head. Without kv heads (`gated_sum`) any split is right.
    """
    if "Hkv" not in sizes or "Hq" not in sizes:
        return any(name in sizes for name in HEADS)
    parts = (
        math.prod(chosen)
        for count in range(1, len(mesh) + 1)
        for chosen in itertools.combinations(mesh, count)
    )
    return all(sizes["Hkv"] % part == 0 for part in parts if part <= sizes["Hkv"])


def _dims(spec: OpSpec, name: str, rank: int) -> tuple[str, ...]:
    return next(form for form in spec.tensor(name).forms if len(form) == rank)


def _placed(spec: OpSpec, dims: dict[str, tuple[str, ...]], axes: tuple[str, ...]) -> Sharding:
    """Results and tensors sharded along the axes that they have, replicated if they have none."""

    def of_return(item: Return) -> Placement:
        absent = bool(item.like) and item.like not in dims
        symbols = () if absent else dims[item.like] if item.like else tuple(item.dims.split())
        placement = _along(symbols, axes)
        # Only gradients lack the axis; each shard gives its part of them.
        return Partial() if axes and isinstance(placement, Replicate) and not absent else placement

    outputs: Placements = [of_return(item) for item in spec.returns]
    inputs: Placements = [_along(symbols, axes) for symbols in dims.values()]
    return outputs, inputs


def _along(symbols: tuple[str, ...], axes: tuple[str, ...]) -> Placement:
    """Sharded along the first of the symbols that is among the axes."""
    at = next((i for i, symbol in enumerate(symbols) if symbol in axes), None)
    return Replicate() if at is None else Shard(at)
