"""POOL (GpSimd): generated patterns, gathers, per-core searches (docs/trainium2.md 3.6).

The engine is eight cores, each beside 16 consecutive partitions.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..machine.dtypes import bits, convert
from . import alu

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .alu import F32

CORE = 16
"""Partitions beside one GpSimd core."""


def iota(
    lanes: int, pattern: Sequence[Sequence[int]], offset: int = 0, channel_multiplier: int = 0
) -> NDArray[np.int32]:
    """Affine values ``offset + p * channel_multiplier + sum(step * i)``, in int32 (wrapping).

    Args:
        lanes: partitions of the destination.
        pattern: up to four ``[step, num]``, innermost last.
        offset: int32.
        channel_multiplier: int32.

    Returns:
        ``[lanes, product of nums]`` int32.
    """
    row = np.zeros(1, np.int64)
    for step, num in pattern:
        row = (row[:, None] + step * np.arange(num, dtype=np.int64)).ravel()
    start = offset + channel_multiplier * np.arange(lanes, dtype=np.int64)
    # Addition modulo 2**32 gives the same whether the terms are truncated before or after it.
    return start.astype(np.int32)[:, None] + row.astype(np.int32)


@lru_cache(maxsize=8)
def _selected(
    lanes: int, pattern: tuple[tuple[int, int], ...], multiplier: int, cmp_op: str, offset: int
) -> NDArray[np.bool_]:
    """Where ``cmp_op(affine value, 0)`` holds; kernels ask for the same few masks again."""
    mask: NDArray[np.bool_] = alu.COMPARE[cmp_op](iota(lanes, pattern, offset, multiplier), 0)
    mask.flags.writeable = False
    return mask


def affine_select(
    on_true: NDArray[Any],
    pattern: Sequence[Sequence[int]],
    channel_multiplier: int,
    on_false_value: float,
    cmp_op: str = "equal",
    offset: int = 0,
) -> NDArray[Any]:
    """``on_true`` where ``cmp_op(affine value, 0)``, a constant elsewhere.

    Args:
        on_true: ``[P, *free]``: raw when the destination has the same type (kept elements are then
            bit-exact), else fp32.
        pattern: see :func:`iota`, with ``channel_multiplier`` and ``offset``.
        on_false_value: fp32 constant, converted to ``on_true``'s type.
        cmp_op: comparison operator.

    Returns:
        array of ``on_true``'s type and shape.
    """
    keep = _selected(
        on_true.shape[0], tuple(map(tuple, pattern)), channel_multiplier, cmp_op, offset
    )
    keep = keep.reshape(on_true.shape)
    fill = convert(np.full(1, on_false_value, np.float32), on_true.dtype)
    return np.where(keep, on_true, fill)


def local_gather(
    src: NDArray[Any],
    index: NDArray[np.uint16],
    num_elem_per_idx: int = 1,
    num_valid_indices: int | None = None,
) -> NDArray[Any]:
    """Gather within the partitions of each GpSimd core, one index list per core.

    A core flattens its 16 partitions of ``index`` partition first (``index[p, f]`` is entry
    ``f * 16 + p``). Each entry is an element offset that applies to all its 16 partitions and
    brings ``num_elem_per_idx`` consecutive elements.

    Args:
        src: ``[P, *free]`` raw, P a multiple of 16.
        index: ``[P, *free]`` uint16.
        num_elem_per_idx: consecutive elements per index.
        num_valid_indices: entries used per core; default all.

    Returns:
        ``[P, valid * num_elem_per_idx]`` raw.

    Raises:
        IndexError: an offset lies outside ``src`` (undefined on hardware).
    """
    lanes = src.shape[0]
    flat, entries = src.reshape(lanes, -1), index.reshape(lanes, -1)
    valid = entries.shape[1] * CORE if num_valid_indices is None else num_valid_indices
    step = np.arange(num_elem_per_idx)
    out = np.empty((lanes, valid * num_elem_per_idx), src.dtype)
    for first in range(0, lanes, CORE):
        core = slice(first, first + CORE)
        offsets = entries[core].T.ravel()[:valid].astype(np.intp)
        out[core] = flat[core][:, (offsets[:, None] + step).ravel()]
    return out


def nc_n_gather(data: NDArray[Any], indices: NDArray[Any]) -> NDArray[Any]:
    """``dst[p, j] = data[p].flat[indices[p, j]]``; raw, in ``indices``' shape.

    Raises:
        IndexError: an index lies outside the partition's elements.
    """
    lanes = data.shape[0]
    entries = indices.reshape(lanes, -1).astype(np.intp)
    picked = np.take_along_axis(data.reshape(lanes, -1), entries, axis=1)
    return picked.reshape(indices.shape)


def sequence_bounds(segment_ids: NDArray[Any]) -> NDArray[np.float32]:
    """Bounds of the run of equal ids that each element belongs to.

    Args:
        segment_ids: ``[1, n]`` fp32 or int32; 0 is padding.

    Returns:
        ``[1, 2, n]`` fp32: first index, index after the last; ``(n, -1)`` for padding. Segments are
        runs of neighbours: an id that returns later starts a new one.
    """
    ids = segment_ids.reshape(-1)
    n = ids.size
    starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    lengths = np.diff(np.r_[starts, n])
    out = np.stack([np.repeat(starts, lengths), np.repeat(starts + lengths, lengths)])
    out[:, ids == 0] = [[n], [-1]]
    return out.astype(np.float32).reshape(1, 2, n)


def nonzero_with_count(
    dst: NDArray[np.int32],
    src: NDArray[Any],
    index_offset: int = 0,
    padding_val: int = -1,
    start_partition: int = 0,
) -> NDArray[np.int32]:
    """Positions of nonzero elements, padding, and their count, on every 16th partition.

    Args:
        dst: ``[P, N + 1]`` int32 before the instruction; other partitions keep it.
        src: ``[P, *free]`` fp32 or int32, N elements per partition. NaN counts as nonzero.
        index_offset: added to each position.
        padding_val: fills unused slots.
        start_partition: physical partition of row 0; rows on a multiple of 16 take part.

    Returns:
        ``[P, N + 1]`` int32.
    """
    lanes = src.shape[0]
    flat = src.reshape(lanes, -1)
    out = dst.reshape(lanes, -1).copy()
    for row in range(-start_partition % CORE, lanes, CORE):
        found = np.flatnonzero(flat[row])
        out[row, :-1] = padding_val
        out[row, : found.size] = found + index_offset
        out[row, -1] = found.size
    return out.reshape(dst.shape)


def topk(src: F32, n: int, k: int) -> tuple[F32, NDArray[np.uint32]]:
    """The ``k`` largest of ``n`` elements per group of 16 partitions, ascending, with indices.

    Not verified on hardware. The documentation says both that partitions are independent and that
    the source is a snake over 16 partitions; the snake is taken here, and all 16 rows of a group
    receive the group's result. Of equal values, the one with the lower index ranks higher (so it
    is chosen first and stands later). NaN ranks highest. None of these is documented.

    Args:
        src: ``[P, X]`` fp32 values of a bf16 tile; element ``e`` of a group is
            ``src[e % 16, e // 16]``.
        n: elements that take part.
        k: results.

    Returns:
        ``[P, k]`` fp32 values and ``[P, k]`` uint32 indices.
    """
    lanes = src.shape[0]
    groups = src.reshape(lanes // CORE, CORE, -1).transpose(0, 2, 1).reshape(lanes // CORE, -1)
    groups = groups[:, :n]
    # Stable ascending sort of the reversed row puts lower indices last among equals.
    order = n - 1 - np.argsort(groups[:, ::-1], axis=1, kind="stable")[:, n - k :]
    values = np.take_along_axis(groups, order, axis=1)
    return np.repeat(values, CORE, axis=0), np.repeat(order.astype(np.uint32), CORE, axis=0)


def tensor_partition_reduce(data: NDArray[Any], op: str) -> NDArray[Any]:
    """Reduce over partitions.

    Args:
        data: ``[P, *free]``: fp32 for ``add``, ``average`` and ``maximum``; raw integers for
            ``bitwise_or`` and ``bitwise_and``.
        op: one of those.

    Returns:
        ``[1, *free]``: fp32, or unsigned integers (``dtypes.store_bits``).
    """
    if op in ("bitwise_or", "bitwise_and"):
        ufunc = np.bitwise_or if op == "bitwise_or" else np.bitwise_and
        return ufunc.reduce(bits(data), axis=0, keepdims=True)
    if op == "maximum":
        return np.maximum.reduce(data, axis=0, keepdims=True)
    total = np.add.reduce(data, axis=0, keepdims=True)
    return total / np.float32(data.shape[0]) if op == "average" else total
