"""DMA: transposition, row gather and scatter, compute (trainium2.md 2.4, 3.1).

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


def gather_rows(
    table: NDArray[Any], indices: NDArray[Any], old: NDArray[Any] | None = None
) -> NDArray[Any]:
    """Rows of ``table`` by number, along axis 0.

    Args:
        table: ``[R, *rest]`` raw.
        indices: ``[n]`` or ``[n, 1]`` integers.
        old: ``[n, *rest]`` content that stays where an index is out of bounds
            (``oob_mode.skip``); without it such an index raises.

    Raises:
        IndexError: an index is out of bounds and ``old`` is None.
    """
    wanted = indices.reshape(-1).astype(np.int64)
    valid = in_bounds(wanted, table.shape[0])
    if valid.all():
        return table[wanted]
    if old is None:
        raise IndexError(f"row {wanted[~valid][0]} of a table with {table.shape[0]} rows")
    out = old.copy()
    out[valid] = table[wanted[valid]]
    return out


def scatter_rows(
    table: NDArray[Any], indices: NDArray[Any], rows: NDArray[Any], skip: bool = False
) -> None:
    """Write rows of ``table`` by number, in place.

    Of equal indices the last one wins; hardware's order is not documented.

    Args:
        table: ``[R, *rest]`` raw, written.
        indices: ``[n]`` or ``[n, 1]`` integers.
        rows: ``[n, *rest]`` raw.
        skip: drop writes that are out of bounds instead of raising.

    Raises:
        IndexError: an index is out of bounds and ``skip`` is False.
    """
    wanted = indices.reshape(-1).astype(np.int64)
    valid = in_bounds(wanted, table.shape[0])
    if not valid.all():
        if not skip:
            raise IndexError(f"row {wanted[~valid][0]} of a table with {table.shape[0]} rows")
        wanted, rows = wanted[valid], rows[valid]
    _, last = np.unique(wanted[::-1], return_index=True)
    last = wanted.size - 1 - last
    table[wanted[last]] = rows[last]


def compute(srcs: Sequence[F32]) -> F32:
    """``dma_compute``: sum of the sources in fp32, first to last.

    Args:
        srcs: fp32 tensors with equal element counts; the first one's shape is the result's.
    """
    total = srcs[0].copy()
    for src in srcs[1:]:
        total += src.reshape(total.shape)
    return total
