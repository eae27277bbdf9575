"""PE: matrix multiplication and transposition (docs/trainium2.md 3.2).

Products of bf16, fp16 and fp8 are exact in fp32 and sums are kept in fp32. How the hardware splits
an fp32 operand and in which order it adds is not documented: plain fp32 BLAS here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..machine.dtypes import DType, bits, load_f32, round_tf32, tfloat32

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .alu import F32


def operand(view: NDArray[Any], dtype: DType) -> F32:
    """Load a matmul operand; ``tfloat32`` views of fp32 data are rounded as they are read."""
    values = load_f32(view)
    return round_tf32(values) if dtype is tfloat32 else values


def matmul(stationary: F32, moving: F32, out: F32 | None = None) -> F32:
    """``stationary.T @ moving`` over the partition axis.

    An element's bits hang on its row and column only, not on where they lie among the others, as
    in hardware: two cores, or two runs of other tiles, then agree. BLAS sums so for matrices, but
    not for a matrix and a vector, so a vector is multiplied beside a copy of itself.

    Args:
        stationary: ``[K, *free]`` fp32, free axes flattened to M in row-major order.
        moving: ``[K, *free]`` fp32, free axes flattened to N.
        out: ``[M, N]`` fp32 that receives the product; apart from both operands.

    Returns:
        ``[M, N]`` fp32: ``out``, or new.
    """
    k = stationary.shape[0]
    left, right = stationary.reshape(k, -1), moving.reshape(k, -1)
    m, n = left.shape[1], right.shape[1]
    if m > 1 and n > 1:
        return np.matmul(left.T, right, out=out)
    left, right = (np.repeat(x, 2, 1) if x.shape[1] == 1 else x for x in (left, right))
    product: F32 = np.matmul(left.T, right)[:m, :n]
    if out is None:
        return product
    out[...] = product
    return out


def matmul_double_row(stationary: F32, moving: F32) -> F32:
    """``perf_mode=double_row``: contraction over partitions and the first free axis.

    Args:
        stationary: ``[K, 2, *free]`` values of fp8 operands.
        moving: ``[K, 2, *free]``.

    Returns:
        ``[M, N]`` fp32.
    """
    k = stationary.shape[0] * 2
    return matmul(stationary.reshape(k, -1), moving.reshape(k, -1))


def psum_update(
    out: F32, product: F32, accumulate: bool | None, written: NDArray[np.bool_] | bool = False
) -> None:
    """What a matmul leaves in PSUM, in place.

    Args:
        out: fp32 content of the destination.
        product: the new product, same element count.
        accumulate: False overwrites, True adds, None adds where a matmul wrote since allocation.
        written: where that is, in ``out``'s shape; read when ``accumulate`` is None.
    """
    new = product.reshape(out.shape)
    if accumulate is None:
        out[...] = np.where(written, out + new, new)
    elif accumulate:
        out += new
    else:
        out[...] = new


def psum_update_overlapping(
    flat: F32,
    index: NDArray[np.intp],
    product: F32,
    accumulate: bool | None,
    written: NDArray[np.bool_],
) -> None:
    """The same for a destination pattern that visits one element more than once; in place.

    Elements are visited in row-major order of the pattern. With ``accumulate=False`` the last visit
    wins; with None the first visit of an unwritten element overwrites and the others add.

    Args:
        flat: one-dimensional fp32 storage.
        index: position in ``flat`` of each element of the product.
        product: as many elements.
        accumulate: see :func:`psum_update`.
        written: one-dimensional map beside ``flat``; visited elements are set.
    """
    where, values = index.ravel(), product.ravel()
    if accumulate is False:
        flat[where] = values
    else:
        if accumulate is None:
            flat[where[~written[where]]] = 0.0
        np.add.at(flat, where, values)
    written[where] = True


def transpose(data: NDArray[Any]) -> NDArray[Any]:
    """``[P, *free]`` raw -> ``[F, P]`` raw: free axes flattened, bit-exact."""
    # Rows a power of two apart fall into the same cache lines: dense ones transpose 8 times faster.
    dense = np.ascontiguousarray(bits(data)).reshape(data.shape[0], -1)
    return dense.T.view(data.dtype)


def transpose_mode(stationary: NDArray[Any], moving: F32) -> NDArray[Any]:
    """``is_transpose=True``: bit-exact ``stationary.T @ moving`` for a one-hot ``moving``.

    Args:
        stationary: ``[K, *free]`` raw.
        moving: ``[K, *free]`` fp32 values: an identity, or any matrix whose columns hold at most
            one 1 and zeros elsewhere.

    Returns:
        ``[M, N]`` raw of ``stationary``'s type; columns of ``moving`` without a 1 give 0.

    Raises:
        ValueError: ``moving`` is anything else.
    """
    k = stationary.shape[0]
    selector = moving.reshape(k, -1)
    ones = selector == 1.0
    count = ones.sum(axis=0)
    if (count > 1).any() or np.count_nonzero(selector) != count.sum():
        raise ValueError("transpose mode needs a moving matrix with at most a single 1 per column")
    out: NDArray[Any] = stationary.reshape(k, -1)[ones.argmax(axis=0)].T
    empty = count == 0
    if empty.any():
        out = out.copy()
        out[:, empty] = np.zeros((), out.dtype)
    return out


def widen_fp8(raw: NDArray[Any]) -> NDArray[np.uint16]:
    """fp8 codes as PE's transpose writes them: 16-bit elements with a zero upper byte."""
    return raw.view(np.uint8).astype(np.uint16)
