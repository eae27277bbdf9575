"""Selection of blocks, alone or on the probabilities that compressed attention makes anyway."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nsa_neuron.backends.cpu.torch_mode import interval, layout
from nsa_neuron.ops import common
from nsa_neuron.ops.select_blocks import overlap_sum
from nsa_neuron.ops.softmax import Complete

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """The scalars of a selection, named as in the public functions."""

    block: int
    stride: int
    select_block: int
    num_selected: int
    num_initial: int
    num_local: int

    @classmethod
    def of(cls, values: dict[str, Any]) -> Geometry:
        """Takes its own out of a call's arguments."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


class Chooser:
    """Makes ids from the probabilities of tiles, in the order in which these come.

    Attributes:
        ids: `[B * Hkv, S, n]` int32.
    """

    def __init__(self, lanes: int, s: int, geometry: Geometry) -> None:
        self.ids = torch.full((lanes, s, geometry.num_selected), -1, dtype=torch.int32)
        self._geometry = geometry

    def __call__(self, tile: interval.Tile, p: Tensor) -> None:
        """Chooses for a tile with probabilities `[lanes, C, G, K]`."""
        geometry = self._geometry
        m, last = geometry.select_block, tile.first + p.shape[1] - 1
        reach = last // m + 1  # later blocks are in the future of every query of the tile
        scores = overlap_sum(p.sum(2), reach, geometry.block, geometry.stride, m)
        j = torch.arange(reach)
        own = torch.arange(tile.first, last + 1)[:, None] // m
        forced = (j < geometry.num_initial) | (j > own - geometry.num_local)
        scores.masked_fill_(forced, torch.inf).masked_fill_(j > own, -torch.inf)
        self.ids[tile.lanes, tile.rows] = best_ids(scores, geometry.num_selected)


def best_ids(scores: Tensor, count: int) -> Tensor:
    """Ids of the best scores `[..., Ns]` as `[..., count]` int32, ascending, padded with -1.

    Equal scores: the lowest id first; -inf is never chosen. The least chosen score comes from
    `topk`, whose order among equals is not defined, and is then looked up, which is several times
    faster than a stable sort of all scores.
    """
    width = min(count, scores.shape[-1])
    least = scores.topk(width, -1, sorted=False).values.amin(-1, keepdim=True)
    better, equal = scores > least, scores == least
    room = width - better.sum(-1, keepdim=True)
    equal &= equal.cumsum(-1, dtype=torch.int32) <= room
    chosen = (better | equal) & (scores > -torch.inf)
    place = chosen.cumsum(-1, dtype=torch.int32)[chosen] - 1
    ids = torch.full((*scores.shape[:-1], count), -1, dtype=torch.int32)
    *row, j = chosen.nonzero(as_tuple=True)
    ids[(*row, place)] = j.int()
    return ids


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    kv_len: int,
    scale: float | None = None,
    **scalars: int,
) -> Tensor:
    """See `nsa_neuron.select_blocks`."""
    geometry, hkv = Geometry(**scalars), k_cmp.shape[2]
    segs = list(common.segments(q.shape[1], kv_len, cu_seqlens_q, cu_seqlens_k))
    sequences, seen = compressed_sequences(segs, geometry.block, geometry.stride)
    queries, keys = layout.by_query(q, hkv), layout.by_key(k_cmp)
    factor = common.default_scale(scale, q)
    safe = layout.statistic(lse.masked_fill(lse == -torch.inf, 0.0), hkv)[..., None]
    chooser = Chooser(len(queries), q.shape[1], geometry)
    for tile in interval.tiles(len(queries), q.shape[2] // hkv, sequences, seen):
        p = interval.logits_of(queries, keys, tile, seen, factor)
        chooser(tile, p.sub_(safe[tile.lanes, tile.rows]).exp_())
    return ids_like(chooser.ids, q.shape[0])


def compressed_and_selected(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    geometry: Geometry,
    segs: list[common.Segment],
    scale: float,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compressed attention and the selection that follows from it, with one q @ k_cmp.

    Args:
        lse: see `interval.output`.

    Returns:
        o, block_indices, as the two ops give them.
    """
    sequences, seen = compressed_sequences(segs, geometry.block, geometry.stride)
    chooser = Chooser(q.shape[0] * k_cmp.shape[2], q.shape[1], geometry)
    o = interval.output(q, k_cmp, v_cmp, sequences, seen, scale, chooser, lse)
    return o, ids_like(chooser.ids, q.shape[0])


def compressed_sequences(
    segs: list[common.Segment], block: int, stride: int
) -> tuple[interval.Sequences, Complete]:
    """Where each sequence's compressed blocks lie, and which of them its queries see."""
    keys = common.compressed_slices(segs, block, stride)
    sequences = [(seg.queries, run, seg.offset) for seg, run in zip(segs, keys, strict=True)]
    return sequences, Complete(block, stride)


def ids_like(ids: Tensor, batch: int) -> Tensor:
    """`[B * Hkv, S, n]` -> `[B, S, Hkv, n]`, contiguous."""
    lanes: Tensor = ids.unflatten(0, (batch, -1))
    return layout.dense(lanes.transpose(1, 2))
