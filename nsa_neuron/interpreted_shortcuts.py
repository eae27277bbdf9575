"""Shorter ways through Triton's language for its interpreter, with the same results.

An interpreted kernel spends its time in the checks that Triton makes around every operation of a
tile, not in numpy. Each function here takes what Triton ships and gives what takes its place: the
common cases at once, everything else as shipped. `interpreted_language` puts them in place for the
time of a launch. This module imports Triton; import it only where that is there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import triton.language as tl
from triton.runtime import interpreter

from nsa_neuron.interpreted_operators import Member, operators

if TYPE_CHECKING:
    import numpy as np

_BUILTIN = tl.core.builtin(lambda: None).__code__


def shortcuts(interpreted: Sequence[Member]) -> list[Member]:
    """Every one, as (owner, name, member).

    Args:
        interpreted: what the interpreter puts into the language.
    """
    builder, unwrap = interpreter.interpreter_builder, tl.core._unwrap_if_constexpr
    return [
        (interpreter, "_get_np_dtype", _remembering(interpreter._get_np_dtype)),
        (interpreter.TensorHandle, "__init__", _quick_handle(interpreter.TensorHandle)),
        (builder, "options", _without_idle_checks(builder.options)),
        (tl.core, "_unwrap_if_constexpr", _quick_unwrap(unwrap)),
        (tl.dtype, "__eq__", _identical_first(tl.dtype.__eq__)),
        (tl.tensor, "__init__", _quick_tensor(tl.tensor.__init__)),
        (tl.block_type, "__init__", _quick_block_type(tl.block_type.__init__)),
        (tl.block_type, "with_element_ty", _quick_sibling(tl.block_type.with_element_ty)),
        *operators(interpreted),
    ]


def direct(shipped: Any, interpreted: Any) -> Any:
    """A builtin of the language with the interpreter's semantic given, in one call.

    Args:
        shipped: the language's member, which refuses calls without a semantic.
        interpreted: what the interpreter puts in its place.
    """
    generic = getattr(interpreted, "__qualname__", "").startswith(interpreter._patch_attr.__name__)
    if not generic or getattr(shipped, "__code__", None) is not _BUILTIN:
        return interpreted
    function, semantic = shipped.__wrapped__, interpreter.interpreter_semantic

    def call(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
        return function(*args, _semantic=semantic, **kwargs)

    return call


def _without_idle_checks(options: Any) -> Any:
    """No check of every integer's overflow: without `debug` its verdict is thrown away."""
    return replace(options, sanitize_overflow=options.sanitize_overflow and options.debug)


def _remembering(shipped: Callable[[Any], np.dtype[Any]]) -> Callable[[Any], np.dtype[Any]]:
    """Triton's `_get_np_dtype`, which builds a table of all dtypes to look up one."""
    known = functools.cache(shipped)

    def numpy_dtype(dtype: Any) -> np.dtype[Any]:
        # Types of blocks and of pointers cannot be hashed.
        scalar = dtype.scalar
        return shipped(scalar) if isinstance(scalar, tl.pointer_type) else known(scalar)

    return numpy_dtype


def _quick_handle(handle: type) -> Callable[..., None]:
    """`TensorHandle.__init__`, which checks through two more calls that a value fits its dtype."""
    check = handle.__post_init__  # type: ignore[attr-defined]

    def init(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        self.data, self.dtype = data, dtype
        self.attr = {} if attr is None else attr
        if data.itemsize > 1 and not isinstance(dtype, tl.pointer_type):
            if data.itemsize * 8 > dtype.primitive_bitwidth:
                check(self)

    return init


def _quick_unwrap(shipped: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`_unwrap_if_constexpr`, which asks for lists and tuples before it asks for a constant."""
    plain = {int, float, bool, str, tl.tensor}

    def unwrap(x: Any) -> Any:
        kind = type(x)
        if kind in plain:
            return x
        return x.value if kind is tl.constexpr else shipped(x)

    return unwrap


def _identical_first(shipped: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """`dtype.__eq__`, which compares names: there is one object for each name of a scalar."""

    def equal(self: Any, other: Any) -> bool:
        return self is other or shipped(self, other)

    return equal


def _quick_tensor(shipped: Callable[..., None]) -> Callable[..., None]:
    """`tensor.__init__`, which builds its shape of constants; once per type of block is enough."""
    of_scalar: dict[str, Any] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        known = type._of_tensor if isinstance(type, tl.block_type) else of_scalar
        if not known:
            shipped(self, handle, type)
            known.update(shape=self.shape, numel=self.numel)
        mine = self.__dict__
        mine.update(known)
        mine["handle"], mine["type"], mine["dtype"] = handle, type, type.scalar

    return init


def _quick_block_type(shipped: Callable[..., None]) -> Callable[..., None]:
    """`block_type.__init__`, which checks its shape and spells its name; once is enough.

    Beside Triton's own members a type gets `_ints`, its shape as Python's tuple of whole numbers,
    `_of_tensor`, what every tensor of that shape has, and `_siblings`, this shape of other scalars.
    """
    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    by_shape: dict[tuple[int, ...], dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *shape)
        if key not in known:
            shipped(self, element_ty, shape)
            ints = tuple(int(size) for size in self.shape)
            shared = by_shape.setdefault(ints, {"_ints": ints, "_of_tensor": {}, "_siblings": {}})
            known[key] = {name: getattr(self, name) for name in ("shape", "numel", "name")} | shared
        mine = self.__dict__
        mine.update(known[key])
        mine["element_ty"] = element_ty

    return init


def _quick_sibling(shipped: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`block_type.with_element_ty`, which makes a new type each time."""

    def sibling(self: Any, scalar: Any) -> Any:
        if isinstance(scalar, tl.pointer_type):  # each launch brings its own
            return shipped(self, scalar)
        found = self._siblings.get(scalar.name)
        if found is None:
            found = self._siblings[scalar.name] = shipped(self, scalar)
        return found

    return sibling
