"""Which keys each query of range attention sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

UNLIMITED = -(2**30)
"""`lo_add` where every query sees the first key of its sequence."""


@dataclass(frozen=True)
class Ranges:
    """Which keys each query sees. See `nki_kernels/common/range_attention`.

    Attributes:
        bounds: [S, 2] float32, first key and one past the last.
        reach: (hi_add, lo_add, step, exact), the bounds as compile-time integers.
    """

    bounds: Tensor
    reach: tuple[int, int, int, bool]
