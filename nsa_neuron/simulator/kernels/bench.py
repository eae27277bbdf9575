"""Kernels that `nsa bench --simulator` times, each beside NumPy doing the same on the same tiles.

The NumPy versions convert bfloat16 to fp32 before arithmetic and back where the kernel stores
bfloat16, tile by tile, with the fastest conversions NumPy and ml_dtypes have.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..machine.dtypes import bfloat16
from ..nki import isa, language

nisa: Any = isa
nl: Any = language
P, N = 128, 512
BF16 = bfloat16.numpy
F32 = np.float32


def matmul(lhs_t: Any, rhs: Any) -> Any:
    """out[M, N] = lhs_t[K, M].T @ rhs[K, N]: tiles of 128 x 128 by 128 x 512, fp32 in PSUM."""
    (k, m), n = lhs_t.shape, rhs.shape[1]
    out = nl.ndarray((m, n), lhs_t.dtype, buffer=nl.shared_hbm)
    left, right = [], []
    for i in range(k // P):
        left.append(nl.ndarray((P, m), lhs_t.dtype, buffer=nl.sbuf))
        nisa.dma_copy(left[i], lhs_t[i * P : i * P + P, :])
        right.append(nl.ndarray((P, n), rhs.dtype, buffer=nl.sbuf))
        nisa.dma_copy(right[i], rhs[i * P : i * P + P, :])
    for a in range(m // P):
        for b in range(n // N):
            acc = nl.ndarray((P, N), nl.float32, buffer=nl.psum)
            for i in range(k // P):
                nisa.nc_matmul(
                    acc, left[i][:, a * P : a * P + P], right[i][:, b * N : b * N + N],
                    accumulate=i > 0,
                )  # fmt: skip
            tile = nl.ndarray((P, N), lhs_t.dtype, buffer=nl.sbuf)
            nisa.tensor_copy(tile, acc)
            nisa.dma_copy(out[a * P : a * P + P, b * N : b * N + N], tile)
    return out


def matmul_numpy(lhs_t: Any, rhs: Any) -> Any:
    """`matmul` in NumPy."""
    (k, m), n = lhs_t.shape, rhs.shape[1]
    out = np.empty((m, n), lhs_t.dtype)
    for a in range(m // P):
        for b in range(n // N):
            acc = np.zeros((P, N), F32)
            for i in range(k // P):
                left = lhs_t[i * P : i * P + P, a * P : a * P + P].astype(F32)
                acc += left.T @ rhs[i * P : i * P + P, b * N : b * N + N].astype(F32)
            out[a * P : a * P + P, b * N : b * N + N] = acc.astype(out.dtype)
    return out


def softmax(x: Any) -> Any:
    """Softmax over rows of fp32 [R, C], 128 rows at a time."""
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    for i in range(x.shape[0] // P):
        tile = nl.ndarray((P, x.shape[1]), nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(tile, x[i * P : i * P + P, :])
        top = nl.ndarray((P, 1), nl.float32, buffer=nl.sbuf)
        nisa.tensor_reduce(top, nl.maximum, tile, axis=1, negate=True)
        total = nl.ndarray((P, 1), nl.float32, buffer=nl.sbuf)
        nisa.activation_reduce(tile, nl.exp, tile, nl.add, total, bias=top)
        nisa.reciprocal(total, total)
        nisa.tensor_scalar(tile, tile, nl.multiply, total)
        nisa.dma_copy(out[i * P : i * P + P, :], tile)
    return out


def softmax_numpy(x: Any) -> Any:
    """`softmax` in NumPy."""
    out = np.empty_like(x)
    for i in range(x.shape[0] // P):
        tile = x[i * P : i * P + P].copy()
        tile = np.exp(tile + -tile.max(axis=1, keepdims=True))
        out[i * P : i * P + P] = tile * (1.0 / tile.sum(axis=1, keepdims=True))
    return out


def attention(q_t: Any, k_t: Any, v: Any) -> Any:
    """Causal attention of one head: q_t, k_t [D, T] bfloat16, v [T, D]; out [T, D] bfloat16.

    Keys in chunks of 512 with a running maximum; D = 128.
    """
    d, length = q_t.shape
    out = nl.ndarray((length, d), v.dtype, buffer=nl.shared_hbm)
    queries = nl.ndarray((P, length), q_t.dtype, buffer=nl.sbuf)
    nisa.dma_copy(queries, q_t)
    keys = nl.ndarray((P, length), k_t.dtype, buffer=nl.sbuf)
    nisa.dma_copy(keys, k_t)
    values = nl.ndarray((P, length // P, d), v.dtype, buffer=nl.sbuf)
    for i in range(length // P):
        nisa.dma_copy(values[:, i, :], v[i * P : i * P + P, :])
    for i in range(length // P):
        state = _start(d)
        for j in range(0, (i + 1) * P, N):
            _chunk(queries[:, i * P : i * P + P], keys, values, i * P, j, d, state)
        result, _, total = state
        nisa.reciprocal(total, total)
        rounded = nl.ndarray((P, d), v.dtype, buffer=nl.sbuf)
        nisa.tensor_scalar(rounded, result, nl.multiply, total)
        nisa.dma_copy(out[i * P : i * P + P, :], rounded)
    return out


def _start(d: int) -> tuple[Any, Any, Any]:
    """Accumulated result, negated running maximum and running sum of a query tile."""
    result = nl.ndarray((P, d), nl.float32, buffer=nl.sbuf)
    nisa.memset(result, 0.0)
    top = nl.ndarray((P, 1), nl.float32, buffer=nl.sbuf)
    nisa.memset(top, 1e30)
    total = nl.ndarray((P, 1), nl.float32, buffer=nl.sbuf)
    nisa.memset(total, 0.0)
    return result, top, total


def _chunk(query: Any, keys: Any, values: Any, row: int, j: int, d: int, state: Any) -> None:
    """One chunk of keys for one tile of queries."""
    result, top, total = state
    scores = nl.ndarray((P, N), nl.float32, buffer=nl.psum)
    nisa.nc_matmul(scores, query, keys[:, j : j + N], accumulate=False)
    masked = nl.ndarray((P, N), nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(masked, scores, nl.multiply, d**-0.5)
    if j + N > row:
        nisa.affine_select(
            masked, [[-1, N]], 1, masked, -1e30, cmp_op=nl.greater_equal, offset=row - j
        )
    new = nl.ndarray((P, 1), nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(new, nl.maximum, masked, axis=1, negate=True)
    nisa.tensor_tensor(new, new, top, nl.minimum)
    shrink = nl.ndarray((P, 1), nl.float32, buffer=nl.sbuf)
    nisa.activation(shrink, nl.exp, top, bias=new, scale=-1.0)
    nisa.tensor_copy(top, new)
    weights = nl.ndarray((P, N), values.dtype, buffer=nl.sbuf)
    part = nl.ndarray((P, 1), nl.float32, buffer=nl.sbuf)
    nisa.activation_reduce(weights, nl.exp, masked, nl.add, part, bias=new)
    nisa.scalar_tensor_tensor(total, total, nl.multiply, shrink, nl.add, part)
    flipped = nl.ndarray((P, N // P, P), values.dtype, buffer=nl.psum)
    for c in range(N // P):
        nisa.nc_transpose(flipped[:, c, :], weights[:, c * P : c * P + P])
    moved = nl.ndarray((P, N // P, P), values.dtype, buffer=nl.sbuf)
    nisa.tensor_copy(moved, flipped)
    product = nl.ndarray((P, d), nl.float32, buffer=nl.psum)
    for c in range(N // P):
        nisa.nc_matmul(product, moved[:, c, :], values[:, j // P + c, :], accumulate=c > 0)
    nisa.scalar_tensor_tensor(result, result, nl.multiply, shrink, nl.add, product)


def attention_numpy(q_t: Any, k_t: Any, v: Any) -> Any:
    """`attention` in NumPy."""
    d, length = q_t.shape
    out = np.empty((length, d), v.dtype)
    for i in range(length // P):
        result, total = np.zeros((P, d), F32), np.zeros((P, 1), F32)
        top = np.full((P, 1), -1e30, F32)
        for j in range(0, (i + 1) * P, N):
            query = q_t[:, i * P : i * P + P].astype(F32)
            scores = (query.T @ k_t[:, j : j + N].astype(F32)) * F32(d**-0.5)
            if j + N > i * P:
                rows, columns = np.arange(P)[:, None] + i * P, np.arange(N)[None] + j
                scores = np.where(rows >= columns, scores, F32(-1e30))
            new = np.maximum(scores.max(axis=1, keepdims=True), top)
            shrink, top = np.exp(top - new), new
            weights = np.exp(scores - new)
            total = total * shrink + weights.sum(axis=1, keepdims=True)
            moved = weights.astype(v.dtype)
            result = result * shrink
            for c in range(N // P):
                flipped = moved[:, c * P : c * P + P].T.copy()
                value = v[j + c * P : j + c * P + P]
                result += flipped.astype(F32).T @ value.astype(F32)
        out[i * P : i * P + P] = (result * (F32(1) / total)).astype(v.dtype)
    return out


def small_instructions(x: Any, count: int) -> Any:
    """`count` additions of one element: what an instruction costs beyond its arithmetic."""
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    tile = nl.ndarray(x.shape, x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(tile, x)
    for _ in range(count):
        nisa.tensor_tensor(tile, tile, tile, nl.add)
    nisa.dma_copy(out, tile)
    return out


def small_instructions_numpy(x: Any, count: int) -> Any:
    """`small_instructions` in NumPy."""
    tile = x.copy()
    for _ in range(count):
        np.add(tile, tile, out=tile)
    return tile


def rotating_tiles(x: Any, count: int) -> Any:
    """`count` instructions on tiles that an allocator rotates through a few addresses."""
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    tile = nl.ndarray(x.shape, x.dtype, address=(0, 0))
    nisa.dma_copy(tile, x)
    pitch = x.shape[1] * tile.dtype.itemsize
    for k in range(1, count - 1):
        made = nl.ndarray(x.shape, x.dtype, address=(0, k % 16 * pitch))
        nisa.tensor_copy(made, tile, engine=nisa.engine.vector)
        tile = made
    nisa.dma_copy(out, tile)
    return out
