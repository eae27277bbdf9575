"""Operators of tiles for Triton's interpreter: its results by fewer checks.

Of `interpreted_shortcuts`, which says why: what brings two operands to one dtype and one shape, and
the operators themselves. This module imports Triton; import it only where that is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Member = tuple[Any, str, Any]

_SAME_WHEN_DIVIDED = (tl.float32, tl.float64, tl.int32, tl.int64)
_NUMBERS = (int, float)
_COMPARED = {"int32", "fp32"}
_CAST_BY_NUMPY = {"int32", "int64", "fp16", "fp32", "fp64"}
_MOST_CONSTANTS = 4096
_UFUNCS: dict[str, dict[str, Callable[[Any, Any], Any]]] = {
    "arithmetic": {
        "__add__": np.add, "__radd__": np.add, "__mul__": np.multiply, "__rmul__": np.multiply,
        "__sub__": np.subtract, "__rsub__": lambda x, y: np.subtract(y, x),
    },
    "comparison": {
        "__lt__": np.less, "__le__": np.less_equal, "__gt__": np.greater,
        "__ge__": np.greater_equal, "__eq__": np.equal, "__ne__": np.not_equal,
    },
    "logic": {"__and__": np.bitwise_and, "__or__": np.bitwise_or},
}  # fmt: skip


def operators(interpreted: Sequence[Member]) -> Iterator[Member]:
    """Every one, as (owner, name, member).

    Args:
        interpreted: what the interpreter puts into the language.
    """
    semantic = interpreter.TritonSemantic
    operands = _Operands(semantic.binary_op_type_checking_impl)
    yield semantic, "cast", _quick_cast(semantic.cast)
    yield semantic, "broadcast_impl_value", _quick_broadcast(semantic.broadcast_impl_value)
    yield semantic, "binary_op_type_checking_impl", operands.member()
    if interpreter.interpreter_builder.options.debug:
        return  # checks that no integer overflows
    slow = {name: member for owner, name, member in interpreted if owner is tl.tensor}
    for kind, ufuncs in _UFUNCS.items():
        for name, ufunc in ufuncs.items():
            member = _quick_operator(slow[name], operands.constants, ufunc, kind)
            yield tl.tensor, name, member


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


def _quick_cast(shipped: Callable[..., Any]) -> Callable[..., Any]:
    """`cast`, which asks for every kind of dtype there is before it leaves the cast to numpy."""

    def cast(self: Any, x: Any, dtype: Any, rounding: Any = None) -> Any:
        scalar = dtype.scalar
        if x.dtype is scalar:
            return x
        if rounding is None and {x.dtype.name, scalar.name} <= _CAST_BY_NUMPY:
            data = x.handle.data.astype(interpreter._get_np_dtype(scalar))
            into = x.type.with_element_ty(scalar) if isinstance(x.type, tl.block_type) else scalar
            return tl.tensor(interpreter.TensorHandle(data, scalar), into)
        return shipped(self, x, dtype, rounding)

    return cast


class _Operands:
    """`binary_op_type_checking_impl`, which brings both operands to one dtype and one shape.

    Two tensors of one dtype have it already. A number takes a dtype that depends on itself and on
    the tensor's alone, so each pair of them is asked once.
    """

    def __init__(self, shipped: Callable[..., Any]) -> None:
        self.shipped = shipped
        self.constants: dict[tuple[Any, ...], tuple[Any, Any]] = {}
        self.dtypes: dict[tuple[str, str, bool], Any] = {}

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
                if arithmetic and _is_plain(lhs):
                    return self.common(semantic, lhs, rhs, divided, ask)
            elif arithmetic and type(rhs) in _NUMBERS and _is_plain(lhs):
                return self.beside(semantic, lhs, rhs, 1, divided, ask)
            elif arithmetic and type(lhs) in _NUMBERS and _is_plain(rhs):
                return self.beside(semantic, rhs, lhs, 0, divided, ask)
            return ask()

        return operands

    def common(
        self, semantic: Any, lhs: Any, rhs: Any, divided: bool, ask: Callable[[], Any]
    ) -> Any:
        """Two tensors in their common dtype and shape."""
        key = (lhs.dtype.name, rhs.dtype.name, divided)
        if key not in self.dtypes:
            both = ask()
            self.dtypes[key] = both[0].dtype
            return both
        dtype = self.dtypes[key]
        return semantic.broadcast_impl_value(semantic.cast(lhs, dtype), semantic.cast(rhs, dtype))

    def beside(
        self, semantic: Any, x: Any, number: float, side: int, divided: bool, ask: Callable[[], Any]
    ) -> Any:
        """A tensor and a number, which stands on that side of it, in their common dtype and shape.

        Args:
            ask: what Triton makes of both.
        """
        if _is_signed_zero(number):
            return ask()
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


def _is_signed_zero(number: float) -> bool:
    """Whether it equals a number that it is not: 0.0 and -0.0 are one key of a dictionary."""
    return not number and type(number) is float


def _is_plain(x: Any) -> bool:
    """Whether it is a tensor, and not one of pointers."""
    return type(x) is tl.tensor and type(x.dtype) is tl.dtype


def _quick_operator(
    slow: Callable[..., Any],
    constants: dict[tuple[Any, ...], tuple[Any, Any]],
    ufunc: Callable[[Any, Any], Any],
    kind: str,
) -> Callable[..., Any]:
    """An operator of tensors: numpy's at once where both sides have one dtype and one shape.

    Args:
        slow: the same by way of the language.
        constants: numbers that are known beside a dtype (`_Operands`).
    """

    # Elsewhere a number takes its own dtype, and the tensor may have to follow.
    numbers = {"arithmetic": _NUMBERS, "comparison": (int,), "logic": ()}[kind]

    def operate(self: Any, other: Any, _semantic: Any = None) -> Any:
        dtype, into, left = self.dtype, self.type, self.handle
        if type(other) is tl.tensor:
            right = other.handle
            if dtype is not other.dtype or type(dtype) is not tl.dtype:
                if ufunc is np.add and type(dtype) is tl.pointer_type:
                    return _move(slow, self, other)
                return slow(self, other)
            if into is not other.type:
                mine, theirs = getattr(into, "_ints", None), getattr(other.type, "_ints", None)
                if mine != theirs:
                    if (mine and theirs) or not (left.dtype is right.dtype is dtype):
                        return slow(self, other)
                    into = into if mine else other.type
        elif type(other) in numbers and (kind == "arithmetic" or dtype.name in _COMPARED):
            found = constants.get((dtype.name, type(other), other, False))
            if found is None or not (dtype is found[0] is left.dtype) or _is_signed_zero(other):
                return slow(self, other)
            right = found[1]
        else:
            return slow(self, other)
        if left.data.dtype != right.data.dtype or (kind == "logic" and not dtype.is_int()):
            return slow(self, other)
        if kind == "arithmetic" and left.data.dtype.kind == "b":
            return slow(self, other)  # numpy's or; what one bit makes of 1 + 1 is Triton's to say
        if kind == "comparison":
            into = into.with_element_ty(tl.int1) if isinstance(into, tl.block_type) else tl.int1
        handle = interpreter.TensorHandle(ufunc(left.data, right.data), left.dtype.scalar)
        return tl.tensor(handle, into)

    return operate


def _move(slow: Callable[..., Any], pointers: Any, offsets: Any) -> Any:
    """Pointers of a block moved by signed offsets of its shape, or by one for all of them."""
    shape, other = getattr(pointers.type, "_ints", None), getattr(offsets.type, "_ints", None)
    if not offsets.dtype.is_int_signed() or shape is None or other not in (None, shape):
        return slow(pointers, offsets)
    handle = interpreter.interpreter_builder.create_addptr(pointers.handle, offsets.handle)
    return tl.tensor(handle, pointers.type)
