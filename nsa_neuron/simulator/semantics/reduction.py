"""Reductions, scans and statistics of DVE, and accumulator registers (docs/trainium2.md 3.5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..machine.dtypes import bits
from . import alu

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .alu import F32, Operand


def tensor_reduce(data: F32, op: str, axes: tuple[int, ...], negate: bool = False) -> F32:
    """Reduce trailing free axes in fp32.

    Args:
        data: ``[P, *free]`` fp32.
        op: arithmetic operator in ``alu.REDUCTIONS``.
        axes: ascending, ending at the last axis, never 0.
        negate: multiply the result by -1.

    Returns:
        fp32 without the reduced axes (the core restores ones for ``keepdims``).
    """
    out = alu.fold(op, data, axes)
    return np.negative(out) if negate else out


def tensor_reduce_bitvec(data: NDArray[Any], op: str, axes: tuple[int, ...]) -> NDArray[Any]:
    """Reduce trailing free axes with a bit operator on raw integers; unsigned result."""
    return alu.fold(op, bits(data), axes)


def accumulate(
    op: str, result: F32, register: F32, command: str, init: Operand | None = None
) -> F32:
    """Update the accumulator register of an instruction that also reduces.

    Serves ``activation`` (add), ``range_select`` and ``select_reduce`` (maximum) and
    ``tensor_scalar_reduce``. The registers hold fp32 whatever the destination's type.

    Args:
        op: arithmetic reduction.
        result: ``[P, *free]`` fp32 outputs of the instruction, before conversion.
        register: ``[P, 1]`` value before.
        command: name in ``nisa.reduce_cmd``: ``idle`` leaves the register (on DVE its content is
            undefined afterwards: the core's business), ``reset`` sets the identity, ``reduce``
            continues, ``reset_reduce`` starts at the identity, ``load_reduce`` at ``init``.
        init: constant or ``[P, 1]``, for ``load_reduce``.

    Returns:
        ``[P, 1]`` value after.
    """
    if command == "idle":
        return register
    lanes = (result.shape[0], 1)
    if command == "reset":
        return np.full(lanes, alu.IDENTITY[op], np.float32)
    total = alu.fold(op, result, tuple(range(1, result.ndim))).reshape(lanes)
    if command == "reset_reduce" and op != "subtract":
        return total
    if command == "reset_reduce":
        start: Any = np.float32(alu.IDENTITY[op])
    else:
        start = alu.column(init, 2) if command == "load_reduce" and init is not None else register
    return alu.BINARY[op](start, total)


def tensor_scalar_cumulative(
    src: F32,
    op0: str,
    op1: str,
    imm0: Operand,
    register: F32,
    command: str = "reset_reduce",
    imm1: Operand | None = None,
    reverse0: bool = False,
) -> tuple[F32, F32]:
    """Running reduction: ``reg = op1(op0(src[i], imm0), reg); dst[i] = reg``.

    Args:
        src: ``[P, *free]`` fp32; the free axes run as one.
        op0: arithmetic operator with ``imm0``.
        op1: add, subtract (new - reg), multiply, maximum or minimum.
        imm0: constant or ``[P, 1]``.
        register: ``[P, 1]`` value before, used by ``reduce``.
        command: ``reset_reduce`` (identity), ``reduce`` (register) or ``load_reduce`` (``imm1``).
        imm1: start value of ``load_reduce``.
        reverse0: ``op0(imm0, src[i])``.

    Returns:
        outputs of ``src``'s shape, and the register after: ``[P, 1]``.
    """
    flat = src.reshape(src.shape[0], -1)
    terms = alu.apply(op0, flat, alu.column(imm0, 2), reverse0)
    start: Any = register
    if command == "reset_reduce":
        start = np.float32(alu.IDENTITY[op1])
    elif command == "load_reduce":
        start = alu.column(0.0 if imm1 is None else imm1, 2)
    out = _running(op1, terms, np.broadcast_to(start, (flat.shape[0], 1)))
    return out.reshape(src.shape), out[:, -1:].copy()


def _running(op: str, terms: F32, start: F32) -> F32:
    """``r[i] = op(terms[i], r[i - 1])`` along axis 1, one fp32 rounding per step."""
    out = np.array(terms, np.float32)
    if op == "subtract":
        # s[i] = (-1)**i r[i] turns new - reg into a running sum; negation is exact.
        out[:, 1::2] *= -1
        out[:, :1] -= start
        np.add.accumulate(out, axis=1, out=out)
        out[:, 1::2] *= -1
        return out
    ufunc = alu.BINARY[op]
    assert isinstance(ufunc, np.ufunc)
    out[:, :1] = ufunc(out[:, :1], start)
    return ufunc.accumulate(out, axis=1, out=out)


def tensor_tensor_scan(
    data0: F32,
    data1: F32,
    initial: Operand,
    op0: str,
    op1: str,
    reverse0: bool = False,
    reverse1: bool = False,
) -> F32:
    """Recurrence ``r[i] = op1(op0(data0[i], r[i-1]), data1[i])``, ``r[-1] = initial``, in fp32.

    Args:
        data0: ``[P, *free]`` fp32; the free axes run as one.
        data1: as many elements per partition.
        initial: constant or ``[P, 1]``.
        op0: arithmetic operator; ``reverse0``: ``op0(r[i-1], data0[i])``.
        op1: arithmetic operator; ``reverse1``: ``op1(data1[i], ...)``.
    """
    lanes = data0.shape[0]
    first = data0.reshape(lanes, -1)
    second = alu.like(data1, data0.shape).reshape(lanes, -1)
    start = np.broadcast_to(alu.column(initial, 2), (lanes, 1))
    # The common case data0 = 1 (running sum, maximum, ...) needs no step-by-step loop.
    symmetric = op1 in ("add", "multiply", "maximum", "minimum")
    if op0 == "multiply" and symmetric and bool((first == 1.0).all()):
        return _running(op1, second, start).reshape(data0.shape)
    columns0, columns1 = np.ascontiguousarray(first.T), np.ascontiguousarray(second.T)
    out = np.empty(columns0.shape, np.float32)
    step = np.empty(lanes, np.float32)
    state = start[:, 0]
    for a, b, result in zip(columns0, columns1, out, strict=True):
        inner = alu.apply(op0, a, state, reverse0, out=step)
        outer = alu.apply(op1, inner, b, reverse1, out=result)
        if outer is not result:
            result[:] = outer
        state = result
    return np.ascontiguousarray(out.T).reshape(data0.shape)


def bn_stats(data: F32) -> F32:
    """Count, mean and variance times count of the even-index elements, then of the odd ones.

    Args:
        data: ``[P, *free]`` fp32, at most 512 elements per partition; the free axes run as one.

    Returns:
        ``[P, 6]`` fp32; the variance is the biased one. Of no elements (one input element has no
        odd ones) all three are 0: not documented.
    """
    flat = data.reshape(data.shape[0], -1)
    out = np.zeros((flat.shape[0], 6), np.float32)
    for base, half in ((0, flat[:, 0::2]), (3, flat[:, 1::2])):
        if half.shape[1]:
            mean = half.mean(axis=1, keepdims=True, dtype=np.float32)
            out[:, base] = half.shape[1]
            out[:, base + 1] = mean[:, 0]
            out[:, base + 2] = np.square(half - mean).sum(axis=1)
    return out


def bn_aggr(data: F32) -> F32:
    """Mean and biased variance from triples (count, mean, variance times count).

    Args:
        data: ``[P, *free]`` fp32, a multiple of three elements per partition.

    Returns:
        ``[P, 2]`` fp32; NaN where all counts are 0.
    """
    triples = data.reshape(data.shape[0], -1, 3)
    count, mean, scatter = triples[..., 0], triples[..., 1], triples[..., 2]
    total = count.sum(axis=1)
    overall = (count * mean).sum(axis=1) / total
    spread = scatter.sum(axis=1) + (count * np.square(mean - overall[:, None])).sum(axis=1)
    return np.stack([overall, spread / total], axis=1)
