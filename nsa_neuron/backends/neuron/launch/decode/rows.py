"""How the heads of new tokens lie on partitions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PARTITIONS = 128


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
