"""Softmax attention in which every query sees one run of keys: causal, window, compressed.

Queries are cut in tiles whose logits stay in a core's cache; only the columns at the two ends of a
tile's run need a mask. Everything is done in place, in float32 (float64 for float64 input).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from nsa_neuron.backends.cpu.torch_mode import layout
from nsa_neuron.ops.softmax import row_shift, work_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from nsa_neuron.ops.softmax import Visibility

TILE_ELEMENTS = 2**20
"""Logits of a tile: 4 MiB in float32, so that two passes over them stay out of memory."""
TILE_ROWS = 1024
"""Rows of a tile at most (queries times heads): above, the masked corners only grow."""

Sequences = list[tuple[slice, slice, int]]
"""Of each sequence: its query rows, its key rows, the position of its first query."""


@dataclass(frozen=True)
class Tile:
    """Some queries of some lanes (batch times kv head) with the keys that they can see.

    Attributes:
        lanes, rows, keys: slices of the lane, query and key axis.
        first: absolute position of the first query.
        low: the first key, counted within its sequence.
        inner: keys `[low, high)` within the sequence that every query of the tile sees.
    """

    lanes: slice
    rows: slice
    keys: slice
    first: int
    low: int
    inner: tuple[int, int]

    def hide(self, logits: Tensor, seen: Visibility) -> None:
        """Sets invisible logits `[lanes, C, G, K]` to -inf, in place."""
        count, width = logits.shape[1], logits.shape[3]
        t = torch.arange(self.first, self.first + count)[:, None]
        low, high = (min(max(edge - self.low, 0), width) for edge in self.inner)
        if low >= high:
            low, high = width, width
        for start, stop in ((0, low), (high, width)):
            if start < stop:
                key = torch.arange(self.low + start, self.low + stop)
                hidden = ~seen.mask(t, key)
                logits[..., start:stop].masked_fill_(hidden[:, None], -torch.inf)


def first_key(sequences: Sequences, seen: Visibility) -> int:
    """The first key that any query sees: a window's few queries need not convert all others."""
    starts: list[int] = [run.start + seen.span(t, t)[0] for _, run, t in sequences]
    return min(starts)


