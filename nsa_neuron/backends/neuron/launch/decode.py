"""Launches `nki_kernels/decode`: new tokens against paged KV caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_neuron.backends.neuron.launch.ranges import positive_scale

if TYPE_CHECKING:
    from nsa_neuron.backends.neuron.plans import Plan
    from nsa_neuron.backends.neuron.run import Kernels

PARTITIONS = 128
MIN_BLOCKS = 8
"""What VectorE's search for the largest wants at least."""


def forward(
    kernels: Kernels,
    plan: Plan,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    seqlens: Tensor,
    cmp_table: Tensor,
    slc_table: Tensor,
    win_table: Tensor,
    *,
    block: int,
    stride: int,
    select_block: int,
    num_selected: int,
    num_initial: int,
    num_local: int,
    window: int,
    scale: float,
) -> Tensor:
    """o [B, S, Hq, Dv] of q [B, S, Hq, Dk] against pools [pages, page, Hkv, D].

    As many queries at a time as 128 partitions hold with all heads of a group.
    """
    q, scale = positive_scale(q, scale)
    queries, heads = q.shape[1:3]
    kv_heads = k_cmp.shape[2]
    step = PARTITIONS // (heads // kv_heads)
    compressed = Units.of(k_cmp, v_cmp, cmp_table)
    near = Units.of(k_win, v_win, win_table)
    blocks = Units.of(k_slc, v_slc, slc_table, select_block)
    parts = select_block // _unit(select_block)
    slc_k, slc_v = (x.reshape(-1, select_block // parts, *x.shape[2:]) for x in (k_slc, v_slc))
    found = []
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        rows = Rows.of(q[:, start:stop], kv_heads, kernels.cores)
        position = seqlens.long()[:, None] + torch.arange(
            start - queries, stop - queries, device=q.device
        )
        win_units, win_bounds = near.of_window(position, window)
        last_block = torch.div(position + 1 - block, stride, rounding_mode="floor")
        unit = select_block // parts
        own_unit = torch.div(position, unit, rounding_mode="floor")
        bounds = (
            torch.zeros_like(position), last_block, *win_bounds,
            own_unit + 1, position - own_unit * unit + 1,
        )  # fmt: skip
        own = torch.div(position, select_block, rounding_mode="floor")
        (o,) = kernels.decode(
            rows.columns(q[:, start:stop]), rows.by_group(gates[:, start:stop].float()),
            rows.per_row(torch.stack(bounds, -1)),
            rows.per_pair(torch.stack((own, own - num_local), -1)),
            compressed.numbers, blocks.at_least(MIN_BLOCKS), win_units,
            rows.owners.to(q.device), rows.rows_of.to(q.device),
            compressed.k, compressed.v, slc_k, slc_v, near.k, near.v,
            length=block // stride, ratio=select_block // stride, parts=parts,
            chosen=min(num_selected, blocks.numbers.shape[1]), initial=num_initial, scale=scale,
        )  # fmt: skip
        found.append(rows.heads(o))
    return torch.cat(found, 1)


def _unit(page: int) -> int:
    """The largest divisor of `page` that fits the partitions."""
    return next(size for size in range(PARTITIONS, 0, -1) if page % size == 0)


@dataclass(frozen=True)
class Units:
    """A cache as units of at most 128 rows, or of any given divisor of a page.

    Attributes:
        k, v: [units, unit, Hkv, D].
        numbers: int32 [B, units of a sequence]; entries that may hold anything are some unit.
    """

    k: Tensor
    v: Tensor
    numbers: Tensor

    @classmethod
    def of(cls, k: Tensor, v: Tensor, table: Tensor, unit: int = 0) -> Units:
        """Pools [pages, page, Hkv, D] and a table of pages [B, most pages]."""
        pages, page = k.shape[:2]
        unit = unit or _unit(page)
        parts = torch.arange(page // unit, device=table.device)
        numbers = table.clamp(0, pages - 1)[..., None] * len(parts) + parts
        k, v = (x.reshape(-1, unit, *x.shape[2:]) for x in (k, v))
        return cls(k, v, numbers.flatten(1).int())

    def at_least(self, count: int) -> Tensor:
        """`numbers` with at least `count` columns."""
        return F.pad(self.numbers, (0, max(0, count - self.numbers.shape[1])))

    def of_window(self, position: Tensor, window: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Units that hold the windows of queries at `position` [B, S], and each one's keys.

        Returns:
            int32 [B, units], and first and last visible key [B, S], counted from the first unit.
        """
        unit, total = self.k.shape[1], self.numbers.shape[1]
        count = min((window + position.shape[1] - 3) // unit + 2, total)
        low = (position - window + 1).clamp(min=0)
        first = torch.div(low[:, :1], unit, rounding_mode="floor")
        index = (first + torch.arange(count, device=first.device)).clamp(max=total - 1)
        return self.numbers.gather(1, index), (low - first * unit, position - first * unit)


@dataclass(frozen=True)
class Rows:
    """How rows lie on partitions: kv heads on `pitch` partitions each, `per_group` at a time.

    Attributes:
        queries, kv_heads, group: S, Hkv, G.
    """

    queries: int
    kv_heads: int
    group: int
    pitch: int
    per_group: int

    @classmethod
    def of(cls, q: Tensor, kv_heads: int, cores: int) -> Rows:
        """For q [B, S, Hq, Dk]; heads in two groups at least where two cores must share them."""
        queries, group = q.shape[1], q.shape[2] // kv_heads
        pitch = next(size for size in (32, 64, PARTITIONS) if size >= queries * group)
        most = PARTITIONS // pitch
        if q.shape[0] % cores and kv_heads % cores == 0:
            most = min(most, kv_heads // cores)
        per_group = next(size for size in range(most, 0, -1) if kv_heads % size == 0)
        return cls(queries, kv_heads, group, pitch, per_group)

    def by_group(self, x: Tensor) -> Tensor:
        """[B, S, Hq, C] as [B, groups, rows, C], zero where a partition has no row."""
        heads: Tensor = x.unflatten(2, (self.kv_heads, self.group))
        rows = heads.transpose(1, 2).flatten(2, 3)
        rows = F.pad(rows, (0, 0, 0, self.pitch - rows.shape[2]))
        return rows.reshape(x.shape[0], -1, self.per_group * self.pitch, x.shape[3]).contiguous()

    def columns(self, x: Tensor) -> Tensor:
        """The same as [B, groups, C, rows]."""
        return self.by_group(x).mT.contiguous()

    def per_row(self, x: Tensor) -> Tensor:
        """Numbers of queries [B, S, C] as float32 [B, rows, C], -1 where there is no row."""
        rows = x.repeat_interleave(self.group, 1).float()
        rows = F.pad(rows, (0, 0, 0, self.pitch - rows.shape[1]), value=-1.0)
        return rows.repeat(1, self.per_group, 1)

    def per_pair(self, x: Tensor) -> Tensor:
        """Numbers of queries [B, S, C] as float32 [B, kv heads of a group * S, C]."""
        return x.float().repeat(1, self.per_group, 1)

    def heads(self, o: Tensor) -> Tensor:
        """[B, groups, rows, Dv] as [B, S, Hq, Dv]."""
        rows = o.reshape(o.shape[0], self.kv_heads, self.pitch, o.shape[3])
        live = rows[:, :, : self.queries * self.group]
        heads: Tensor = live.unflatten(2, (self.queries, self.group))
        return heads.transpose(1, 2).flatten(2, 3).contiguous()

    @property
    def owners(self) -> Tensor:
        """float32 [rows, pairs]: 1 where a row is one of the heads of a (kv head, query) pair."""
        own = torch.zeros(self.per_group, self.pitch, self.per_group, self.queries)
        for head in range(self.per_group):
            for query in range(self.queries):
                rows = slice(query * self.group, (query + 1) * self.group)
                own[head, rows, head, query] = 1.0
        return own.flatten(2, 3).flatten(0, 1)

    @property
    def rows_of(self) -> Tensor:
        """float32 [pairs, S, rows]: the same for pairs of one query at a time."""
        own = self.owners.T
        query = torch.arange(len(own)) % self.queries
        return own[:, None, :] * (query[:, None] == torch.arange(self.queries))[..., None]
