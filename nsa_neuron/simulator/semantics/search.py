"""DVE's search and shuffle instructions (docs/trainium2.md 3.5).

Values are compared in fp32: -0.0 equals 0.0 and NaN equals nothing. ``max8`` counts NaN as the
largest value. None of this is documented.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from .alu import F32

NOT_FOUND = np.uint32(0xFFFFFFFF)
"""Index of an absent value; truncates to 0xFFFF in a uint16 destination (``store_bits``)."""

KEEP = 255
"""Entry of a shuffle mask that leaves its destination partition alone."""


def max8(src: F32) -> F32:
    """The 8 largest elements of each partition, descending, duplicates kept: ``[P, 8]`` fp32."""
    flat = src.reshape(src.shape[0], -1)
    top = np.partition(flat, flat.shape[1] - 8, axis=1)[:, -8:]
    top.sort(axis=1)
    return top[:, ::-1]


def _first_free_matches(
    data: F32, vals: F32, order: Iterable[int]
) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """Positions of 8 values per partition, each taking the first match no other value took.

    Args:
        data: ``[P, N]``.
        vals: ``[P, 8]``.
        order: columns of ``vals`` in the order in which they choose.

    Returns:
        ``[P, 8]`` positions (``NOT_FOUND`` where none), and ``[P, N]`` the elements taken.
    """
    lanes = np.arange(data.shape[0])
    index = np.full(vals.shape, NOT_FOUND, np.uint32)
    taken = np.zeros(data.shape, np.bool_)
    for column in order:
        match = data == vals[:, column : column + 1]
        match &= ~taken
        position = match.argmax(axis=1)
        found = match[lanes, position]
        index[found, column] = position[found]
        taken[lanes[found], position[found]] = True
    return index, taken


def nc_find_index8(data: F32, vals: F32) -> NDArray[np.uint32]:
    """Index of each of 8 values in its partition.

    Args:
        data: ``[P, *free]`` fp32; the free axes run as one.
        vals: 8 values per partition. Equal values take successive matches, in ascending order.

    Returns:
        ``[P, 8]`` uint32, ``NOT_FOUND`` where there is none; store with ``dtypes.store_bits``.
    """
    lanes = data.shape[0]
    return _first_free_matches(data.reshape(lanes, -1), vals.reshape(lanes, 8), range(8))[0]


def nc_match_replace8(data: F32, vals: F32, imm: float) -> tuple[F32, NDArray[np.uint32]]:
    """Replace one match of each of 8 values by ``imm``.

    Values choose in the order 7, 6, ..., 0, so equal values end with descending positions. Matches
    are looked for in the original data: an element already replaced never matches again.

    Args:
        data: ``[P, *free]`` fp32; the free axes run as one.
        vals: 8 values per partition.
        imm: replacement.

    Returns:
        fp32 of ``data``'s shape, and ``[P, 8]`` positions (``NOT_FOUND`` where none, which is not
        documented: by analogy with ``nc_find_index8``).
    """
    lanes = data.shape[0]
    flat = data.reshape(lanes, -1)
    index, taken = _first_free_matches(flat, vals.reshape(lanes, 8), range(7, -1, -1))
    return np.where(taken, np.float32(imm), flat).reshape(data.shape), index


def nc_stream_shuffle(
    dst: NDArray[Any], src: NDArray[Any], shuffle_mask: Sequence[int]
) -> NDArray[Any]:
    """Move whole partitions within each quadrant of 32.

    Args:
        dst: ``[Pd, *free]`` raw elements before the instruction.
        src: ``[Ps, *free]`` raw, same type and elements per partition; counted from its own start,
            so partition 0 is the first of a quadrant.
        shuffle_mask: 32 entries: output partition ``i`` of each quadrant copies input partition
            ``shuffle_mask[i]`` of the same quadrant; 255 keeps ``dst``.

    Returns:
        raw elements of ``dst``'s type and shape.

    Raises:
        IndexError: an entry points past the partitions of ``src``.
    """
    out = dst.copy()
    moved = src.reshape(src.shape[0], *dst.shape[1:])
    target = np.arange(dst.shape[0])
    entry = np.asarray(shuffle_mask)[target % 32]
    write = entry != KEEP
    out[target[write]] = moved[(target - target % 32 + entry)[write]]
    return out
