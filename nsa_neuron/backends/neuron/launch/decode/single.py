"""One new token against one kv head of a core: the kernel with the shortest chain of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_neuron.backends.neuron.launch.decode.caches import PARTITIONS, Cache

if TYPE_CHECKING:
    from nsa_neuron.backends.neuron.run import Kernels

HEADS = 2
"""Kv heads of all sequences, at most: one for each core of a launch."""

BANK = 512
"""float32 logits of a bank of PSUM."""

ROW_TOKENS = 16
"""Compressed keys of a row: two gathers for 64K tokens, the first turned while the second comes."""

HELD_TOKENS = 128
"""Compressed keys of each partition and all heads, at most: what SBUF holds with their values."""

Pools = tuple[Tensor, Tensor, Tensor]
"""Keys, values and page table of a branch."""


@dataclass(frozen=True)
class Call:
    """A call that the kernel takes.

    Attributes:
        far, near, blocks: compressed keys, those of the window, selection blocks.
        length, ratio: l / d and m / d. size: m. chosen: blocks.
    """

    far: Cache
    near: Cache
    blocks: Cache
    length: int
    ratio: int
    size: int
    chosen: int

    @classmethod
    def of(
        cls, group: int, items: int, cmp: Pools, slc: Pools, win: Pools, *, block: int,
        stride: int, size: int, selected: int, window: int,
    ) -> Call | None:  # fmt: skip
        """The call, or None where the kernel has no form for it.

        Args:
            group: query heads of a kv head. items: kv heads of all sequences.
        """
        length, ratio = block // stride, size // stride
        widest = BANK // group
        # A tile's ranks must fit a bank of PSUM as its logits do.
        far = Cache.of(*cmp, 1, min(widest, ROW_TOKENS, BANK // PARTITIONS * ratio))
        near = Cache.of(*win, 1, _fewest(win[0].shape[1], window))
        blocks = Cache.of_blocks(*slc, size, selected, 1)
        chosen = min(selected, blocks.numbers.shape[1])
        tiles = -(-far.numbers.shape[1] // PARTITIONS)
        fits = (
            far.tokens % ratio == 0
            and length - 1 <= far.tokens
            and tiles * far.tokens * items <= HELD_TOKENS
            and near.tokens <= widest
            and (window - 2) // near.tokens + 2 <= PARTITIONS
            and chosen * (size // blocks.tokens) <= PARTITIONS
            and blocks.tokens <= widest
        )
        return cls(far, near, blocks, length, ratio, size, chosen) if fits else None

    def run(
        self, kernels: Kernels, q: Tensor, gates: Tensor, seqlens: Tensor, *, kv_heads: int,
        block: int, stride: int, initial: int, local: int, window: int, scale: float,
    ) -> Tensor:  # fmt: skip
        """o [B, 1, Hq, Dv] of q [B, 1, Hq, Dk]."""
        batch, _, heads, dk = q.shape
        position = seqlens.long()[:, None] - 1
        last_block = torch.div(position + 1 - block, stride, rounding_mode="floor")
        far = self.far.seen(self.far.numbers, torch.zeros_like(position), last_block)
        near = self.near.of_window(position, window)
        own = torch.div(position, self.size, rounding_mode="floor")
        part = torch.arange(PARTITIONS, device=q.device) % (self.size // self.blocks.tokens)
        place = torch.stack((
            own.expand(-1, PARTITIONS), (own - local).expand(-1, PARTITIONS),
            (part * self.blocks.step).expand(batch, -1),
            position + 1 - part * self.blocks.tokens,
        ), -1).float()  # fmt: skip
        (o,) = kernels.decode_single(
            q.view(batch, kv_heads, -1, dk).mT.contiguous(),
            torch.cat((far.index, near.index), -1), torch.cat((far.kept, near.kept), -1).int(),
            gates.reshape(batch, kv_heads, -1, 3).float(),
            place, self._table(), _moves(q.device),
            self.far.k, self.far.v, self.blocks.k, self.blocks.v, self.near.k, self.near.v,
            apart=(self.far.apart, self.blocks.apart, self.near.apart), near_rows=near.rows,
            length=self.length, ratio=self.ratio, size=self.size, chosen=self.chosen,
            blocks=self.blocks.numbers.shape[1], initial=initial, scale=scale,
        )  # fmt: skip
        return o.view(batch, 1, heads, -1)

    def _table(self) -> Tensor:
        """First rows of the blocks, float32 [B, 128, slots]: some neighbours a partition."""
        batch, blocks = self.blocks.numbers.shape
        slots = -(-blocks // PARTITIONS)
        filled = F.pad(self.blocks.numbers, (0, slots * PARTITIONS - blocks))
        return filled.view(batch, PARTITIONS, slots).float()


def _fewest(page: int, window: int) -> int:
    """Tokens of a row, the fewest with which a window fits the partitions."""
    sizes = (size for size in range(1, page + 1) if page % size == 0)
    return next((n for n in sizes if (window - 2) // n + 2 <= PARTITIONS), page)


def _moves(device: torch.device) -> Tensor:
    """Float32 [2, 128, 128]: what moves rows to the next partition, and the last to the first."""
    shift = torch.diag(torch.ones(PARTITIONS - 1, device=device), 1)
    corner = torch.zeros_like(shift)
    corner[-1, 0] = 1.0
    return torch.stack((shift, corner))
