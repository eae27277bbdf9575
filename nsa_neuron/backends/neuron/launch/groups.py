"""Which calls of range attention run in hardware loops, and what those need to know.

A hardware loop's body is a group of queries, and pairs of groups have equal trip counts (see
`nki_kernels/common/range_attention/loops.py`). Queries are padded to whole pairs with copies of the
last one, keys to whole chunks with zeros that nobody sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_neuron.backends.neuron.launch.reach import UNLIMITED

if TYPE_CHECKING:
    from nsa_neuron.backends.neuron.launch.reach import Ranges

PARTITIONS = 128
PARTS = 4  # of 128 rows, in a tile
SECTION = 256  # keys whose gradients are made at a time

INSTRUCTIONS = {"forward": (130, 21), "backward": (40, 36)}
"""Of the largest unrolled kernel per 512 rows, and for each 128 keys of them: both ways of the
forward, or dk and dv."""


def unrolled_instructions(
    direction: str,
    shape: tuple[int, int, int],
    group: int,
    keys: int,
    reach: tuple[int, int, int, bool],
) -> int:
    """About how many instructions the largest unrolled kernel has, on one core.

    Args:
        direction: forward or backward. shape: B, S, Hkv. group: G.
        keys: T. reach: of `Ranges`.
    """
    batch, queries, kv_heads = shape
    hi_add, lo_add, step, exact = reach
    middle = (queries - 1) / 2 if exact else queries - 1
    last = min(keys, (middle + hi_add) / step)
    first = max(0.0, (middle + lo_add) / step) if exact else 0.0
    tiles = math.ceil(queries * group / 512) * batch * kv_heads
    fixed, per_tile = INSTRUCTIONS[direction]
    return int(tiles * (fixed + (max(0.0, last - first) / PARTITIONS + 1) * per_tile))


def loops(instructions: int, sizes: Mapping[str, Any], packed: bool) -> bool:
    """Whether a call runs in hardware loops: unrolled, it would have so many instructions.

    Args:
        sizes: "looped" of a plan. packed: unrolled, its tiles visit all keys before them.
    """
    return bool(instructions > sizes["most_packed" if packed else "most_unrolled"])


@dataclass(frozen=True)
class Groups:
    """Groups of queries and the chunks of keys that each pair of them sees.

    Attributes:
        queries: of a group. tiles: of rows in a group. large, small: keys of a chunk.
        from_start: every query sees the first key.
        bounds: [S', 2] float32, of the padded queries.
        trips: int32 [groups, 8], bases: float32 [groups, 2], as the kernels want them.
    """

    queries: int
    tiles: int
    large: int
    small: int
    from_start: bool
    bounds: Tensor
    trips: Tensor
    bases: Tensor

    @classmethod
    def of(cls, ranges: Ranges, group: int, sizes: Mapping[str, Any]) -> Groups:
        """Groups of a call.

        Args:
            group: heads of a kv head. sizes: tiles, large and small of a plan.
        """
        at_once = math.ceil(group / math.ceil(group / PARTITIONS))  # heads of a program
        queries = sizes["tiles"] * PARTS * max(1, PARTITIONS // at_once)
        bounds = padded_queries(ranges.bounds[None], queries)[0]
        from_start = ranges.reach[1] == UNLIMITED and ranges.reach[3]
        trips = _trips(bounds, 2 * queries, sizes["large"], sizes["small"])
        trips = trips.repeat_interleave(2, 0)
        bases = trips[:, [0, 6]] * sizes["small"]
        return cls(
            queries, sizes["tiles"], sizes["large"], sizes["small"], from_start, bounds,
            trips.int(), bases.float(),
        )  # fmt: skip

    @property
    def looped(self) -> tuple[int, int, int, bool]:
        """The kernels' compile-time argument of that name."""
        return self.tiles, self.large, self.small, self.from_start

    def rows(self, x: Tensor) -> Tensor:
        """[B, S, ...] padded to whole pairs of groups."""
        return padded_queries(x, self.queries)

    def zero_rows(self, x: Tensor) -> Tensor:
        """The same with zeros."""
        missing = -x.shape[1] % (2 * self.queries)
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else x

    def keys(self, x: Tensor) -> Tensor:
        """[B, T, Hkv, D] padded with zeros to whole small chunks and pairs of sections."""
        missing = -x.shape[1] % math.lcm(self.small, 2 * SECTION)
        return F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x

    def sections(self, keys: int) -> Tensor:
        """int32 [sections, 4]: of each pair of sections of keys, bounds of the chunks of queries
        that see some of them, all of them, and some again; a chunk is a pair of groups.

        Ranges of later queries begin and end no earlier, so these are intervals.
        """
        lo, hi = self.bounds.unflatten(0, (-1, 2 * self.queries)).unbind(-1)
        start = torch.arange(0, keys, 2 * SECTION, device=lo.device).float()
        end = start + 2 * SECTION
        first = torch.searchsorted(hi.amax(1), start, right=True)
        last = torch.searchsorted(lo.amin(1), end)
        last = last.maximum(first)
        all_from = torch.searchsorted(hi.amin(1), end).clamp(min=first, max=last)
        all_to = torch.searchsorted(lo.amax(1), start, right=True).clamp(min=all_from, max=last)
        return torch.stack((first, all_from, all_to, last), 1).repeat_interleave(2, 0).int()


def padded_queries(x: Tensor, queries: int) -> Tensor:
    """[B, S, ...] padded to whole pairs of groups of `queries` with copies of the last query."""
    missing = -x.shape[1] % (2 * queries)
    if not missing:
        return x
    return torch.cat((x, x[:, -1:].expand(-1, missing, *x.shape[2:])), 1)


def _trips(bounds: Tensor, pair: int, large: int, small: int) -> Tensor:
    """int64 [pairs, 8]: chunks of keys, in the order of `for_all_chunks`.

    Small chunks that some query of a pair sees, but not all; small ones that all see, up to a whole
    large one; large ones; small ones that all see; small ones that some see.
    """
    lo, hi = bounds.long().unflatten(0, (-1, pair)).unbind(-1)
    dead = hi <= lo
    far = 2**40
    some_from = torch.where(dead, far, lo).amin(1)
    some_to = torch.where(dead, 0, hi).amax(1)
    some_from = some_from.minimum(some_to)
    first, last = some_from // small, -(-some_to // small)
    all_from = -(-lo.amax(1) // small)
    all_to = hi.amin(1) // small
    none = (all_to <= all_from) | dead.any(1)
    all_from, all_to = torch.where(none, first, all_from), torch.where(none, first, all_to)
    ratio = large // small
    big_from, big_to = -(-all_from // ratio), all_to // ratio
    none = big_to <= big_from
    # Without large chunks, all small ones that all see come after the place of the large ones.
    split = torch.where(none, all_from, big_from * ratio)
    after = torch.where(none, all_from, big_to * ratio)
    zero = torch.zeros_like(first)
    big_from, big_to = torch.where(none, zero, big_from), torch.where(none, zero, big_to)
    return torch.stack((first, all_from, split, big_from, big_to, after, all_to, last), 1)
