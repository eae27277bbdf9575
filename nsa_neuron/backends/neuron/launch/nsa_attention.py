"""Launches `nki_kernels/nsa_attention`: the whole forward in one kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_neuron.backends.neuron.launch.ranges import positive_scale

if TYPE_CHECKING:
    from nsa_neuron.backends.neuron.plans import Plan
    from nsa_neuron.backends.neuron.run import Kernels

QUERIES = 32  # of a tile
KEYS = 128  # of a tile of keys
RUN = 512  # compressed keys that are visited together where a tile is done again
ROW = 8  # tokens of K and V side by side
BLOCK, STRIDE = 64, 16  # of selection and of compression, what the kernel is made for
LARGEST = 30.0
"""The largest exponent: row sums and products with values stay far below float32's largest."""


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
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
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
    """Arguments and result as of the op: [B, S, Hq, Dv] in q's dtype."""
    constants = dict(plan["forward"])
    slots = constants.pop("slots")
    for table in ("queues", "by_rows"):
        constants[table] = tuple(map(tuple, constants[table]))
    batch, queries, heads, _ = q.shape
    tokens, kv_heads = k_slc.shape[1], k_slc.shape[2]
    group, past = heads // kv_heads, tokens - queries
    q, scale = positive_scale(q, scale)
    before = past % QUERIES
    q_tiles = _tiles(q, before, kv_heads)
    tiles = q_tiles.shape[1]
    if k_cmp.shape[1] == 0:  # none is seen; the kernel wants some that it may load
        k_cmp, v_cmp = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k_cmp, v_cmp))
    keys = (k_cmp, k_slc, k_win)
    largest = torch.stack([x.float().norm(dim=-1).amax(1).flatten() for x in keys], -1)
    norm = q_tiles.float().norm(dim=-1).amax((2, 3))
    shifts = LARGEST - scale * norm[..., None] * largest[:, None]
    seen = (max(0, (tokens - block) // STRIDE + 1), block)
    rows = min(KEYS, QUERIES * group)
    by_row = _tiles(gates, before, kv_heads).float().reshape(*q_tiles.shape[:2], -1, rows, 3)
    (o,) = kernels.forward(
        q_tiles.flatten(2, 3).mT.contiguous(),
        _keys(k_cmp, RUN),
        _values(v_cmp, RUN),
        _pages(k_slc, v_slc),
        _rows(k_slc, v_slc),
        _keys(k_win, KEYS),
        _values(v_win, KEYS),
        by_row.transpose(2, 3).contiguous(),
        shifts,
        *_positions(past - before, tiles, seen, (num_local, window), q.device),
        _weights(block, q.device),
        torch.eye(rows // group, device=q.device).repeat_interleave(group, 0),
        torch.eye(QUERIES, device=q.device).repeat(KEYS // QUERIES, 1),
        _slot_keys(slots, q.device),
        _slot_lanes(q.device),
        batch=batch, group=group, block=block, count=num_selected, initial=num_initial,
        local=num_local, window=window, past=past, tokens=tokens, scale=scale,
        paired=tiles > 1, **constants,
    )  # fmt: skip
    return o[:, before : before + queries].contiguous()


def _tiles(x: Tensor, before: int, kv_heads: int) -> Tensor:
    """[B, S, Hq, D] -> [B * Hkv, tiles, 32, G, D]; edges are repeated where queries are missing."""
    after = -(before + x.shape[1]) % QUERIES
    parts = [x[:, :1].expand(-1, before, -1, -1), x, x[:, -1:].expand(-1, after, -1, -1)]
    grouped = torch.cat(parts, 1).unflatten(2, (kv_heads, -1)).movedim(2, 1).flatten(0, 1)
    tiles: Tensor = grouped.unflatten(1, (-1, QUERIES))
    return tiles


def _keys(k: Tensor, run: int) -> Tensor:
    """[B, T, Hkv, D] -> [B * Hkv, D, T up to a multiple of `run`]."""
    return F.pad(k.permute(0, 2, 3, 1).flatten(0, 1), (0, -k.shape[1] % run)).contiguous()


def _values(v: Tensor, run: int) -> Tensor:
    """[B, T, Hkv, D] -> [B * Hkv, T up to a multiple of `run`, D + 1], the last column 1."""
    rows = F.pad(v.transpose(1, 2).flatten(0, 1), (0, 0, 0, -v.shape[1] % run))
    return F.pad(rows, (0, 1), value=1.0).contiguous()


def _pages(k: Tensor, v: Tensor) -> Tensor:
    """K and V [B, T, Hkv, D] as pages [B * Hkv, 2, blocks, 128, columns]; see the kernel."""
    missing = -k.shape[1] % BLOCK
    k_t = F.pad(k.permute(0, 2, 3, 1).flatten(0, 1), (0, missing)).unflatten(2, (-1, BLOCK))
    k_t = k_t.transpose(1, 2)
    rows = F.pad(v.transpose(1, 2).flatten(0, 1), (0, 0, 0, missing)).unflatten(1, (-1, BLOCK))
    lanes, blocks, dk, _ = k_t.shape
    dv = v.shape[3]
    pages = k.new_zeros(lanes, 2, blocks, KEYS, BLOCK + max(BLOCK if dk > KEYS else 0, dv + 1))
    low = min(dk, KEYS)
    for half in range(2):
        table = pages[:, half]
        table[:, :, :low, :BLOCK] = k_t[:, :, :low]
        own = table[:, :, BLOCK * half : BLOCK * (half + 1), BLOCK:]
        own[..., :dv] = rows
        own[..., dv] = 1.0
        if dk > low:
            other = BLOCK * (1 - half)
            table[:, :, other : other + dk - low, BLOCK : 2 * BLOCK] = k_t[:, :, low:]
    return pages


def _rows(k: Tensor, v: Tensor) -> Tensor:
    """K and V [B, T, Hkv, D] by rows of 8 tokens [B * Hkv, rows, 8, columns]; see the kernel."""
    missing = -k.shape[1] % BLOCK
    both = [F.pad(x.transpose(1, 2).flatten(0, 1), (0, 0, 0, missing)) for x in (k, v)]
    dk = k.shape[3]
    keys = F.pad(both[0], (0, KEYS + BLOCK - dk if dk > KEYS else 0))
    rows = torch.cat((keys, F.pad(both[1], (0, 1), value=1.0)), -1)
    return rows.reshape(rows.shape[0], -1, ROW, rows.shape[2])


def _positions(
    first: int, tiles: int, seen: tuple[int, int], near: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """`marks` and `trips` of the kernel's `again.Tables`.

    Args:
        first: position of the first tile's first query. seen: compressed keys, and l. near:
            num_local, w.
    """
    (keys, block), (local, window) = seen, near
    t = first + torch.arange(QUERIES * tiles, device=device)
    start = (t - t % QUERIES - window + 1).clamp(min=0) // KEYS
    visible = ((t + 1 - block).div(STRIDE, rounding_mode="floor") + 1).clamp(0, keys)
    own = t // BLOCK
    marks = (
        visible, own, own - local, t - own * BLOCK + 1, (t - window + 1).clamp(min=0), t + 1,
        start * KEYS, torch.zeros_like(t),
    )  # fmt: skip
    last = slice(QUERIES - 1, None, QUERIES)
    runs = (visible[last] + RUN - 1) // RUN
    trips = torch.stack((runs, start[last], t[last] // KEYS + 1, own[last]), 1).int()
    return torch.stack(marks, 1).float(), trips


def _weights(block: int, device: torch.device) -> Tensor:
    """bfloat16 [128, 34]: shares of a tile's keys in its 32 blocks, in the next block, and 1."""
    key = torch.arange(KEYS, device=device)[:, None] * STRIDE
    edge = torch.arange(KEYS * STRIDE // BLOCK + 1, device=device) * BLOCK
    shared = torch.minimum(key + block, edge + BLOCK) - torch.maximum(key, edge)
    shares = shared.clamp(min=0).float() / STRIDE
    return F.pad(shares, (0, 1), value=1.0).to(torch.bfloat16)


def _slot_keys(slots: int, device: torch.device) -> Tensor:
    """bfloat16 [slots, slots / 2, 128]: 1 at a slot's keys in its pair."""
    same = torch.eye(slots, device=device).view(slots, slots // 2, 2)
    return same.repeat_interleave(BLOCK, 2).to(torch.bfloat16)


def _slot_lanes(device: torch.device) -> Tensor:
    """float32 [128, 8, 128]: 1 where place = 16 * turn + lane // 8."""
    same = torch.eye(KEYS, device=device).view(KEYS, ROW, KEYS // ROW)
    return same.repeat_interleave(ROW, 2)
