"""vmap of the registered ops: the mapped axis joins the batch axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from nsa_neuron.errors import UnsupportedTransform
from nsa_neuron.spec import OpSpec, TensorArg


def register_vmap(library: Library, qualified: str, spec: OpSpec) -> None:
    """Registers the vmap rule of an op."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
        folded = [
            _fold(spec, arg, x, dim, info.batch_size)
            for arg, x, dim in zip(spec.args, args, in_dims, strict=False)
        ]
        results = getattr(torch.ops.nsa, spec.name)(*folded, **kwargs)
        several = results if isinstance(results, tuple) else (results,)
        unfolded = tuple(_unfold(spec, i, x, info.batch_size) for i, x in enumerate(several))
        if not isinstance(results, tuple):
            return unfolded[0], 0
        return unfolded, (0,) * len(unfolded)

    torch.library.register_vmap(qualified, rule, lib=library)


def _fold(spec: OpSpec, arg: Any, x: Any, dim: int | None, size: int) -> Any:
    """Moves a mapped axis into B; what is not mapped is repeated along it."""
    if not isinstance(x, Tensor):
        return x
    if isinstance(arg, TensorArg) and arg.dims.split()[0] == "B":
        each = x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)
        return each.reshape(size * each.shape[1], *each.shape[2:])
    if dim is not None or arg.name.startswith("cu_seqlens"):
        what = "packed sequences" if arg.name.startswith("cu_seqlens") else f"a mapped '{arg.name}'"
        raise UnsupportedTransform(f"vmap of {spec.name} does not support {what}")
    return x


def _unfold(spec: OpSpec, index: int, x: Tensor, size: int) -> Tensor:
    item = spec.returns[index]
    dims = spec.tensor(item.like).dims if item.like else item.dims
    if x.dim() == 1 and x.shape[0] == 0:
        return x.expand(size, 0)
    if not dims.startswith("B "):
        raise UnsupportedTransform(
            f"vmap of {spec.name} cannot give a separate '{item.name}' for each mapped element; "
            "loop over them instead"
        )
    return x.reshape(size, x.shape[0] // size, *x.shape[1:])
