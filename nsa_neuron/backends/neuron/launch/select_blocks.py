"""Launches `nki_kernels/select_blocks`: importance and the best n in one kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_neuron.backends.neuron.launch import finite
from nsa_neuron.backends.neuron.launch.packed import Aligned, block_counts, take
from nsa_neuron.backends.neuron.launch.ranges import positive_scale

if TYPE_CHECKING:
    from nsa_neuron.backends.neuron.plans import Plan
    from nsa_neuron.backends.neuron.run import Kernels

PARTITIONS = 128
BANK = 512  # float32 columns of a PSUM bank
SMALLEST_SCALE = 1e-30
"""Below, logits of any 16-bit or sane float32 inputs are 0, while lse / scale would overflow."""


@dataclass(frozen=True)
class Tiles:
    """How the keys of a piece, `blocks` selection blocks of `ratio` keys, are cut into tiles.

    Attributes:
        blocks: selection blocks of a piece.
        tiles: (first key in the piece, keys, first block, blocks, which weights).
        weights: float32 [which, 128, blocks of a tile], share of each key in each block.
    """

    blocks: int
    tiles: tuple[tuple[int, int, int, int, int], ...]
    weights: Tensor

    @staticmethod
    def of(block: int, stride: int, select_block: int, wanted: int, unit: float) -> Tiles:
        """Tiles of at most 128 keys; `wanted` of them, if the piece's scores fit into a bank.

        Args:
            unit: the weight of `stride` shared tokens.
        """
        ratio = select_block // stride
        if ratio <= PARTITIONS:
            per = PARTITIONS // ratio
            many = max(1, min(wanted, (BANK - 1) // per))
            cuts = [(0, per * ratio)]
            found = [(i * per * ratio, per * ratio, i * per, per + 1, 0) for i in range(many)]
            blocks = many * per
        else:
            size = -(-ratio // -(-ratio // PARTITIONS))
            cuts = [(at, min(size, ratio - at)) for at in range(0, ratio, size)]
            found = [(at, keys, 0, 2, which) for which, (at, keys) in enumerate(cuts)]
            blocks, per = 1, 1
        key = torch.arange(PARTITIONS)[:, None] * stride
        first = torch.tensor([at for at, _ in cuts])[:, None, None] * stride + key
        edge = torch.arange(per + 1) * select_block
        shared = torch.minimum(first + block, edge + select_block) - torch.maximum(first, edge)
        weights = shared.clamp(min=0).float() * (unit / stride)
        return Tiles(blocks, tuple(found), weights)


@dataclass(frozen=True)
class Places:
    """Where the keys and blocks of a call lie, and what each query may see of them.

    Attributes:
        keys: [padded Nc] row of k_cmp of each key, None: they lie as they are.
        rows: float32 [2, S], last and first key that a query sees.
        columns: float32 [S, 4]: own block, first block of its sequence, the block before the
            local ones, the block behind the initial ones.
        blocks: selection blocks in all, a static bound.
    """

    keys: Tensor | None
    rows: Tensor
    columns: Tensor
    blocks: int

    @staticmethod
    def of(
        queries: int,
        kv_len: int,
        block: int,
        stride: int,
        select_block: int,
        num_initial: int,
        num_local: int,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        device: torch.device,
    ) -> Places:
        row = torch.arange(queries, device=device)
        ratio = select_block // stride
        keys = None
        if cu_q is None or cu_k is None:
            position = row + (kv_len - queries)
            base = torch.zeros_like(row)
            blocks = -(-kv_len // select_block)
        else:
            lengths = cu_k.diff()
            layout = Aligned.of(lengths, select_block, kv_len)
            counts = block_counts(lengths, block, stride)
            out = F.pad(counts.cumsum(0), (1, 0))
            begins = layout.aligned // select_block
            sequence = torch.searchsorted(cu_q[1:].contiguous(), row, right=True)
            position = row - cu_q[sequence] + (lengths - cu_q.diff())[sequence]
            base, blocks = begins[sequence], layout.size // select_block
            key_sequence, place = layout.padded_sequence()
            key_sequence, place = key_sequence[::stride], place[::stride] // stride
            inside = place.minimum((counts[key_sequence] - 1).clamp(min=0))
            keys = out[key_sequence] + inside
        seen = torch.div(position + 1 - block, stride, rounding_mode="floor")
        first = base * ratio
        last = torch.where(seen < 0, -1, first + seen)
        own = base + position // select_block
        columns = (own, base, own - num_local, base + num_initial)
        return Places(
            keys, torch.stack((last, first)).float(), torch.stack(columns, 1).float(), blocks
        )


def forward(
    kernels: Kernels,
    plan: Plan,
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    kv_len: int,
    block: int,
    stride: int,
    select_block: int,
    num_selected: int,
    num_initial: int,
    num_local: int,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """Ids of the selected blocks, [B, S, Hkv, n] int32; arguments as of the op."""
    if cu_seqlens_q is not None:
        # What NaN chooses is of no use; it must not choose for others, too.
        dead = lse == -torch.inf
        rows = finite.spoiled(q, lse.masked_fill(dead, 0.0)[..., None])
        q, lse = finite.cleaned(q, rows), finite.cleaned(lse, rows)
        k_cmp = finite.cleaned(k_cmp, finite.spoiled(k_cmp))
    constants = plan["forward"]
    queries, heads, dim = q.shape[1], k_cmp.shape[2], q.shape[3]
    group = q.shape[2] // heads
    places = Places.of(
        queries, kv_len, block, stride, select_block, num_initial, num_local, cu_seqlens_q,
        cu_seqlens_k, q.device,
    )  # fmt: skip
    ratio = select_block // stride
    # Scores stay below 1, the mark of forced blocks; a power of two scales exactly.
    unit = 0.5 ** (2 * group * (block // stride)).bit_length()
    length = min(queries, _queries_of_tile(group, dim, q.dtype, constants["query_bytes"]))
    geometry = (block, stride, select_block)
    reach = _reach(queries, kv_len, geometry, num_local, length, places.blocks, cu_seqlens_q)
    key_tiles = q.shape[0] * heads * sum(item[0] for item in reach) * ratio // PARTITIONS
    looping = key_tiles > constants["unrolled_key_tiles"]
    wanted = constants["largest_piece"]
    every = -(-places.blocks * ratio // PARTITIONS)
    if looping:  # a larger piece has fewer turns, but more of the last one is of no use
        wanted = min(wanted, max(constants["looped_piece"], every // 16))
    wanted = min(wanted, every)
    tiles = Tiles.of(block, stride, select_block, wanted, unit)
    q, scale = positive_scale(q, scale if abs(scale) >= SMALLEST_SCALE else 0.0)
    shift = _shift(lse, scale, q.dtype)
    size = -(-places.blocks // tiles.blocks) * tiles.blocks * ratio
    (ids,) = kernels.forward(
        q.contiguous(),
        _keys(k_cmp, places, size, shift),
        shift,
        places.rows,
        places.columns,
        tiles.weights.to(q.device),
        _trips(places, length, tiles.blocks, ratio, packed=cu_seqlens_q is not None),
        scale=scale,
        tiles=tiles.tiles,
        piece=tiles.blocks,
        span=ratio,
        reach=() if looping else reach,
        length=length,
        count=min(num_selected, places.blocks),
        width=num_selected,
        limit=places.blocks + tiles.blocks,
        initial=num_initial,
        packed=cu_seqlens_q is not None,
    )
    return ids


def _queries_of_tile(group: int, dim: int, dtype: torch.dtype, room: int) -> int:
    """Queries of a tile: 128, or fewer where their transposes would need more than `room`."""
    at_once = next((n for n in (128, 64) if n * group <= BANK), 32)
    per_query = dtype.itemsize * -(-dim // PARTITIONS) * group
    return max(at_once, min(PARTITIONS, room // per_query // 32 * 32))


def _reach(
    queries: int,
    kv_len: int,
    geometry: tuple[int, int, int],
    num_local: int,
    length: int,
    blocks: int,
    cu_q: Tensor | None,
) -> tuple[tuple[int, int, int], ...]:
    """What each tile of queries meets; bounds, as the positions of packed queries are data.

    Returns:
        Per tile: blocks that some query sees, keys that every query sees, blocks before the local
        ones of every query.
    """
    block, stride, select_block = geometry
    firsts = [min(at, queries - length) for at in range(0, queries, length)]
    past = kv_len - queries
    if cu_q is not None:
        padding = (cu_q.shape[0] - 1) * (select_block - 1)
        ends = [first + length - 1 + padding for first in firsts]
        seen = [blocks if past else min(blocks, end // select_block + 1) for end in ends]
        return tuple((count, 0, 0) for count in seen)
    found = []
    for first in firsts:
        start, last = first + past, first + past + length - 1
        whole = max(0, (start + 1 - block) // stride + 1)
        found.append((last // select_block + 1, whole, start // select_block - num_local + 1))
    return tuple(found)


def _trips(places: Places, length: int, piece: int, ratio: int, *, packed: bool) -> Tensor:
    """int32 [2, tiles, 2]: pieces whose keys every query of a tile sees, and pieces in all.

    In the second half, of each tile and its pair together (0 and 1, 2 and 3, ...).
    """
    queries = places.columns.shape[0]
    device = places.columns.device
    starts = torch.arange(0, queries, length, device=device).clamp(max=queries - length)
    rows = starts[:, None] + torch.arange(length, device=device)
    every = places.columns[:, 0][rows].amax(1).long() // piece + 1
    whole = (places.rows[0][rows].amin(1).long() + 1) // (piece * ratio)
    if packed:
        whole = torch.zeros_like(whole)
    tile = torch.arange(len(starts), device=device)
    other = (tile ^ 1).clamp(max=len(starts) - 1)
    alone = torch.stack((whole, every), 1)
    pair = torch.stack((whole.minimum(whole[other]), every.maximum(every[other])), 1)
    return torch.stack((alone, pair)).int()


def _keys(k_cmp: Tensor, places: Places, size: int, shift: Tensor) -> Tensor:
    """k_cmp as [B, H, D, size]: transposed, each sequence's at whole selection blocks.

    Where they may share a tile of 128 channels with the shifts, further channels are 1, so that
    the shifts need no pass of their own.
    """
    if places.keys is not None and k_cmp.shape[1]:
        k_cmp = take(k_cmp, places.keys.clamp(max=k_cmp.shape[1] - 1))
    turned = k_cmp.permute(0, 2, 3, 1)
    turned = F.pad(turned, (0, size - turned.shape[-1]))
    pieces = shift.shape[0]
    if shift.dtype == k_cmp.dtype and k_cmp.shape[3] % PARTITIONS + pieces <= PARTITIONS:
        turned = F.pad(turned, (0, 0, 0, pieces), value=1.0)
    return turned.contiguous()


def _shift(lse: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """-lse / scale [pieces, B, S, Hq]: what is added to logits before they are scaled.

    float32 is one piece; for 16-bit operands three bfloat16 pieces hold its 24 bits. Rows that see
    nothing get 0: all their keys are masked.
    """
    left = (-lse / scale).masked_fill(lse == -torch.inf, 0.0)
    if dtype == torch.float32:
        return left[None].contiguous()
    pieces = []
    for _ in range(3):
        pieces.append(left.to(torch.bfloat16))
        left = left - pieces[-1].float()
    return torch.stack(pieces)
