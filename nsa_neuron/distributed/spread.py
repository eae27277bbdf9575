"""Rows that are spread over ranks: fetching those that a rank needs, and returning gradients.

Rows lie along dimension 1 of `[B, rows, H, D]`. Each rank owns a contiguous range of them and needs
one that ends with its own last row (`Spread`), or chosen blocks before its own rows (`Blocks`).
What comes back is summed in float32, in the order of the ranks, so that it never changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nsa_neuron.distributed.exchange import Pending, exchange, gather
from nsa_neuron.ops.softmax import work_dtype

if TYPE_CHECKING:
    import torch.distributed as dist

    from nsa_neuron.distributed.layout import Group, Range


@dataclass(frozen=True)
class Spread:
    """Contiguous ranges of rows.

    Attributes:
        ranks: process group; None: one rank.
        mine: this rank.
        bounds: first row of each rank, and the end.
        needs: rows that each rank needs; they end with its own.
    """

    ranks: dist.ProcessGroup | None
    mine: int
    bounds: Sequence[int]
    needs: Sequence[Range]

    def _shared(self, owner: int, user: int) -> Range:
        """Rows of `owner` that `user` needs; empty for itself."""
        low = max(self.bounds[owner], self.needs[user][0])
        high = min(self.bounds[owner + 1], self.needs[user][1])
        return (low, max(low, high)) if owner != user else (0, 0)

    @cached_property
    def _out(self) -> list[slice]:
        """Own rows for each rank."""
        base = self.bounds[self.mine]
        ranges = (self._shared(self.mine, user) for user in range(len(self.needs)))
        return [slice(max(0, a - base), max(0, b - base)) for a, b in ranges]

    @cached_property
    def _into(self) -> list[slice]:
        """Rows from each rank, in the fetched ones."""
        first = self.needs[self.mine][0]
        ranges = (self._shared(owner, self.mine) for owner in range(len(self.needs)))
        return [slice(max(0, a - first), max(0, b - first)) for a, b in ranges]

    @property
    def ahead(self) -> int:
        """Fetched rows before the own ones."""
        return self.bounds[self.mine] - self.needs[self.mine][0]

    def fetch(self, own: Sequence[Tensor], purpose: str) -> Pending:
        """Starts to fetch what is needed of tensors of one dtype."""
        shapes = [[_shape(x, rows) for x in own] for rows in self._into]
        return exchange(
            self.ranks, [[x[:, rows] for x in own] for rows in self._out], shapes, own[0], purpose
        )

    def assemble(self, pending: Pending, own: Sequence[Tensor]) -> list[Tensor]:
        """The needed rows of each tensor, others' before the own."""
        parts = pending.wait()
        return [torch.cat([*(part[i] for part in parts), x], 1) for i, x in enumerate(own)]

    def give_back(self, grads: Sequence[Tensor], purpose: str) -> Pending:
        """Starts to return gradients of the needed rows to their owners."""
        shapes = [[_shape(x, rows) for x in grads] for rows in self._out]
        send = [[x[:, rows] for x in grads] for rows in self._into]
        return exchange(self.ranks, send, shapes, grads[0], purpose)

    def collect(self, pending: Pending, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the own rows, float32: of the own queries and of the others'."""
        parts, totals = pending.wait(), []
        for i, x in enumerate(grads):
            total = x[:, self.ahead :].to(work_dtype(x), copy=True)
            for part, place in zip(parts, self._out, strict=True):
                total[:, place] += part[i]
            totals.append(total)
        return totals


@dataclass(frozen=True)
class Blocks:
    """Selection blocks before the own rows.

    Attributes:
        ranks: process group.
        layouts: of all ranks.
        size: tokens of a block.
        wanted: of each owner, the ids that this rank fetches, ascending.
        asked: of each rank, the ids that it fetches from this one.
    """

    ranks: dist.ProcessGroup | None
    layouts: Group
    size: int
    wanted: list[Tensor]
    asked: list[Tensor]

    @property
    def first_own(self) -> int:
        """Id of the first block of the own rows, in the first own piece of a sequence."""
        own = self.layouts.own
        return (own.low - own.start) // self.size

    @cached_property
    def ids(self) -> Tensor:
        """All fetched blocks, ascending."""
        return torch.cat(self.wanted)

    @property
    def ahead(self) -> int:
        """Fetched rows."""
        return len(self.ids) * self.size

    def fetch(self, own: Sequence[Tensor], purpose: str) -> Pending:
        """Starts to fetch the blocks of tensors of one dtype."""
        send = [[self._rows(x, rows) for x in own] for rows in self._out]
        shapes = [[_shape(x, slice(0, len(i) * self.size)) for x in own] for i in self.wanted]
        return exchange(self.ranks, send, shapes, own[0], purpose)

    def assemble(self, pending: Pending, own: Sequence[Tensor]) -> list[Tensor]:
        """Fetched rows of each tensor, then the own."""
        parts = pending.wait()
        return [torch.cat([*(part[i] for part in parts), x], 1) for i, x in enumerate(own)]

    def give_back(self, grads: Sequence[Tensor], purpose: str) -> Pending:
        """Starts to return gradients of the fetched rows."""
        counts = [len(ids) * self.size for ids in self.wanted]
        pieces = [x[:, : self.ahead].split(counts, 1) for x in grads]
        send = [[piece[owner] for piece in pieces] for owner in range(len(counts))]
        shapes = [[_shape(x, slice(0, len(i) * self.size)) for x in grads] for i in self.asked]
        return exchange(self.ranks, send, shapes, grads[0], purpose)

    def collect(self, pending: Pending, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the own rows, float32."""
        totals = [x[:, self.ahead :].to(work_dtype(x), copy=True) for x in grads]
        for rows, part in zip(self._out, pending.wait(), strict=True):
            for total, piece in zip(totals, part, strict=True):
                # One rank asks for a block once, so no row is added twice at a time.
                total[:, rows] += piece
        return totals

    def local_ids(self, block_indices: Tensor) -> Tensor:
        """Ids as places in the assembled rows; those of later own pieces stay as they are."""
        first = self.layouts.own.stops[0] - self.layouts.own.low
        ids = block_indices[:, :first].long()
        place = torch.searchsorted(self.ids, ids.clamp(min=0))
        moved = torch.where(ids < self.first_own, place, ids - self.first_own + len(self.ids))
        moved = moved.masked_fill(ids < 0, -1).int()
        return torch.cat([moved, block_indices[:, first:]], 1)

    @cached_property
    def _out(self) -> list[Tensor]:
        """Own rows for each rank."""
        base = self.layouts.own.low
        within = torch.arange(self.size, device=self.ids.device)
        starts = [layout.start for layout in self.layouts.layouts]
        return [
            ((ids[:, None] * self.size + within).flatten() + start - base)
            for ids, start in zip(self.asked, starts, strict=True)
        ]

    @staticmethod
    def _rows(x: Tensor, rows: Tensor) -> Tensor:
        return x.index_select(1, rows)


def choose_blocks(
    ranks: dist.ProcessGroup | None,
    layouts: Group,
    size: int,
    block_indices: Tensor,
    force: bool = False,
) -> Blocks | None:
    """The blocks that each rank fetches; None: gathering all rows moves less.

    Args:
        ranks: process group.
        layouts: of all ranks, with no block on both sides of a border.
        size: tokens of a block.
        block_indices: of the own queries, `[B, S, Hkv, n]`.
        force: whether to fetch blocks whatever they cost.
    """
    own, world = layouts.own, layouts.own.world
    first = block_indices[:, : own.stops[0] - own.low]
    ids = torch.unique(first.long())
    ids = ids[(ids >= 0) & (ids < (own.low - own.start) // size)]
    owners = (ids * size + own.start) // own.tokens
    counts = torch.bincount(owners, minlength=world)
    table = torch.stack(gather(ranks, counts, "requests")) * size
    gathered = max(layout.low - layout.start for layout in layouts.layouts)
    most = int(torch.maximum(table.sum(1), table.sum(0)).max())
    if not force and most >= gathered:
        return None
    wanted = list(ids.split(counts.tolist()))
    lengths = (table[:, own.rank] // size).tolist()
    pending = exchange(
        ranks,
        [[part] for part in wanted],
        [[(n,)] for n in lengths],
        ids,
        "requests",
    )
    return Blocks(ranks, layouts, size, wanted, [part[0] for part in pending.wait()])


def _shape(x: Tensor, rows: slice) -> tuple[int, ...]:
    return (x.shape[0], rows.stop - rows.start, *x.shape[2:])
