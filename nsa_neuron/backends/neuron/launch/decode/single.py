"""One new token against one kv head of a core: the kernel with the shortest chain of steps."""

from __future__ import annotations

import math
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
"""float32 of a bank of PSUM."""

ROW_TOKENS = 16
"""Compressed keys of a row: two gathers for 64K tokens, the first multiplied while the second
comes."""

HELD_TOKENS = 128
"""Compressed keys of each partition and all heads, at most: what SBUF holds with their values."""

EIGHT = 8
"""Largest values that VectorE finds at once."""

BEHIND = -1.0e7
"""Tokens before a row that is none: behind every query."""

Pools = tuple[Tensor, Tensor, Tensor]
"""Keys, values and page table of a branch."""


@dataclass(frozen=True)
class Call:
    """A call that the kernel takes.

    Attributes:
        far, near, blocks: compressed keys, those of the window, selection blocks.
        length, ratio: l / d and m / d. size: m. chosen: blocks.
        group: query heads of a kv head. pitch: lanes of PE for them.
        tiles: of 128 rows of compressed keys.
    """

    far: Cache
    near: Cache
    blocks: Cache
    length: int
    ratio: int
    size: int
    chosen: int
    group: int
    pitch: int
    tiles: int

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
        pitch = next(width for width in (32, 64, 128) if group <= width)
        # Of a bank of PSUM: the logits of 128 rows in 128 / pitch groups.
        widest = BANK // PARTITIONS * (PARTITIONS // pitch)
        far = Cache.of(*cmp, 1, min(widest, ROW_TOKENS))
        near = Cache.of(*win, 1, _fewest(win[0], window))
        blocks = Cache.of_blocks(*slc, size, selected, 1)
        chosen = min(selected, blocks.numbers.shape[1])
        if far.tokens % ratio:
            return None
        per_row = far.tokens // ratio
        rows = max(far.numbers.shape[1], -(-blocks.numbers.shape[1] // per_row))
        call = cls(
            far, near, blocks, length, ratio, size, chosen, group, pitch, -(-rows // PARTITIONS)
        )
        fits = (
            length - 1 <= far.tokens
            and call.tiles * far.tokens * items <= HELD_TOKENS
            and all(
                call._lanes(cache.tokens)[1] * PARTITIONS <= BANK for cache in (far, near, blocks)
            )
            and (window - 2) // near.tokens + 2 <= PARTITIONS
            and chosen * (size // blocks.tokens) <= PARTITIONS
            and call.tiles * per_row * PARTITIONS // call.parts <= BANK
        )
        return call if fits else None

    @property
    def parts(self) -> int:
        """How many rows the blocks are cut in, whose best are at most 128 candidates."""
        most = PARTITIONS // (EIGHT * -(-self.chosen // EIGHT))
        return 1 << most.bit_length() - 1

    def _lanes(self, tokens: int) -> tuple[int, int]:
        """Groups that a row is cut in, and tokens of each; see `nki_kernels/decode/spread.py`."""
        most = PARTITIONS // self.pitch
        groups = next(count for count in range(most, 0, -1) if tokens % count == 0)
        return groups, tokens // groups

    def run(
        self, kernels: Kernels, q: Tensor, gates: Tensor, seqlens: Tensor, *, kv_heads: int,
        block: int, stride: int, initial: int, local: int, window: int, scale: float,
    ) -> Tensor:  # fmt: skip
        """o [B, 1, Hq, Dv] of q [B, 1, Hq, Dk]."""
        batch, _, heads, dk = q.shape
        position = seqlens.long()[:, None] - 1
        last_block = torch.div(position + 1 - block, stride, rounding_mode="floor")
        near = self.near.of_window(position, window)
        index, kept = self._far(last_block)
        low = (position - window + 1).clamp(min=0)
        first = torch.div(low, self.near.tokens, rounding_mode="floor") * self.near.tokens
        place = torch.cat((
            *(self._columns(self.far.tokens, last_block + 1, self.tiles, i)
              for i in range(self.tiles)),
            self._columns(self.near.tokens, low - first),
            self._columns(self.near.tokens, position + 1 - first),
            *self._rows(position),
        ), -1)  # fmt: skip
        own = torch.div(position, self.size, rounding_mode="floor")
        (o,) = kernels.decode_single(
            self._queries(q.view(batch, kv_heads, -1, dk)),
            torch.cat((index, near.index), -1),
            torch.cat((place, kept, near.kept.abs().float()), -1),
            torch.stack((self._preference(own, initial, local), self._first_rows()), 2),
            gates.reshape(batch, kv_heads, -1, 3).float(), self._constants(q.device, scale),
            self.far.k, self.far.v, self.blocks.k, self.blocks.v, self.near.k, self.near.v,
            strides=(self.far.apart, self.blocks.apart, self.near.apart),
            rows=(near.rows, _round_up(self.chosen * (self.size // self.blocks.tokens), 16)),
            length=self.length, ratio=self.ratio, size=self.size, chosen=self.chosen,
            heads=self.group, by_dma=self.by_dma, scale=scale,
        )  # fmt: skip
        return o.view(batch, 1, heads, -1)

    @property
    def by_dma(self) -> bool:
        """Whether DMA can turn keys: 16-bit numbers, whole chunks of 128, parts of PE's rows."""
        rows = [math.prod(cache.k.shape[1:]) for cache in (self.far, self.near, self.blocks)]
        k = self.far.k
        return (
            k.element_size() == 2
            and k.shape[-1] % 32 == 0
            and not any(n % PARTITIONS for n in rows)
        )

    def _queries(self, q: Tensor) -> Tensor:
        """[B, Hkv, 128, places, pitch] of q [B, Hkv, G, Dk], laid out as the keys they meet; see
        `nki_kernels/decode/turned.py`."""
        dk = q.shape[-1]
        if self.by_dma:
            q = q.repeat(1, 1, 1, math.lcm(dk, PARTITIONS) // dk)
        else:
            q = F.pad(q, (0, -dk % PARTITIONS))
        q = F.pad(q.mT, (0, self.pitch - self.group)).unflatten(2, (-1, PARTITIONS))
        return q.transpose(2, 3).contiguous()

    def _far(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the compressed branch, neighbours on a partition, and which tokens are seen."""
        rows, tokens = PARTITIONS * self.tiles, self.far.tokens
        numbers = self.far.numbers
        index = F.pad(numbers, (0, rows - numbers.shape[1])).view(-1, PARTITIONS, self.tiles)
        kept = torch.arange(rows * tokens, device=last.device) <= last
        return index, kept.float().view(-1, PARTITIONS, self.tiles * tokens)

    def _columns(self, tokens: int, seen: Tensor, tiles: int = 1, tile: int = 0) -> Tensor:
        """How many columns of a tile's logits are before token `seen` [B, 1]: [B, 128, 1]."""
        groups, each = self._lanes(tokens)
        lane = torch.arange(PARTITIONS, device=seen.device)
        group = torch.div(lane, self.pitch, rounding_mode="floor").clamp(max=groups - 1)
        left = (seen - tile * tokens - group * each).clamp(min=0)
        rows = torch.div(left, tokens * tiles, rounding_mode="floor")
        columns = rows * each + (left - rows * tokens * tiles).clamp(max=each)
        return columns.clamp(max=PARTITIONS * each)[..., None].float()

    def _rows(self, position: Tensor) -> tuple[Tensor, ...]:
        """Of rows of chosen blocks: steps from the block's first one, tokens left there, and less
        those the tokens of each lane: [B, 128, 1], [B, 128, 1], [B, 128, tokens]."""
        tokens, step = self.blocks.tokens, self.blocks.step
        row = torch.arange(PARTITIONS, device=position.device)
        part = row % (self.size // tokens)
        left = position + 1 - part * tokens
        left = left.masked_fill(row >= self.chosen * (self.size // tokens), int(BEHIND))
        groups, each = self._lanes(tokens)
        group = torch.div(row, self.pitch, rounding_mode="floor").clamp(max=groups - 1)
        token = group[:, None] * each + torch.arange(each, device=row.device)
        return (
            (part * step).expand(len(position), -1)[..., None].float(),
            left[..., None].float(),
            (token - position[..., None] - 1).float(),
        )

    def _preference(self, own: Tensor, initial: int, local: int) -> Tensor:
        """[B, parts, blocks of a part]: what makes blocks be chosen, or not."""
        number = torch.arange(
            PARTITIONS * self.tiles * (self.far.tokens // self.ratio), device=own.device
        )
        forced = (number < initial) | (number > own - local)
        found = torch.where(number > own, NONE, torch.where(forced, FORCED, 0.0))
        return found.view(len(own), self.parts, -1)

    def _first_rows(self) -> Tensor:
        """First rows of the blocks, laid out as `_preference`."""
        rows = PARTITIONS * self.tiles * (self.far.tokens // self.ratio)
        numbers = self.blocks.numbers
        return (
            F.pad(numbers, (0, rows - numbers.shape[1])).view(len(numbers), self.parts, -1).float()
        )

    def _constants(self, device: torch.device, scale: float) -> Tensor:
        """What hangs on the call's sizes only; see `Constants` of
        `nki_kernels/decode/single.py`."""
        lane = torch.arange(PARTITIONS, device=device)
        group = torch.div(lane, self.pitch, rounding_mode="floor")
        apart = (group[:, None] == lane[: PARTITIONS // self.pitch]) * -scale
        part = PARTITIONS // self.parts
        gather = lane[:, None] % part == lane[:part]
        of_part = torch.div(lane, part, rounding_mode="floor")[:, None] == lane[: self.parts]
        unit = lane[:, None] == lane[: self.parts]
        head, order = lane % self.pitch, lane + EIGHT - 1 - 2 * (lane % EIGHT)
        columns = torch.stack((head, order), 1)
        fields = (apart, self._by_token(device), gather, of_part, unit, columns)
        return torch.cat([field.float() for field in fields], 1)

    def _by_token(self, device: torch.device) -> Tensor:
        """[128, 2, each, blocks of a row]: strides that a lane's token has in common with a block
        of its row, and with one of the next row."""
        tokens, ratio = self.far.tokens, self.ratio
        groups, each = self._lanes(tokens)
        lane = torch.arange(PARTITIONS, device=device)
        group = torch.div(lane, self.pitch, rounding_mode="floor")
        token = group[:, None] * each + torch.arange(each, device=device)
        first = torch.arange(tokens // ratio, device=device) * ratio
        used = (lane % self.pitch < self.group) & (group < groups)
        found = []
        for start in (token, token - tokens):
            low = torch.maximum(start[..., None], first)
            high = torch.minimum(start[..., None] + self.length, first + ratio)
            found.append((high - low).clamp(min=0) * used[:, None, None])
        return torch.stack(found, 1).flatten(1)


FORCED = 1.0e30
"""Above every worth, which is at most G times the stride's blocks."""

NONE = -3.0e38
"""Below every worth."""


def _round_up(count: int, size: int) -> int:
    return -(-count // size) * size


def _fewest(k: Tensor, window: int) -> int:
    """Tokens of a row, the fewest with which a window fits the partitions, and DMA can turn keys of
    all heads or of one if it can at all."""
    page = k.shape[1]
    sizes = [size for size in range(1, page + 1) if page % size == 0]
    fit = [n for n in sizes if (window - 2) // n + 2 <= PARTITIONS]
    whole = [n for n in fit if n * k.shape[3] % PARTITIONS == 0]
    return next(iter((*whole, *fit, page)))
