"""How a call of selected attention is cut: tiles of queries, pages of keys, lists of unions."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_neuron.backends.neuron.launch.selected_attention.sizes import PARTITIONS, QUADRANT, Sizes

if TYPE_CHECKING:
    from nsa_neuron.backends.neuron.run import Kernels

HIDDEN = -3.0e38
"""Twin of `nki_kernels.selected_attention.tile.HIDDEN`."""


@dataclass(frozen=True)
class Union:
    """Which pages each tile needs.

    Attributes:
        lists: int32 [tiles * trips per tile, U]: U pages per row, filled up with the null page.
        starts: int32 [tiles, 1], first row of a tile. trips: int32 [tiles, 1], rows that it needs;
            of the tiles of both halves equally many.
    """

    lists: Tensor
    starts: Tensor
    trips: Tensor

    @property
    def near(self) -> Tensor:
        """int32 [tiles, U]: the first row of each tile."""
        return self.lists.view(len(self.starts), -1, self.lists.shape[1])[:, 0]


@dataclass(frozen=True)
class Grid:
    """How queries are cut in tiles, and keys in pages of at most 128 tokens.

    A page is a block, or one of the equal parts of a longer block. Pages are numbered over batches,
    kv heads and (packed) sequences; the last ones, which nobody chose, are zero.

    Attributes:
        batch, kv_heads, group, queries: B, Hkv, G, S. page: tokens of a page.
        tile: queries of a tile. tiles: of a kv head. body: tiles of a body of the kernel's loop.
            spare: null tiles at the end, so that two cores get the same number of bodies.
        source: int64 [pages of a head * page], the token at each place of the pages; T for none.
        ids: int32 [tiles, tile, pages chosen], place: float32 [tiles, tile, 2]: see the kernels.
    """

    batch: int
    kv_heads: int
    group: int
    queries: int
    page: int
    tile: int
    tiles: int
    body: int
    spare: int
    source: Tensor
    ids: Tensor
    place: Tensor

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        block_indices: Tensor,
        select_block: int,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        sizes: Sizes,
    ) -> Grid:
        """The grid of a call."""
        (batch, queries, heads, _), kv_heads = q.shape, k.shape[2]
        group, page = heads // kv_heads, sizes.page
        sequences = _Sequences.of(queries, k.shape[1], page, cu_seqlens_q, cu_seqlens_k, q.device)
        tile = min(queries, sizes.queries)
        tiles = -(-queries // tile)
        total = batch * kv_heads * tiles
        body = min(sizes.body, -(-total // 2))
        bodies = -(-total // body)
        spare = (bodies + bodies % 2) * body - total
        parts = select_block // page
        ids = block_indices.long()
        if parts > 1:
            ids = ids[..., None] * parts + torch.arange(parts, device=q.device)
            ids = torch.where(block_indices[..., None] >= 0, ids, -1).flatten(-2)
        seen = (ids >= 0) & (ids * page <= sequences.position[:, None, None])
        head = torch.arange(batch * kv_heads, device=q.device).view(batch, 1, kv_heads, 1)
        first = head * sequences.pages + sequences.first_page[:, None, None]
        ids = torch.where(seen, ids + first, -1)
        own = (first + sequences.position[:, None, None] // page).expand(batch, -1, kv_heads, -1)
        within = (sequences.position % page + 1)[:, None, None].expand_as(own)
        place = torch.cat((own, within), -1).float()
        cut = functools.partial(_cut, tile=tile, spare=spare)
        return cls(
            batch, kv_heads, group, queries, page, tile, tiles, body, spare, sequences.source,
            cut(ids.int(), fill=-1), cut(place, fill=0),
        )  # fmt: skip

    @functools.cached_property
    def heads(self) -> Tensor:
        """bfloat16 [tile, tile * G]: `HIDDEN` where a row is one of a query's heads."""
        own = torch.eye(self.tile, device=self.ids.device).repeat_interleave(self.group, 1)
        return (own * HIDDEN).to(torch.bfloat16)

    @property
    def null_page(self) -> int:
        """The first page that nobody chose; there are as many as fill 128 keys."""
        return self.batch * self.kv_heads * (self.source.numel() // self.page)

    def union(self, kernels: Kernels, blocks: int) -> Union:
        """Which pages each tile needs, at most `blocks` (of whole 128 keys) at a time."""
        ids = self.ids.flatten(1)
        width = min(ids.shape[1], self.source.numel() // self.page)
        step = PARTITIONS // self.page
        slots = min(blocks, -(-width // step) * step)
        most = -(-width // slots)
        lists, trips = kernels.union_lists(
            ids, trips=most, slots=slots, null=self.null_page, per_tile=step
        )
        lists, trips = lists[0], trips[0].view(2, -1).amax(0).repeat(2)
        starts = torch.arange(len(ids), device=ids.device, dtype=torch.int32) * most
        return Union(lists.reshape(-1, slots), starts.view(-1, 1), trips.view(-1, 1).int())

    def longer(self, union: Union) -> tuple[Tensor, Tensor, Tensor]:
        """Tiles that need more than one trip: int32 [2, tiles of a half, 1], these first;
        the trips of a tile of each half together [tiles of a half, 1]; how many take part [1, 1].
        """
        trips = union.trips.view(2, -1)
        short, order = torch.sort((trips <= 1).int(), dim=1, stable=True)
        count = (short == 0).sum(1).amax().view(1, 1)
        amounts = trips.gather(1, order).amax(0)[:, None]
        first = torch.arange(2, device=order.device)[:, None] * order.shape[1]
        return (order + first).int()[..., None], amounts, count.int()

    def pages(self, k: Tensor, v: Tensor) -> Tensor:
        """k and v [B, T, Hkv, D] as pages [B * Hkv * pages + null ones, page, Dk + Dv]."""
        padded = F.pad(torch.cat((k, v), -1), (0, 0, 0, 0, 0, 1)).transpose(1, 2)
        found = padded.index_select(2, self.source).reshape(-1, self.page, padded.shape[3])
        return F.pad(found, (0, 0, 0, 0, 0, PARTITIONS // self.page))

    def tokens(self, x: Tensor, keys: int) -> Tensor:
        """Gradients of pages [B * Hkv * pages * page, D] as [B, T, Hkv, D]."""
        places = self.source.numel()
        at = torch.empty(keys + 1, dtype=torch.long, device=x.device)
        at[self.source] = torch.arange(places, device=x.device)
        heads = x.reshape(self.batch, self.kv_heads, places, x.shape[-1])
        return heads.index_select(2, at[:keys]).transpose(1, 2).contiguous()

    def by_tile(self, x: Tensor) -> Tensor:
        """q or the like [B, S, Hq, D] as [tiles, tile * G, D]."""
        grouped = x.unflatten(2, (self.kv_heads, -1)).flatten(3)
        rows: Tensor = _cut(grouped, self.tile, self.spare, 0).unflatten(2, (self.group, -1))
        return rows.flatten(1, 2)

    def columns(self, x: Tensor) -> Tensor:
        """The same as [tiles, D, tile * G]."""
        return self.by_tile(x).mT.contiguous()

    def query_columns(self, q: Tensor) -> Tensor:
        """q as columns, with `heads` behind them where the kernels have room for them.

        That is behind a last part of fewer than 128 rows, in a dtype that has `HIDDEN`.
        """
        columns, left = self.columns(q), q.shape[3] % PARTITIONS
        room = left > 0 and left % QUADRANT == 0 and self.tile <= QUADRANT
        if not room or q.dtype != torch.bfloat16:
            return columns
        return torch.cat((columns, self.heads.expand(len(columns), -1, -1)), 1)

    def bodies(self, x: Tensor) -> Tensor:
        """[tiles, ...] as [groups, body, ...]."""
        bodies: Tensor = x.unflatten(0, (-1, self.body))
        return bodies

    def rows(self, x: Tensor) -> Tensor:
        """[tiles, tile * G, D] as [B, S, Hq, D]."""
        shape = (self.batch, self.kv_heads, self.tiles * self.tile, self.group, x.shape[-1])
        whole = x[: len(x) - self.spare].reshape(shape)[:, :, : self.queries]
        return whole.transpose(1, 2).flatten(2, 3).contiguous()


def _cut(x: Tensor, tile: int, spare: int, fill: float) -> Tensor:
    """[B, S, Hkv, N] as [B * Hkv * tiles + spare, tile, N], filled up with `fill`."""
    rest = -x.shape[1] % tile
    whole = F.pad(x, (0, 0, 0, 0, 0, rest), value=fill).transpose(1, 2)
    tiles = whole.reshape(-1, tile, x.shape[-1])
    return F.pad(tiles, (0, 0, 0, 0, 0, spare), value=fill).contiguous()


@dataclass(frozen=True)
class _Sequences:
    """Where queries stand and where the tokens of pages are; `[S]` int64 tensors.

    Attributes:
        position: of each query in its sequence. first_page: of its sequence, within a kv head.
        pages: of a kv head. source: see `Grid`.
    """

    position: Tensor
    first_page: Tensor
    pages: int
    source: Tensor

    @classmethod
    def of(
        cls,
        queries: int,
        keys: int,
        page: int,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        device: torch.device,
    ) -> _Sequences:
        token = torch.arange(queries, device=device)
        if cu_seqlens_q is None or cu_seqlens_k is None:
            pages = -(-keys // page)
            source = torch.arange(pages * page, device=device).clamp_(max=keys)
            return cls(token + (keys - queries), torch.zeros_like(token), pages, source)
        q_edges, k_edges = cu_seqlens_q.long(), cu_seqlens_k.long()
        count = len(q_edges) - 1
        owner = torch.searchsorted(q_edges[1:].contiguous(), token, right=True)
        position = token - q_edges[1:][owner] + (k_edges[1:] - k_edges[:-1])[owner]
        # Room for a last page that is not full in each sequence.
        first = k_edges[:-1] // page + torch.arange(count, device=device)
        pages = keys // page + count
        number = torch.arange(pages, device=device)
        of_page = torch.searchsorted(first, number, right=True) - 1
        start = k_edges[:-1][of_page] + (number - first[of_page]) * page
        at = start[:, None] + torch.arange(page, device=device)
        source = torch.where(at < k_edges[1:][of_page][:, None], at, keys).flatten()
        return cls(position, first[owner], pages, source)
