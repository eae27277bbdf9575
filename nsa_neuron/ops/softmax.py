"""The reference's attention over contiguous keys: chunked, masked, float64-capable.

Logits and statistics are float32 (float64 for float64 input). Probabilities are rounded to the
value dtype before they meet the values, as every 16-bit implementation does, so on 16-bit input
this is the low-precision eager that tolerances refer to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24  # logits held at once; 64 MiB in float32


class Visibility(Protocol):
    """Which keys of its sequence a query at absolute position t sees."""

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Key range that queries first..last can touch."""
        ...

    def mask(self, t: Tensor, key: Tensor) -> Tensor:
        """Elementwise visibility of broadcast positions and keys."""
        ...


@dataclass(frozen=True)
class Causal:
    """Keys 0..t."""

    def span(self, first: int, last: int) -> tuple[int, int]:
        return 0, last + 1

    def mask(self, t: Tensor, key: Tensor) -> Tensor:
        return key <= t


@dataclass(frozen=True)
class Window:
    """Keys t-w+1..t: exactly w, with t's own."""

    w: int

    def span(self, first: int, last: int) -> tuple[int, int]:
        return max(0, first - self.w + 1), last + 1

    def mask(self, t: Tensor, key: Tensor) -> Tensor:
        return (key <= t) & (key > t - self.w)