def tiles(
    lanes: int, group: int, sequences: Sequences, seen: Visibility, base: int = 0
) -> Iterator[Tile]:
    """Cuts sequences into tiles of at most `TILE_ELEMENTS` logits where one query allows it.

    Args:
        base: where the key axis starts that `Tile.keys` counts in, see `first_key`.
    """
    for queries, keys, offset in sequences:
        count, available = queries.stop - queries.start, keys.stop - keys.start
        start = 0
        while start < count:
            stop = min(start + max(1, TILE_ROWS // group), count)
            low, high = _span(seen, offset + start, offset + stop - 1, available)
            fits = max(1, TILE_ELEMENTS // (group * max(1, high - low)))
            if stop - start > fits:
                stop = start + fits
                low, high = _span(seen, offset + start, offset + stop - 1, available)
            first, last = offset + start, offset + stop - 1
            # Keys from the last query's first to the first query's last are seen by all.
            inner = _span(seen, last, last, available)[0], _span(seen, first, first, available)[1]
            rows = slice(queries.start + start, queries.start + stop)
            step = max(1, TILE_ELEMENTS // (group * (stop - start) * max(1, high - low)))
            for lane in range(0, lanes, step):
                these = slice(lane, min(lane + step, lanes))
                run = slice(keys.start + low - base, keys.start + high - base)
                yield Tile(these, rows, run, first, low, inner)
            start = stop


def _span(seen: Visibility, first: int, last: int, available: int) -> tuple[int, int]:
    low, high = seen.span(first, last)
    high = min(high, available)
    return min(low, high), high


def logits_of(q: Tensor, k: Tensor, tile: Tile, seen: Visibility, scale: float) -> Tensor:
    """`[lanes, C, G, K]` logits of a tile, -inf where invisible."""
    rows = q[tile.lanes, tile.rows]
    logits = product(rows.flatten(1, 2), k[tile.lanes, tile.keys].transpose(1, 2), scale)
    logits = logits.view(*rows.shape[:3], -1)
    tile.hide(logits, seen)
    return logits


def product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`scale * a @ b` of `[L, M, K]` and `[L, K, N]`: the product scales at no cost."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def normalise(logits: Tensor) -> Tensor:
    """Softmax over the last axis in place, 0 on dead rows; returns lse, -inf on those."""
    top = logits.amax(-1)
    torch.softmax(logits, -1, out=logits)  # one pass where max, exp, sum and quotient make five
    lse = top - logits.amax(-1).log_()  # the largest probability is exp(0) over the sum
    dead = top == -torch.inf
    if dead.any():
        logits.masked_fill_(dead[..., None], 0.0)
        lse.masked_fill_(dead, -torch.inf)
    return lse


def soften(logits: Tensor, seen_by_all: int) -> None:
    """`normalise` without lse, which takes two passes less where no row is dead.

    Args:
        seen_by_all: a column that no row has masked: only a row with -inf there can be dead.
    """
    if (logits[..., seen_by_all] == -torch.inf).any():
        normalise(logits)
    else:
        torch.softmax(logits, -1, out=logits)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    seen: Visibility,
    scale: float,
    watch: Callable[[Tile, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention.

    Args:
        q: `[B, S, Hq, Dk]`.
        k: `[B, T, Hkv, Dk]`.
        v: `[B, T, Hkv, Dv]`.
        sequences: see `Sequences`.
        seen: the run of keys of each query.
        scale: of the logits.
        watch: called with every tile and its probabilities `[lanes, C, G, K]`.

    Returns:
        o `[B, S, Hq, Dv]` in q's dtype and lse `[B, S, Hq]` in the work dtype.
    """
    lse = dead_statistic(q, k.shape[2])
    o = output(q, k, v, sequences, seen, scale, watch, lse)
    return o, layout.statistic_like(lse, q.shape[0])


def dead_statistic(q: Tensor, kv_heads: int) -> Tensor:
    """lse `[B * Hkv, S, G]` of rows that see nothing, in the work dtype."""
    shape = q.shape[0] * kv_heads, q.shape[1], q.shape[2] // kv_heads
    return q.new_full(shape, -torch.inf, dtype=work_dtype(q))


def output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    seen: Visibility,
    scale: float,
    watch: Callable[[Tile, Tensor], None] | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """`forward` for o alone.

    Args:
        lse: `dead_statistic`, filled in if given; without it there is less to do.
    """
    hkv, group = k.shape[2], q.shape[2] // k.shape[2]
    base = first_key(sequences, seen)
    queries = layout.by_query(q, hkv)
    keys, values = layout.by_key(k[:, base:]), layout.by_key(v[:, base:])
    o = queries.new_empty(*queries.shape[:3], v.shape[3])
    for tile in tiles(len(queries), group, sequences, seen, base):
        p = logits_of(queries, keys, tile, seen, scale)
        results = o[tile.lanes, tile.rows]
        if tile.keys.start == tile.keys.stop:
            results.zero_()
        else:
            if lse is None:
                soften(p, min(max(tile.inner[0] - tile.low, 0), p.shape[-1] - 1))
            else:
                lse[tile.lanes, tile.rows] = normalise(p)
            torch.bmm(p.flatten(1, 2), values[tile.lanes, tile.keys], out=results.flatten(1, 2))
        if watch is not None:
            watch(tile, p)
    return layout.query_like(o, q)


def backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    sequences: Sequences,
    seen: Visibility,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` by recomputation: dS = P * (dP - rowsum(dO * O) + dlse)."""
    hkv, group = k.shape[2], q.shape[2] // k.shape[2]
    base = first_key(sequences, seen)
    queries = layout.by_query(q, hkv)
    keys, values = layout.by_key(k[:, base:]), layout.by_key(v[:, base:])
    do = layout.by_query(grad_o, hkv)
    shift = layout.statistic(row_shift(grad_o, o, lse, grad_lse), hkv)[..., None]
    safe = layout.statistic(lse.masked_fill(lse == -torch.inf, 0.0), hkv)[..., None]
    dq, dk, dv = (torch.zeros_like(x) for x in (queries, keys, values))
    for tile in tiles(len(queries), group, sequences, seen, base):
        if tile.keys.start == tile.keys.stop:
            continue
        rows, run = (tile.lanes, tile.rows), (tile.lanes, tile.keys)
        p = logits_of(queries, keys, tile, seen, scale).sub_(safe[rows]).exp_()
        flat, g = p.flatten(1, 2), do[rows].flatten(1, 2)
        dv[run].baddbmm_(flat.transpose(1, 2), g)
        ds = (g @ values[run].transpose(1, 2)).view(p.shape).sub_(shift[rows]).mul_(p).flatten(1, 2)
        dq[rows] = product(ds, keys[run], scale).view(*p.shape[:3], -1)
        dk[run].baddbmm_(ds.transpose(1, 2), queries[rows].flatten(1, 2), alpha=scale)
    dk, dv = (F.pad(layout.key_like(x, q), (0, 0, 0, 0, base, 0)) for x in (dk, dv))
    return layout.query_like(dq, q), dk, dv
