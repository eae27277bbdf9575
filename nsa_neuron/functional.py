"""The public functions: typed front doors of `torch.ops.nsa`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from nsa_neuron import library as _library
from nsa_neuron import ops
from nsa_neuron.errors import InvalidType
from nsa_neuron.ops import attention as _attention
from nsa_neuron.ops import compress as _compress
from nsa_neuron.ops import compressed_attention as _compressed
from nsa_neuron.ops import decode as _decode
from nsa_neuron.ops import gated_sum as _gated_sum
from nsa_neuron.ops import nsa_attention as _nsa_attention
from nsa_neuron.ops import select_blocks as _select_blocks
from nsa_neuron.ops import selected_attention as _selected
from nsa_neuron.ops import sliding_window_attention as _sliding
from nsa_neuron.spec import MAX_INT

P = ParamSpec("P")
R = TypeVar("R")

_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int, torch.SymInt),
    "float": (float, int, torch.SymFloat, torch.SymInt),
    "str": (str,),
}


def _public(reference: Callable[P, R]) -> Callable[P, R]:
    """The function that calls the op of a reference: same signature, same documentation.

    torch's dispatcher refuses wrong Python types with its own messages; they are refused here
    first, by the spec, so that every bad argument gives the same kind of error.
    """
    spec = ops.get(reference.__name__)
    op = getattr(getattr(torch.ops, _library.NAMESPACE), spec.name).default
    kinds = {arg.name: _KINDS[arg.kind] for arg in spec.scalars}
    names, optional = spec.names, {arg.name for arg in spec.args if arg.optional}
    required = tuple(name for name in names if name not in spec.defaults)

    @functools.wraps(reference)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        typed = len(args) <= len(names)
        for name, x in zip(names, args, strict=False):
            dense = isinstance(x, Tensor) and not x.is_nested
            typed = typed and (dense or (x is None and name in optional))
        for name, x in kwargs.items():
            right = isinstance(x, kinds.get(name, Tensor)) and not isinstance(x, bool)
            if isinstance(x, Tensor):
                right = right and not x.is_nested
            elif type(x) is int:
                right = right and x <= MAX_INT
            typed = typed and (right or (x is None and name in optional))
        missing = any(name not in kwargs for name in required[len(args) :])
        if missing or not typed:
            _explain(args, kwargs)
        result: R = op(*args, **kwargs)
        return result

    call.__module__ = __name__  # where pickle finds it; the reference is found at its own place

    def _explain(args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        try:
            given = inspect.signature(reference).bind(*args, **kwargs)
        except TypeError as error:  # a name that there is not, or one too few
            raise TypeError(f"{spec.name}: {error}") from None
        given.apply_defaults()
        spec.bind(given.arguments)
        raise InvalidType(spec.name, "*args", "of an unexpected type", "as documented")

    return call


compress = _public(_compress.compress)
compressed_attention = _public(_compressed.compressed_attention)
select_blocks = _public(_select_blocks.select_blocks)
selected_attention = _public(_selected.selected_attention)
sliding_window_attention = _public(_sliding.sliding_window_attention)
attention = _public(_attention.attention)
gated_sum = _public(_gated_sum.gated_sum)
nsa_attention = _public(_nsa_attention.nsa_attention)
decode = _public(_decode.decode)
