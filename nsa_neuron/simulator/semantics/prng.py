"""Random numbers (docs/trainium2.md 3.7).

The generators' sequences are not published: results are reproducible here, equal to hardware's
nowhere. DVE's generator is a counter-based one with a 32-bit seed. POOL's is Marsaglia's XORWOW,
whose six words of state per partition match the documented size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import alu

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .alu import Operand


class DveState(NamedTuple):
    """State of DVE's generator: 32-bit seed, and numbers drawn since it was set."""

    seed: int = 0
    drawn: int = 0


def dve_bits(state: DveState, shape: tuple[int, ...]) -> tuple[NDArray[np.uint32], DveState]:
    """Draw 32 random bits per element; store narrow types with ``dtypes.store_bits``."""
    count = int(np.prod(shape))
    skip = state.drawn % 8  # a block of the generator holds eight 32-bit words
    source = np.random.Philox(key=state.seed, counter=state.drawn // 8)
    words = source.random_raw((count + skip + 1) // 2).view(np.uint32)
    return words[skip : skip + count].reshape(shape), state._replace(drawn=state.drawn + count)


XORWOW_WORDS = 6
"""Words of state per partition: x, y, z, w, v and the Weyl counter d."""


def xorwow_default(lanes: int) -> NDArray[np.uint32]:
    """State before any ``rand_set_state``: Marsaglia's seeds, one counter per partition."""
    words = [123456789, 362436069, 521288629, 88675123, 5783321, 6615241]
    state = np.tile(np.array(words, np.uint32), (lanes, 1))
    state[:, 5] += np.arange(lanes, dtype=np.uint32) * np.uint32(0x9E3779B9)
    return state


def xorwow_bits(
    state: NDArray[np.uint32], count: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Draw from POOL's generator.

    Args:
        state: ``[P, 6]`` uint32.
        count: numbers per partition.

    Returns:
        ``[P, count]`` uint32 and the ``[P, 6]`` state after.
    """
    x, y, z, w, v, d = state.T.copy()
    out = np.empty((count, state.shape[0]), np.uint32)
    for i in range(count):
        t = x ^ (x >> 2)
        x, y, z, w = y, z, w, v
        v = (v ^ (v << 4)) ^ (t ^ (t << 1))
        d = d + np.uint32(362437)
        out[i] = d + v
    return np.ascontiguousarray(out.T), np.stack([x, y, z, w, v, d], axis=1)


def dropout(data: NDArray[Any], prob: Operand, state: DveState) -> tuple[NDArray[Any], DveState]:
    """Replace elements by zero with probability ``prob``; kept ones are bit-exact, not rescaled.

    Args:
        data: ``[P, *free]`` raw.
        prob: constant or ``[P, 1]``; 1 or more drops all, 0 or less drops none.
        state: DVE's generator.
    """
    words, state = dve_bits(state, data.shape)
    uniform = (words >> 8).astype(np.float32) * np.float32(2.0**-24)
    drop = uniform < alu.column(prob, data.ndim)
    return np.where(drop, np.zeros((), data.dtype), data), state
