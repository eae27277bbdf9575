"""Where the tokens and blocks of context-parallel sequences lie: plain integers.

Rank r of R holds the tokens `r * C .. (r + 1) * C - 1` of a token axis of `R * C`, which one
sequence fills, or several that are packed back to back and may cross the borders between ranks. A
compressed block belongs to the rank that holds its last token. A rank's queries are then the last
of each of its pieces of sequences, if the keys before them are at hand; that is what every op
expects, so each runs unchanged on the rows that a `Layout` names.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

Range = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Block, stride and window: l, d, w."""

    block: int
    stride: int
    window: int


@dataclass(frozen=True)
class Layout:
    """What one rank of a group needs, in rows of the whole token axis.

    Attributes:
        rank, world: r and R.
        tokens: C.
        edges: offsets of the sequences, from 0 to `world * tokens`.
        geometry: sizes of the call.
    """

    rank: int
    world: int
    tokens: int
    edges: tuple[int, ...]
    geometry: Geometry

    @property
    def low(self) -> int:
        """First own token."""
        return self.rank * self.tokens

    @property
    def high(self) -> int:
        """One behind the last own token."""
        return self.low + self.tokens

    @cached_property
    def start(self) -> int:
        """First token of the sequence that holds the first own token."""
        return self.edges[bisect.bisect_right(self.edges, self.low) - 1]

    @cached_property
    def stops(self) -> list[int]:
        """Where the own pieces of sequences end."""
        inner = [edge for edge in self.edges if self.low < edge < self.high]
        return [*inner, self.high]

    @property
    def keys(self) -> Range:
        """Tokens that own queries can see."""
        return self.start, self.high

    @cached_property
    def window(self) -> Range:
        """Tokens that the windows of own queries hold."""
        return max(self.start, self.low - self.geometry.window + 1), self.high

    @cached_property
    def first_block(self) -> int:
        """Within its sequence, the first compressed block that ends among the own tokens."""
        before = self.low - self.start - self.geometry.block + 1
        return max(0, -(-before // self.geometry.stride))

    @property
    def compressed(self) -> Range:
        """Tokens of the own compressed blocks, and those behind the last."""
        return self.start + self.first_block * self.geometry.stride, self.high

    def offsets(self, first: int) -> list[int]:
        """Of the own pieces of sequences, if their rows begin with token `first`."""
        return [0, *(stop - first for stop in self.stops)]

    @cached_property
    def block_counts(self) -> list[int]:
        """Own compressed blocks by piece of a sequence."""
        lengths = (b - a for a, b in itertools.pairwise(self.offsets(self.compressed[0])))
        l, d = self.geometry.block, self.geometry.stride
        return [max(0, (length - l) // d + 1) for length in lengths]

    @cached_property
    def block_ends(self) -> list[int]:
        """Position of the last token of each own compressed block in its sequence."""
        ends = []
        for piece, count in enumerate(self.block_counts):
            first = 0 if piece else self.first_block
            ends += [(first + i) * self.geometry.stride for i in range(count)]
        return [end + self.geometry.block - 1 for end in ends]


@dataclass(frozen=True)
class Group:
    """The layouts of all ranks, and how rows and blocks are spread.

    Attributes:
        layouts: by rank.
        mine: this rank.
    """

    layouts: tuple[Layout, ...]
    mine: int

    @property
    def own(self) -> Layout:
        return self.layouts[self.mine]

    @cached_property
    def token_bounds(self) -> list[int]:
        """First token of each rank, and the end."""
        return [layout.low for layout in self.layouts] + [self.layouts[-1].high]

    @cached_property
    def block_bounds(self) -> list[int]:
        """The same for compressed blocks, in the order of their last tokens."""
        counts = (sum(layout.block_counts) for layout in self.layouts)
        return list(itertools.accumulate(counts, initial=0))

    @cached_property
    def blocks_needed(self) -> list[Range]:
        """Compressed blocks that each rank's queries can see."""
        l, d = self.own.geometry.block, self.own.geometry.stride
        ahead = {0: 0}
        for a, b in itertools.pairwise(self.own.edges):
            ahead[b] = ahead[a] + max(0, (b - a - l) // d + 1)
        ends = self.block_bounds[1:]
        return [(ahead[x.start], end) for x, end in zip(self.layouts, ends, strict=True)]

    def aligned(self, select_block: int) -> bool:
        """Whether no selection block lies on both sides of a border between ranks."""
        return all((x.low - x.start) % select_block == 0 for x in self.layouts)


def group(
    rank: int, world: int, tokens: int, geometry: Geometry, edges: Sequence[int] | None = None
) -> Group:
    """The layouts of a call.

    Args:
        rank, world: r and R.
        tokens: of each rank.
        geometry: sizes of the call.
        edges: offsets of packed sequences over all ranks; None: one sequence.
    """
    known = (0, world * tokens) if edges is None else tuple(edges)
    made = (Layout(r, world, tokens, known, geometry) for r in range(world))
    return Group(tuple(made), rank)