@dataclass(frozen=True)
class Complete:
    """Compressed blocks that end at or before t: i*d + l - 1 <= t."""

    l: int
    d: int

    def span(self, first: int, last: int) -> tuple[int, int]:
        return 0, max(0, (last + 1 - self.l) // self.d + 1)

    def mask(self, t: Tensor, key: Tensor) -> Tensor:
        return key * self.d + self.l - 1 <= t


@dataclass(frozen=True)
class Tile:
    """A chunk of one sequence's queries with the keys they can see.

    Attributes:
        rows: slice of the query axis.
        keys: slice of the key axis.
        mask: `[C, K]` bool.
        position: `[C]` absolute positions of the queries.
    """

    rows: slice
    keys: slice
    mask: Tensor
    position: Tensor


def tiles(
    sequences: list[tuple[slice, slice, int]],
    visibility: Visibility,
    heads: int,
    device: torch.device,
) -> Iterator[Tile]:
    """Cuts sequences `(query rows, key rows, first query's position)` into tiles.

    Args:
        sequences: where each sequence's queries and keys lie.
        visibility: the mask.
        heads: batch x query heads, which share a tile's memory.
        device: where masks are made.
    """
    for queries, keys, offset in sequences:
        count, available = queries.stop - queries.start, keys.stop - keys.start
        step = max(16, CHUNK_ELEMENTS // max(1, heads * min(available, 4096 + available // 4)))
        for start in range(0, count, step):
            stop = min(start + step, count)
            first, last = offset + start, offset + stop - 1
            low, high = visibility.span(first, last)
            high = min(high, available)
            low = min(low, high)
            t = torch.arange(first, last + 1, device=device)
            mask = visibility.mask(t[:, None], torch.arange(low, high, device=device))
            yield Tile(
                slice(queries.start + start, queries.start + stop),
                slice(keys.start + low, keys.start + high),
                mask,
                t,
            )


def work_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def grouped(x: Tensor, rows: slice, kv_heads: int) -> Tensor:
    """Query-like `[B, S, Hq, D]` at rows -> `[B, Hkv, C*G, D]` in the work dtype."""
    part = x[:, rows].to(work_dtype(x))
    b, c, hq, dim = part.shape
    part = (
        part.view(b, c, kv_heads, hq // kv_heads, dim)
        if part.is_contiguous()
        else (part.reshape(b, c, kv_heads, hq // kv_heads, dim))
    )
    return part.permute(0, 2, 1, 3, 4).reshape(b, kv_heads, c * (hq // kv_heads), dim)


def ungrouped(x: Tensor, count: int) -> Tensor:
    """`[B, Hkv, C*G, D]` -> `[B, C, Hq, D]`."""
    b, hkv, rows, dim = x.shape
    group = rows // count
    return x.view(b, hkv, count, group, dim).permute(0, 2, 1, 3, 4).reshape(b, count, -1, dim)


def keyed(x: Tensor, keys: slice) -> Tensor:
    """Key-like `[B, T, Hkv, D]` at keys -> `[B, Hkv, K, D]` in the work dtype."""
    return x[:, keys].to(work_dtype(x)).permute(0, 2, 1, 3)


def masked_logits(q: Tensor, k: Tensor, tile: Tile, scale: float) -> Tensor:
    """Scaled logits `[B, Hkv, C*G, K]` of a tile, -inf where invisible."""
    hkv = k.shape[2]
    logits = grouped(q, tile.rows, hkv) @ keyed(k, tile.keys).transpose(-1, -2)
    group = q.shape[2] // hkv
    hidden = ~tile.mask.repeat_interleave(group, 0)
    return logits.mul_(scale).masked_fill_(hidden, -torch.inf)


def probabilities(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse), in place; 0 on rows whose lse is -inf."""
    safe = lse.masked_fill(lse == -torch.inf, 0.0)
    return logits.sub_(safe[..., None]).exp_()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: list[tuple[slice, slice, int]],
    visibility: Visibility,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Softmax attention.

    Args:
        q: `[B, S, Hq, Dk]`.
        k: `[B, T, Hkv, Dk]`.
        v: `[B, T, Hkv, Dv]`.
        sequences: see `tiles`.
        visibility: which keys a query sees.
        scale: of the logits.

    Returns:
        o `[B, S, Hq, Dv]` in q's dtype and lse `[B, S, Hq]` in the work dtype.
    """
    b, s, hq, _ = q.shape
    o = q.new_zeros(b, s, hq, v.shape[-1])
    lse = torch.full((b, s, hq), -torch.inf, dtype=work_dtype(q), device=q.device)
    for tile in tiles(sequences, visibility, b * hq, q.device):
        if tile.keys.start == tile.keys.stop:
            continue
        logits = masked_logits(q, k, tile, scale)
        row_lse = logits.logsumexp(-1)
        p = probabilities(logits, row_lse).to(v.dtype).to(work_dtype(q))
        count = len(tile.position)
        o[:, tile.rows] = ungrouped(p @ keyed(v, tile.keys), count).to(o.dtype)
        lse[:, tile.rows] = ungrouped(row_lse[..., None], count)[..., 0]
    return o, lse


def backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    sequences: list[tuple[slice, slice, int]],
    visibility: Visibility,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` by recomputation: dS = P * (dP - rowsum(dO * O) + dlse) * scale.

    Returns:
        dq, dk, dv in the shapes and dtypes of q, k, v.
    """
    work = work_dtype(q)
    hkv = k.shape[2]
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(x.shape, dtype=work, device=x.device) for x in (k, v))
    shift = row_shift(grad_o, o, lse, grad_lse)
    for tile in tiles(sequences, visibility, q.shape[0] * q.shape[2], q.device):
        if tile.keys.start == tile.keys.stop:
            continue
        count = len(tile.position)
        row_lse = grouped(lse[..., None], tile.rows, hkv)[..., 0].to(work)
        p = probabilities(masked_logits(q, k, tile, scale), row_lse)
        do = grouped(grad_o, tile.rows, hkv)
        dv[:, tile.keys] += (p.to(v.dtype).to(work).transpose(-1, -2) @ do).permute(0, 2, 1, 3)
        dp = do @ keyed(v, tile.keys).transpose(-1, -2)
        ds = p.mul_(dp.sub_(grouped(shift[..., None], tile.rows, hkv))).mul_(scale)
        ds = ds.to(q.dtype).to(work)
        dq[:, tile.rows] = ungrouped(ds @ keyed(k, tile.keys), count).to(dq.dtype)
        dk[:, tile.keys] += (ds.transpose(-1, -2) @ grouped(q, tile.rows, hkv)).permute(0, 2, 1, 3)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def row_shift(grad_o: Tensor, o: Tensor, lse: Tensor, grad_lse: Tensor | None) -> Tensor:
    """rowsum(dO * O) - dlse, `[B, S, Hq]`; dead rows take no gradient through lse."""
    work = work_dtype(grad_o)
    shift = (grad_o.to(work) * o.to(work)).sum(-1)
    if grad_lse is None:
        return shift
    return shift - grad_lse.to(work).masked_fill(lse == -torch.inf, 0.0)
