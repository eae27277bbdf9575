"""The ALU operators of DVE, POOL and ACT (docs/trainium2.md 5.1).

Decisions where no document speaks: ``maximum`` and ``minimum`` propagate NaN (as NumPy does);
shifts by the operand's width or more give 0; bitwise operands of different widths are zero-extended
bit patterns; 32-bit integer arithmetic on POOL wraps modulo 2**32.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..machine.dtypes import bits

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    F32 = NDArray[np.float32]
    Operand = F32 | np.float32 | float  # tensor or one constant for all elements
    Binary = Callable[[Any, Any], NDArray[Any]]
    Unary = Callable[[Any], NDArray[Any]]


def _comparison(ufunc: np.ufunc) -> Binary:
    """Comparison as the engines give it: 1.0 or 0.0."""

    def compare(a: Any, b: Any) -> NDArray[Any]:
        out: NDArray[Any] = ufunc(a, b).astype(np.float32)
        return out

    return compare


def _abs_pick(keep_first: Callable[[Any, Any], Any]) -> Binary:
    """The operand, sign kept, whose magnitude wins; the first one on a tie."""

    def pick(a: Any, b: Any) -> NDArray[Any]:
        out: NDArray[Any] = np.where(keep_first(np.abs(a), np.abs(b)), a, b)
        return out.astype(np.float32, copy=False)

    return pick


def rsqrt(x: Any) -> NDArray[Any]:
    """1 / sqrt(x) in fp32; rsqrt(0) = inf, of negatives NaN."""
    out: NDArray[Any] = np.divide(np.float32(1.0), np.sqrt(x))
    return out


BINARY: dict[str, Binary] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "power": np.power,
    "equal": _comparison(np.equal),
    "not_equal": _comparison(np.not_equal),
    "greater": _comparison(np.greater),
    "greater_equal": _comparison(np.greater_equal),
    "less": _comparison(np.less),
    "less_equal": _comparison(np.less_equal),
    "logical_and": _comparison(np.logical_and),
    "logical_or": _comparison(np.logical_or),
    "logical_xor": _comparison(np.logical_xor),
    "abs_max": _abs_pick(np.greater_equal),  # gen4
    "abs_min": _abs_pick(np.less_equal),  # gen4
    "divide": np.divide,  # simulation only: no engine has it
    "mod": np.mod,  # simulation only: sign of the divisor
    "fmod": np.fmod,  # simulation only: sign of the dividend
}
"""Arithmetic operators of two operands, fp32 -> fp32."""

UNARY: dict[str, Unary] = {
    "abs": np.abs,
    "rsqrt": rsqrt,
    "reciprocal": lambda x: np.divide(np.float32(1.0), x),
    "square": np.square,  # gen4 as an ALU operator
    "relu": lambda x: np.maximum(x, np.float32(0.0)),  # gen4 as an ALU operator
    "logical_not": lambda x: BINARY["equal"](x, np.float32(0.0)),
}
"""Arithmetic operators of one operand, fp32 -> fp32; a second operand is ignored."""

BITVEC_BINARY: dict[str, Binary] = {
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor,
    "left_shift": np.left_shift,  # NumPy gives 0 for shifts by the width or more
    "right_shift": np.right_shift,
}
"""Bit operators of two operands, unsigned integers of one width."""

BITVEC = frozenset({*BITVEC_BINARY, "invert"})
"""Names of all bit operators: raw bits in and out, no conversion."""

COMPARE: dict[str, np.ufunc] = {
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
}
"""Comparison operators as predicates (boolean result)."""

GEN4_ONLY = frozenset({"abs_max", "abs_min", "square", "relu"})
"""ALU operators of NeuronCore-v4 (``square`` and ``relu`` exist on gen3 as ACT functions)."""

SIMULATION_ONLY = frozenset({"divide", "mod", "fmod"})
"""Operators without hardware lowering; ``nl.divide`` and its kin simulate only."""

IDENTITY: dict[str, float] = {
    "add": 0.0,
    "subtract": 0.0,
    "multiply": 1.0,
    "maximum": -math.inf,
    "minimum": math.inf,
    "logical_and": 1.0,
    "logical_or": 0.0,
    "logical_xor": 0.0,
}
"""Start value of each arithmetic reduction (``tensor_scalar_reduce``, ``..._cumulative``)."""

_FOLD: dict[str, np.ufunc] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor,
}

REDUCTIONS = frozenset(_FOLD)
"""Operators that may reduce."""


def column(operand: Operand, ndim: int) -> Operand:
    """Shape a ``[P, 1]`` operand so that it broadcasts over ``ndim - 1`` free axes."""
    if isinstance(operand, np.ndarray):
        return operand.reshape(operand.shape[:1] + (1,) * (ndim - 1))
    return np.float32(operand)


def like(other: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Give the second tensor of an instruction the first one's shape (row-major order)."""
    return other if other.shape == shape else other.reshape(shape)


