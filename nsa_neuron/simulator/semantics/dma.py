"""DMA: transposition, indices, compute (docs/trainium2.md 2.4, 3.1).

A plain ``dma_copy`` needs nothing of its own: ``dtypes.store(dst, src)`` copies bits between equal
types and converts through fp32 otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .alu import F32

TRANSPOSE_AXES: dict[int, tuple[int, ...]] = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}
"""The only permutation of ``dma_transpose`` for each rank."""


def transpose(src: NDArray[Any]) -> NDArray[Any]:
    """``dma_transpose``: raw view of ``src`` in the permutation of its rank."""
    return src.transpose(TRANSPOSE_AXES[src.ndim])


def transpose_indices(indices: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Row numbers of an indirect ``dma_transpose``: the index tile by columns, first ``count``."""
    return indices.T.ravel()[:count].astype(np.int64)


def in_bounds(indices: NDArray[Any], rows: int) -> NDArray[np.bool_]:
    """Which indices address one of ``rows`` rows."""
    return (indices >= 0) & (indices < rows)


def compute(srcs: Sequence[F32]) -> F32:
    """``dma_compute``: sum of the sources in fp32, first to last.

    Args:
        srcs: fp32 tensors with equal element counts; the first one's shape is the result's.
    """
    total = srcs[0].copy()
    for src in srcs[1:]:
        total += src.reshape(total.shape)
    return total
