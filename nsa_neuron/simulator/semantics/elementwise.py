"""Element-wise instructions of DVE, POOL and ACT (docs/trainium2.md 3.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import alu

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .alu import F32, Operand

FP32_MIN = np.float32(np.finfo(np.float32).min)
"""-3.4028235e38, the only legal ``on_false_value`` of ``range_select``."""


def tensor_tensor(data1: F32, data2: F32, op: str, out: F32 | None = None) -> F32:
    """``data1 op data2`` in fp32, element by element.

    Args:
        data1: ``[P, *free]`` fp32.
        data2: as many elements per partition.
        op: arithmetic operator. Bit operators: ``alu.bitvec``; exact 32-bit: ``alu.integer``.
        out: see the package's conventions.
    """
    return alu.apply(op, data1, alu.like(data2, data1.shape), out=out)


def tensor_scalar(
    data: F32,
    op0: str,
    operand0: Operand | None,
    reverse0: bool = False,
    op1: str | None = None,
    operand1: Operand | None = None,
    reverse1: bool = False,
    out: F32 | None = None,
) -> F32:
    """``(data op0 operand0) op1 operand1`` in fp32.

    Args:
        data: ``[P, *free]`` fp32.
        op0: arithmetic operator.
        operand0: constant or ``[P, 1]``; None for unary operators.
        reverse0: ``operand0 op0 data``.
        op1: second operator or None.
        operand1: constant or ``[P, 1]``.
        reverse1: ``operand1 op1 (...)``.
        out: see the package's conventions.
    """
    first = alu.column(0.0 if operand0 is None else operand0, data.ndim)
    if op1 is None:
        return alu.apply(op0, data, first, reverse0, out=out)
    second = alu.column(0.0 if operand1 is None else operand1, data.ndim)
    step = alu.apply(op0, data, first, reverse0, out=alu.scratch(out, second))
    return alu.apply(op1, step, second, reverse1, out=step)


def tensor_scalar_bitvec(
    data: NDArray[Any],
    op0: str,
    operand0: NDArray[Any] | int | None,
    reverse0: bool = False,
    op1: str | None = None,
    operand1: NDArray[Any] | int | None = None,
    reverse1: bool = False,
) -> NDArray[Any]:
    """``(data op0 operand0) op1 operand1`` on raw integer bits.

    Args:
        data: integer tensor, raw; operands are integers or raw ``[P, 1]`` tensors.

    Returns:
        unsigned integers; store with ``dtypes.store_bits``.
    """

    def shaped(operand: NDArray[Any] | int | None) -> NDArray[Any] | int | None:
        if isinstance(operand, np.ndarray):
            return operand.reshape(operand.shape[:1] + (1,) * (data.ndim - 1))
        return operand

    out = alu.bitvec(op0, data, shaped(operand0), reverse0)
    return out if op1 is None else alu.bitvec(op1, out, shaped(operand1), reverse1)


def scalar_tensor_tensor(
    data: F32,
    op0: str,
    operand0: Operand,
    op1: str,
    operand1: F32,
    reverse0: bool = False,
    reverse1: bool = False,
    out: F32 | None = None,
) -> F32:
    """``(data op0 operand0) op1 operand1`` in fp32, ``operand1`` a tensor.

    Args:
        data: ``[P, *free]`` fp32.
        operand0: constant or ``[P, 1]``.
        operand1: as many elements per partition as ``data``.
        out: see the package's conventions.
    """
    other = alu.like(operand1, data.shape)
    first = alu.column(operand0, data.ndim)
    step = alu.apply(op0, data, first, reverse0, out=alu.scratch(out, other))
    return alu.apply(op1, step, other, reverse1, out=step)


def reciprocal(data: F32, out: F32 | None = None) -> F32:
    """``1 / data`` in fp32 (DVE); 1/0 = inf with the sign of the zero."""
    return np.divide(np.float32(1.0), data, out=out)


def tensor_copy_predicated(
    dst: NDArray[Any],
    src: NDArray[Any] | float,
    predicate: NDArray[Any],
    reverse_pred: bool = False,
) -> NDArray[Any]:
    """``src`` where the predicate is nonzero, the old ``dst`` elsewhere.

    Args:
        dst: raw elements before the instruction.
        src: raw elements of the same type, in the same row-major order, or a constant.
        predicate: unsigned integers, as many elements.
        reverse_pred: take ``src`` where the predicate is zero.

    Returns:
        raw elements of ``dst``'s type and shape; kept elements are bit-exact.
    """
    mask = _mask(predicate, dst.shape, reverse_pred)
    if isinstance(src, np.ndarray):
        return np.where(mask, alu.like(src, dst.shape), dst)
    return np.where(mask, np.asarray(src).astype(dst.dtype), dst)


def select_reduce(
    predicate: NDArray[Any],
    on_true: F32,
    on_false: Operand,
    reverse_pred: bool = False,
) -> F32:
    """``on_true`` where the predicate is nonzero, ``on_false`` elsewhere.

    The optional maximum is ``accumulate("maximum", ...)`` of :mod:`.reduction` on the result.

    Args:
        predicate: integers, as many elements per partition as ``on_true``.
        on_true: ``[P, *free]`` fp32.
        on_false: constant or ``[P, 1]``.
        reverse_pred: exchange the two.
    """
    mask = _mask(predicate, on_true.shape, reverse_pred)
    return np.where(mask, on_true, alu.column(on_false, on_true.ndim))


def range_select(
    on_true: F32,
    comp_op0: str,
    comp_op1: str,
    bound0: F32,
    bound1: F32,
    range_start: int = 0,
    on_false_value: float = float(FP32_MIN),
) -> F32:
    """Keep the elements whose index satisfies two comparisons.

    ``j`` counts the flattened free axes from ``range_start``; element ``j`` is kept when
    ``comp_op0(j, bound0)`` and ``comp_op1(j, bound1)``, compared in fp32. The maximum that comes
    with it is ``reduction.accumulate("maximum", ...)`` on the result.

    Args:
        on_true: ``[P, *free]`` fp32.
        bound0: ``[P, 1]`` fp32, and ``bound1`` alike.
        range_start: index of the first element.
        on_false_value: written elsewhere; hardware allows ``FP32_MIN`` only, which a narrower
            float destination turns into -inf.
    """
    count = on_true[0].size
    index = (np.float32(range_start) + np.arange(count, dtype=np.float32)).reshape(1, count)
    keep = alu.COMPARE[comp_op0](index, bound0.reshape(-1, 1))
    keep &= alu.COMPARE[comp_op1](index, bound1.reshape(-1, 1))
    return np.where(keep.reshape(on_true.shape), on_true, np.float32(on_false_value))


def _mask(predicate: NDArray[Any], shape: tuple[int, ...], reverse: bool) -> NDArray[np.bool_]:
    flags = alu.like(predicate, shape)
    mask: NDArray[np.bool_] = np.equal(flags, 0) if reverse else np.not_equal(flags, 0)
    return mask
