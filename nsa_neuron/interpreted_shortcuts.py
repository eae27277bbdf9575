"""Shorter ways through Triton's language for its interpreter, with the same results.

An interpreted kernel spends its time in the checks that Triton makes around every operation of a
tile, not in numpy. Each function here takes what Triton ships and gives what takes its place: the
common cases at once, everything else as shipped. `interpreted_language` puts them in place for the
time of a launch. This module imports Triton; import it only where that is there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Member = tuple[Any, str, Any]

_BUILTIN = tl.core.builtin(lambda: None).__code__
_SAME_WHEN_DIVIDED = (tl.float32, tl.float64, tl.int32, tl.int64)
_NUMBERS = (int, float)
_MOST_CONSTANTS = 4096


def shortcuts() -> list[Member]:
    """Every one, as (owner, name, member)."""
    builder, semantic = interpreter.interpreter_builder, interpreter.TritonSemantic
    unwrap, alike = tl.core._unwrap_if_constexpr, semantic.binary_op_type_checking_impl
    return [
        (interpreter, "_get_np_dtype", _remembering(interpreter._get_np_dtype)),
        (interpreter.TensorHandle, "__init__", _quick_handle(interpreter.TensorHandle)),
        (builder, "options", _without_idle_checks(builder.options)),
        (tl.core, "_unwrap_if_constexpr", _quick_unwrap(unwrap)),
        (tl.dtype, "__eq__", _identical_first(tl.dtype.__eq__)),
        (tl.tensor, "__init__", _quick_tensor(tl.tensor.__init__)),
        (tl.block_type, "__init__", _quick_block_type(tl.block_type.__init__)),
        (tl.block_type, "with_element_ty", _quick_sibling(tl.block_type.with_element_ty)),
        (semantic, "broadcast_impl_value", _quick_broadcast(semantic.broadcast_impl_value)),
        (semantic, "binary_op_type_checking_impl", _Operands(alike).member()),
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


def _quick_broadcast(shipped: Callable[..., Any]) -> Callable[..., Any]:
    """`broadcast_impl_value`, which walks through shapes as constants even if both are one."""

    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        mine = left._ints if isinstance(left, tl.block_type) else None
        theirs = right._ints if isinstance(right, tl.block_type) else None
        if mine == theirs:
            return lhs, rhs
        if mine is None:
            return _splat(lhs.handle, left, right), rhs
        if theirs is None:
            return lhs, _splat(rhs.handle, right, left)
        if len(mine) != len(theirs):
            return shipped(self, lhs, rhs)
        if any(a != b and 1 not in (a, b) for a, b in zip(mine, theirs, strict=True)):
            return shipped(self, lhs, rhs)  # refuses
        both = tuple(map(max, mine, theirs))
        return _spread(lhs, both), _spread(rhs, both)

    return broadcast


def _splat(handle: Any, scalar: Any, like: Any) -> Any:
    """A scalar of that type as a block of another one's shape."""
    data = np.full(like._ints, handle.data, interpreter._get_np_dtype(handle.dtype))
    return tl.tensor(
        interpreter.TensorHandle(data, handle.dtype.scalar), like.with_element_ty(scalar)
    )


def _spread(x: Any, shape: tuple[int, ...]) -> Any:
    """A block whose sides of one are repeated to that shape."""
    if x.type._ints == shape:
        return x
    handle = interpreter.TensorHandle(np.broadcast_to(x.handle.data, shape), x.handle.dtype.scalar)
    return tl.tensor(handle, tl.block_type(x.type.element_ty, list(shape)))


class _Operands:
    """`binary_op_type_checking_impl`, which brings both operands to one dtype and one shape.

    Two tensors of one dtype have it already. A number takes a dtype that depends on itself and on
    the tensor's alone, so each pair of them is asked once.
    """

    def __init__(self, shipped: Callable[..., Any]) -> None:
        self.shipped = shipped
        self.constants: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def member(self) -> Callable[..., Any]:
        def operands(
            semantic: Any, lhs: Any, rhs: Any, lhs_pointer: bool = False, rhs_pointer: bool = False,
            arithmetic: bool = True, divided: bool = False,
        ) -> Any:  # fmt: skip
            def ask() -> Any:
                more = lhs_pointer, rhs_pointer, arithmetic, divided
                return self.shipped(semantic, lhs, rhs, *more)

            if _is_plain(rhs) and type(lhs) is tl.tensor:
                same = lhs.dtype is rhs.dtype and (not divided or lhs.dtype in _SAME_WHEN_DIVIDED)
                moved = lhs_pointer and lhs.dtype.is_ptr() and rhs.dtype.is_int()
                if same or moved or (not arithmetic and _is_plain(lhs)):
                    return semantic.broadcast_impl_value(lhs, rhs)
            elif arithmetic and type(rhs) in _NUMBERS and _is_plain(lhs):
                return self.beside(semantic, lhs, rhs, 1, divided, ask)
            elif arithmetic and type(lhs) in _NUMBERS and _is_plain(rhs):
                return self.beside(semantic, rhs, lhs, 0, divided, ask)
            return ask()

        return operands

    def beside(
        self, semantic: Any, x: Any, number: float, side: int, divided: bool, ask: Callable[[], Any]
    ) -> Any:
        """A tensor and a number, which stands on that side of it, in their common dtype and shape.

        Args:
            ask: what Triton makes of both.
        """
        key = (x.dtype.name, type(number), number, divided)
        if key not in self.constants:
            both = ask()
            if len(self.constants) == _MOST_CONSTANTS:
                self.constants.clear()
            made = both[side]
            first = interpreter.TensorHandle(made.handle.data.flatten()[:1], made.handle.dtype)
            self.constants[key] = made.type.scalar, first
            return both
        dtype, handle = self.constants[key]
        if x.dtype is not dtype:
            x = semantic.cast(x, dtype)
        if isinstance(x.type, tl.block_type):
            constant = _splat(handle, dtype, x.type)
        else:
            constant = tl.tensor(handle.clone(), dtype)
        return (x, constant) if side else (constant, x)


def _is_plain(x: Any) -> bool:
    """Whether it is a tensor, and not one of pointers."""
    return type(x) is tl.tensor and type(x.dtype) is tl.dtype