def apply(op: str, a: F32, b: Operand | None, reverse: bool = False, out: F32 | None = None) -> F32:
    """One arithmetic operator: ``a op b``, or ``b op a`` when reversed.

    Args:
        op: name in ``BINARY`` or ``UNARY``.
        a: fp32 tensor.
        b: fp32 tensor that broadcasts against ``a``, or a constant; ignored by unary operators.
        reverse: swap the operands; of unary operators, ignored.
        out: array of the result's shape that may become the result; may overlap the operands.
    """
    unary = UNARY.get(op)
    if unary is not None:
        return unary(a)
    function = BINARY[op]
    left, right = (b, a) if reverse else (a, b)
    if out is not None and isinstance(function, np.ufunc):
        return function(left, right, out=out)  # type: ignore[no-any-return]
    return function(left, right)


def scratch(out: F32 | None, *later: Any) -> F32 | None:
    """``out`` if a first step may write to it while ``later`` operands are still to be read."""
    if out is None or any(isinstance(x, np.ndarray) and np.may_share_memory(out, x) for x in later):
        return None
    return out


def fold(op: str, x: NDArray[Any], axes: tuple[int, ...]) -> NDArray[Any]:
    """Reduce over trailing axes, which disappear.

    Args:
        op: name in ``REDUCTIONS``.
        x: fp32 for arithmetic operators, unsigned integers for bit operators.
        axes: ascending, ending at the last axis.

    Returns:
        fp32, or ``x.dtype`` for bit operators. The order of additions is not documented: NumPy's
        pairwise order here. ``subtract`` is ``x[0] - x[1] - ...``.
    """
    flat = x.reshape(*x.shape[: axes[0]], -1)
    out = _FOLD[op].reduce(flat, axis=-1)
    if op in ("logical_and", "logical_or", "logical_xor"):
        return np.asarray(out).astype(np.float32)
    return np.asarray(out)


def bitvec(
    op: str, a: NDArray[Any], b: NDArray[Any] | int | None, reverse: bool = False
) -> NDArray[Any]:
    """One bit operator on raw bits; shifts are logical.

    Args:
        op: name in ``BITVEC``.
        a: integer tensor, raw.
        b: integer tensor that broadcasts against ``a``, or an integer constant (two's complement
            if negative); None for ``invert``.
        reverse: swap the operands.

    Returns:
        unsigned integers as wide as the wider operand; store with ``dtypes.store_bits``.
    """
    left = bits(a)
    if op == "invert":
        return np.invert(left)
    if isinstance(b, np.ndarray):
        right = bits(b)
        width = max(left.dtype, right.dtype)
        left, right = left.astype(width, copy=False), right.astype(width, copy=False)
    else:
        mask = (1 << left.dtype.itemsize * 8) - 1
        right = np.asarray(int(b or 0) & mask, left.dtype)
    return BITVEC_BINARY[op](right, left) if reverse else BITVEC_BINARY[op](left, right)


def integer(op: str, a: NDArray[Any], b: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """One operator of POOL in exact 32-bit integer arithmetic.

    Args:
        op: name in ``BINARY``; ``power`` has no integer form and is not accepted.
        a: int32 or uint32 tensor, raw.
        b: like ``a``.
        dtype: int32 or uint32, type of the result.

    Returns:
        array of ``dtype``: the exact result modulo 2**32; comparisons give 1 and 0.
    """
    if a.dtype != b.dtype:  # int64 holds both; products keep their low 32 bits
        a, b = a.astype(np.int64), b.astype(np.int64)
    return BINARY[op](a, b).astype(dtype, copy=False)
