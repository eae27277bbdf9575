"""Row-wise kernels as they are first written, and as they are after the profiler's advice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from profile_helpers import hbm, nisa, nl, sbuf

if TYPE_CHECKING:
    from nsa_neuron.simulator.memory.tensor import NkiTensor

ROWS = 128


def _weight(weight: Any, columns: int, dtype: Any) -> NkiTensor:
    """The weight in every partition."""
    tile = sbuf((ROWS, columns), dtype)
    nisa.dma_copy(tile, weight.ap([[0, ROWS], [1, columns]]))
    return tile


def rms_norm(x: Any, weight: Any) -> NkiTensor:
    """x / rms(x) * weight, a pass per operation, fp32 between them."""
    rows, columns = x.shape
    out = hbm(x.shape, x.dtype)
    w = _weight(weight, columns, weight.dtype)
    for start in range(0, rows, ROWS):
        tile, result = (sbuf((ROWS, columns), x.dtype) for _ in range(2))
        square, scaled = (sbuf((ROWS, columns)) for _ in range(2))
        total, factor = sbuf((ROWS, 1)), sbuf((ROWS, 1))
        nisa.dma_copy(tile, x[start : start + ROWS, :])
        nisa.tensor_tensor(square, tile, tile, nl.multiply)
        nisa.tensor_reduce(total, nl.add, square, axis=1)
        nisa.activation(factor, nl.rsqrt, total, scale=1.0 / columns)
        nisa.tensor_scalar(scaled, tile, nl.multiply, factor)
        nisa.tensor_tensor(result, scaled, w, nl.multiply)
        nisa.dma_copy(out[start : start + ROWS, :], result)
    return out


def rms_norm_fused(x: Any, weight: Any) -> NkiTensor:
    """The same in two passes, one each on ScalarE and VectorE; bf16 tiles."""
    rows, columns = x.shape
    out = hbm(x.shape, x.dtype)
    w = _weight(weight, columns, weight.dtype)
    for start in range(0, rows, ROWS):
        tile, result, square = (sbuf((ROWS, columns), x.dtype) for _ in range(3))
        total, factor = sbuf((ROWS, 1)), sbuf((ROWS, 1))
        nisa.dma_copy(tile, x[start : start + ROWS, :])
        nisa.activation_reduce(square, nl.square, tile, nl.add, total)
        nisa.activation(factor, nl.rsqrt, total, scale=1.0 / columns)
        nisa.scalar_tensor_tensor(result, tile, nl.multiply, factor, nl.multiply, w)
        nisa.dma_copy(out[start : start + ROWS, :], result)
    return out


def softmax(x: Any) -> NkiTensor:
    """exp(x - max) / sum, a pass per operation, fp32 between them."""
    rows, columns = x.shape
    out = hbm(x.shape, x.dtype)
    for start in range(0, rows, ROWS):
        tile, result = (sbuf((ROWS, columns), x.dtype) for _ in range(2))
        shifted, exponent = (sbuf((ROWS, columns)) for _ in range(2))
        most, total, factor = (sbuf((ROWS, 1)) for _ in range(3))
        nisa.dma_copy(tile, x[start : start + ROWS, :])
        nisa.tensor_reduce(most, nl.maximum, tile, axis=1)
        nisa.tensor_scalar(shifted, tile, nl.subtract, most)
        nisa.activation(exponent, nl.exp, shifted)
        nisa.tensor_reduce(total, nl.add, exponent, axis=1)
        nisa.reciprocal(factor, total)
        nisa.tensor_scalar(result, exponent, nl.multiply, factor)
        nisa.dma_copy(out[start : start + ROWS, :], result)
    return out


def softmax_fused(x: Any) -> NkiTensor:
    """The same with the shift and the sum inside the exponential; bf16 tiles."""
    rows, columns = x.shape
    out = hbm(x.shape, x.dtype)
    for start in range(0, rows, ROWS):
        tile, result, exponent = (sbuf((ROWS, columns), x.dtype) for _ in range(3))
        lowest, total, factor = (sbuf((ROWS, 1)) for _ in range(3))
        nisa.dma_copy(tile, x[start : start + ROWS, :])
        nisa.tensor_reduce(lowest, nl.maximum, tile, axis=1, negate=True)
        nisa.activation_reduce(exponent, nl.exp, tile, nl.add, total, bias=lowest)
        nisa.reciprocal(factor, total)
        nisa.tensor_scalar(result, exponent, nl.multiply, factor)
        nisa.dma_copy(out[start : start + ROWS, :], result)
    return out


def softmax_apart(x: Any) -> NkiTensor:
    """`softmax_fused`, with the last pass on ScalarE, which has time."""
    rows, columns = x.shape
    out = hbm(x.shape, x.dtype)
    for start in range(0, rows, ROWS):
        tile, result, exponent = (sbuf((ROWS, columns), x.dtype) for _ in range(3))
        lowest, total, factor = (sbuf((ROWS, 1)) for _ in range(3))
        nisa.dma_copy(tile, x[start : start + ROWS, :])
        nisa.tensor_reduce(lowest, nl.maximum, tile, axis=1, negate=True)
        nisa.activation_reduce(exponent, nl.exp, tile, nl.add, total, bias=lowest)
        nisa.reciprocal(factor, total)
        nisa.activation(result, nl.copy, exponent, scale=factor)
        nisa.dma_copy(out[start : start + ROWS, :], result)
    return out


def softmax_summed(x: Any) -> NkiTensor:
    """`softmax` with the sum inside the exponential, and nothing else changed."""
    rows, columns = x.shape
    out = hbm(x.shape, x.dtype)
    for start in range(0, rows, ROWS):
        tile, result = (sbuf((ROWS, columns), x.dtype) for _ in range(2))
        shifted, exponent = (sbuf((ROWS, columns)) for _ in range(2))
        most, total, factor = (sbuf((ROWS, 1)) for _ in range(3))
        nisa.dma_copy(tile, x[start : start + ROWS, :])
        nisa.tensor_reduce(most, nl.maximum, tile, axis=1)
        nisa.tensor_scalar(shifted, tile, nl.subtract, most)
        nisa.activation_reduce(exponent, nl.exp, shifted, nl.add, total)
        nisa.reciprocal(factor, total)
        nisa.tensor_scalar(result, exponent, nl.multiply, factor)
        nisa.dma_copy(out[start : start + ROWS, :], result)
    return out


def rms_norm_halved(x: Any, weight: Any) -> NkiTensor:
    """`rms_norm`, each core half of the rows."""
    rows, columns = x.shape
    out = hbm(x.shape, x.dtype)
    w = _weight(weight, columns, weight.dtype)
    half = rows // nl.num_programs(0)
    first = nl.program_id(0) * half
    for start in range(first, first + half, ROWS):
        tile, result = (sbuf((ROWS, columns), x.dtype) for _ in range(2))
        square, scaled = (sbuf((ROWS, columns)) for _ in range(2))
        total, factor = sbuf((ROWS, 1)), sbuf((ROWS, 1))
        nisa.dma_copy(tile, x[start : start + ROWS, :])
        nisa.tensor_tensor(square, tile, tile, nl.multiply)
        nisa.tensor_reduce(total, nl.add, square, axis=1)
        nisa.activation(factor, nl.rsqrt, total, scale=1.0 / columns)
        nisa.tensor_scalar(scaled, tile, nl.multiply, factor)
        nisa.tensor_tensor(result, scaled, w, nl.multiply)
        nisa.dma_copy(out[start : start + ROWS, :], result)
    return out


def doubled(x: Any, unrolled: bool) -> NkiTensor:
    """2 x by tiles of 128 rows, in a loop of the hardware or an unrolled one."""
    out = hbm(x.shape, x.dtype)

    def tile(index: Any) -> None:
        one, two = (sbuf((ROWS, x.shape[2]), x.dtype) for _ in range(2))
        nisa.dma_copy(one, x.select(0, index))
        nisa.tensor_scalar(two, one, nl.multiply, 2.0)
        nisa.dma_copy(out.select(0, index), two)

    if unrolled:
        for index in range(x.shape[0]):
            tile(index)
    else:
        nl.fori_loop(0, x.shape[0], tile)
    return out
