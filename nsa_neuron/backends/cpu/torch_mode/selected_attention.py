"""Selected attention: block by block over the queries that chose it, or gathered for a few queries.

Block by block, keys and values are read in place and the products have as many rows as a block has
readers; each reader's running maximum, sum and output are taken out, brought up to date and put
back. For a few queries (a decode step) the Python loop over blocks would cost more than copying
their keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nsa_neuron.backends.cpu.torch_mode import layout
from nsa_neuron.backends.cpu.torch_mode.interval import normalise
from nsa_neuron.ops import common
from nsa_neuron.ops.softmax import row_shift

READERS = 256
"""Readers of a block taken at once: with 16 heads of 128, 2 MiB of queries, so that what a product
reads and writes stays in two cores' caches; half as many cost more calls than that saves."""
FEW_ELEMENTS = 2**22
"""Keys and values of the chosen blocks up to which they are gathered: 16 MiB in float32."""


@dataclass(frozen=True)
class Reading:
    """Some queries of one lane that read one block.

    Attributes:
        lane: batch times kv head.
        rows: their rows of the query axis, ascending: `[R]`, or a slice of neighbours.
        keys: the block's slice of the key axis.
        hidden: `[h, 1, K]` of the first h of them, which stand inside the block, the keys that they
            must not see; None if there is none.
    """

    lane: int
    rows: Tensor | slice
    keys: slice
    hidden: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        """The readers' rows of `[lanes, S, ...]`: copied, or where they lie if neighbours."""
        lane: Tensor = x[self.lane]
        return lane[self.rows] if isinstance(self.rows, slice) else lane.index_select(0, self.rows)

    def keep(self, x: Tensor, rows: Tensor) -> None:
        """Puts back rows that `take` may have copied."""
        if not isinstance(self.rows, slice):
            x[self.lane].index_copy_(0, self.rows, rows)

    def logits(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """`[R, G, K]` logits, -inf where hidden."""
        rows = self.take(q)
        keys = k[self.lane, self.keys].T
        logits = q.new_empty(rows.shape[0] * rows.shape[1], keys.shape[1])
        torch.addmm(logits, rows.flatten(0, 1), keys, beta=0, alpha=scale, out=logits)
        logits = logits.view(*rows.shape[:2], -1)
        if self.hidden is not None:
            logits[: len(self.hidden)].masked_fill_(self.hidden, -torch.inf)
        return logits


def readings(
    block_indices: Tensor, m: int, kv_len: int, offsets: tuple[Tensor | None, Tensor | None]
) -> Iterator[Reading]:
    """Every (query, block) pair with a visible key once, by sequence, run of queries, lane, block.

    A run is short enough for its queries and results to stay in a cache from block to block, and
    long enough for a block to have `READERS` of them on average.
    """
    n = block_indices.shape[3]
    for seg in common.segments(block_indices.shape[1], kv_len, *offsets):
        count, blocks = seg.queries.stop - seg.queries.start, -(-seg.tokens // m)
        step = max(READERS, READERS * blocks // n)
        for first in range(0, count, step):
            run = range(first, min(first + step, count))
            yield from _readings(block_indices, m, seg, run)


def _readings(block_indices: Tensor, m: int, seg: common.Segment, run: range) -> Iterator[Reading]:
    """Those of one run of a sequence's queries."""
    b, _, hkv, n = block_indices.shape
    blocks = -(-seg.tokens // m)
    base = seg.queries.start + run.start
    t = torch.arange(seg.offset + run.start, seg.offset + run.stop)
    chosen = block_indices[:, base : base + len(run)].transpose(1, 2)
    ids = chosen.reshape(b * hkv, len(run), n).long()
    past = (ids < 0) | (ids * m > t[:, None])
    lane = torch.arange(b * hkv)[:, None, None] * (blocks + 1)
    key = (ids.masked_fill(past, blocks) + lane).flatten()
    inside = torch.where((ids + 1) * m - 1 > t[:, None], key.view_as(ids), len(lane) * (blocks + 1))
    order = key.argsort(stable=True)
    readers = order.div_(n, rounding_mode="floor").remainder_(len(run)).add_(base)
    ends = key.bincount(minlength=b * hkv * (blocks + 1)).cumsum(0)
    starts = [0, *ends.tolist()]
    standing = inside.flatten().bincount(minlength=len(ends) + 1).tolist()
    for at, (stop, first) in enumerate(zip(starts[1:], neighbours(readers, ends), strict=True)):
        which, block = divmod(at, blocks + 1)
        if block == blocks:
            continue
        keys = range(block * m, min((block + 1) * m, seg.tokens))
        for start, end in cuts(starts[at], min(first, stop), stop):
            hides = standing[at] - (start - starts[at])
            yield _reading(readers[start:end], end <= first, hides, which, keys, seg)


def neighbours(readers: Tensor, ends: Tensor) -> list[int]:
    """Of each block's readers, where the first are no longer each other's neighbours: a block is
    read by all queries that stand in it, and the first ones by everybody."""
    breaks = torch.cat([(readers.diff() != 1).nonzero().flatten() + 1, ends[-1:]])
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    places = torch.searchsorted(breaks, starts, right=True).clamp_(max=len(breaks) - 1)
    return breaks[places].tolist()


def cuts(start: int, middle: int, stop: int) -> Iterator[tuple[int, int]]:
    """Equal pieces of about `READERS` that end at `middle`, then those up to `stop`."""
    for low, high in ((start, middle), (middle, stop)):
        pieces = max(1, round((high - low) / READERS))
        edges = [low + (high - low) * i // pieces for i in range(pieces + 1)]
        yield from ((first, last) for first, last in pairwise(edges) if first < last)


def _reading(
    rows: Tensor, together: bool, hides: int, lane: int, keys: range, seg: common.Segment
) -> Reading:
    """The reading of `rows`, of which the first `hides` stand before the block's last key."""
    hidden = None
    if hides > 0:
        t = rows[:hides] - (seg.queries.start - seg.offset)
        hidden = (torch.arange(keys.start, keys.stop) > t[:, None])[:, None]
    place = slice(seg.keys.start + keys.start, seg.keys.start + keys.stop)
    if together:
        first = int(rows[0])
        return Reading(lane, slice(first, first + len(rows)), place, hidden)
    return Reading(lane, rows, place, hidden)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    select_block: int,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """See `nsa_neuron.selected_attention`."""
    offsets = (cu_seqlens_q, cu_seqlens_k)
    factor = common.default_scale(scale, q)
    chosen = block_indices.numel() * select_block * (k.shape[3] + v.shape[3])
    if chosen <= FEW_ELEMENTS:
        return _gathered(q, k, v, block_indices, offsets, select_block, factor)
    hkv = k.shape[2]
    queries, keys, values = layout.by_query(q, hkv), layout.by_key(k), layout.by_key(v)
    o = queries.new_zeros(*queries.shape[:3], v.shape[3])
    total = queries.new_zeros(queries.shape[:3])
    # The lowest number instead of -inf: differences stay defined where nothing is seen yet.
    top = queries.new_full(queries.shape[:3], torch.finfo(queries.dtype).min)
    for part in readings(block_indices, select_block, k.shape[1], offsets):
        p = part.logits(queries, keys, factor)
        old = part.take(top)
        new = torch.maximum(old, p.amax(-1))
        p.sub_(new[..., None]).exp_()
        fade = (old - new).exp_()
        part.keep(top, old.copy_(new))
        part.keep(total, part.take(total).mul_(fade).add_(p.sum(-1)))
        sums = part.take(o).mul_(fade[..., None])
        sums.flatten(0, 1).addmm_(p.flatten(0, 1), values[part.lane, part.keys])
        part.keep(o, sums)
    lse = top.add_(total.log())
    o.div_(total.masked_fill_(total == 0, 1.0)[..., None])
    return layout.query_like(o, q), layout.statistic_like(lse, q.shape[0])


def selected_attention_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    o: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    select_block: int,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `nsa_neuron.ops.selected_attention.selected_attention_backward`."""
    factor, hkv = common.default_scale(scale, q), k.shape[2]
    queries, keys, values = layout.by_query(q, hkv), layout.by_key(k), layout.by_key(v)
    do = layout.by_query(grad_o, hkv)
    shift = layout.statistic(row_shift(grad_o, o, lse, grad_lse), hkv)
    safe = layout.statistic(lse.masked_fill(lse == -torch.inf, 0.0), hkv)
    dq, dk, dv = (torch.zeros_like(x) for x in (queries, keys, values))
    for part in readings(block_indices, select_block, k.shape[1], (cu_seqlens_q, cu_seqlens_k)):
        run = (part.lane, part.keys)
        p = part.logits(queries, keys, factor).sub_(part.take(safe)[..., None]).exp_()
        g = part.take(do).flatten(0, 1)
        flat = p.flatten(0, 1)
        dv[run].addmm_(flat.T, g)
        ds = (g @ values[run].T).sub_(part.take(shift).flatten()[:, None])
        ds.mul_(flat)
        # A query reads a block once, so no row is added to twice and the order is fixed.
        sums = part.take(dq)
        sums.flatten(0, 1).addmm_(ds, keys[run], alpha=factor)
        part.keep(dq, sums)
        dk[run].addmm_(ds.T, part.take(queries).flatten(0, 1), alpha=factor)
    return layout.query_like(dq, q), layout.key_like(dk, k), layout.key_like(dv, v)


def _gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    offsets: tuple[Tensor | None, Tensor | None],
    m: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    b, s, hkv, _ = block_indices.shape
    position, start, stop = (torch.empty(s, dtype=torch.long) for _ in range(3))
    for seg in common.segments(s, k.shape[1], *offsets):
        t = torch.arange(seg.offset, seg.offset + seg.queries.stop - seg.queries.start)
        position[seg.queries], start[seg.queries], stop[seg.queries] = t, seg.keys.start, seg.tokens
    token = block_tokens(block_indices, m)
    hidden = (token < 0) | (token > position[:, None, None])
    row = torch.minimum(token, (stop - 1)[:, None, None]).clamp_(min=0) + start[:, None, None]
    at = (torch.arange(b)[:, None, None, None], row, torch.arange(hkv)[:, None])
    return attend_gathered(q, k[at], v[at], hidden, scale)


def block_tokens(block_indices: Tensor, m: int) -> Tensor:
    """Ids `[..., n]` -> tokens `[..., n*m]` of the blocks within their sequence, -1 for id -1."""
    ids = block_indices.long()[..., None]
    return (ids * m + torch.arange(m)).masked_fill_(ids < 0, -1).flatten(-2)


def attend_gathered(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of q `[B, S, Hq, D]` to own keys and values `[B, S, Hkv, K, D]` of each query.

    Args:
        hidden: `[B, S, Hkv, K]` keys that the query must not see.
    """
    work = torch.promote_types(q.dtype, torch.float32)
    rows = q.to(work).unflatten(2, (k.shape[2], -1)) * scale
    p = (rows @ k.to(work).transpose(-1, -2)).masked_fill_(hidden[..., None, :], -torch.inf)
    lse = normalise(p)
    return (p @ v.to(work)).flatten(2, 3).to(q.dtype), lse.flatten(2)
