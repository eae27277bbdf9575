"""Launches `nki_kernels/nsa_attention`: the whole forward in one kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
TOKENS = 128  # of a turn of the looped kernel
OF_CHUNK = 1024  # compressed keys of a turn of its inner loop
SPARE = 8  # tiles behind its last one, which it loads
MOST_TOKENS = 262_144  # whose keys and scores fit into SBUF, unrolled

OF_LANE, OF_TILE, OF_KEYS = 3_500, 390, 19
"""Instructions of a kv head, of a tile of 32 queries, and of one against 128 keys."""
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
    sizes, forced = (batch * kv_heads, queries, tokens), (num_initial, num_local)
    loop = loop_of(plan, sizes, block, num_selected, forced, window)
    end = loop.end if loop else tokens
    q, scale = positive_scale(q, scale)
    before = past % (TOKENS if loop and past >= TOKENS * loop.begin else QUERIES)
    after = end - tokens
    q_tiles = _tiles(q, before, after, kv_heads)
    tiles = q_tiles.shape[1]
    if k_cmp.shape[1] == 0:  # none is seen; the kernel wants some that it may load
        k_cmp, v_cmp = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k_cmp, v_cmp))
    keys = (k_cmp, k_slc, k_win)
    largest = torch.stack([x.float().norm(dim=-1).amax(1).flatten() for x in keys], -1)
    norm = q_tiles.float().norm(dim=-1).amax((2, 3))
    shifts = LARGEST - scale * norm[..., None] * largest[:, None]
    seen = (max(0, (tokens - block) // STRIDE + 1), block)
    rows = min(KEYS, QUERIES * group)
    by_row = _tiles(gates, before, after, kv_heads).float()
    by_row = by_row.reshape(*q_tiles.shape[:2], -1, rows, 3)
    k_slc, v_slc, k_win, v_win = (_longer(x, after) for x in (k_slc, v_slc, k_win, v_win))
    looped: dict[str, Any] = {}
    arguments = [q_tiles.flatten(2, 3).mT.contiguous()]
    if loop:
        arguments.append(_chunks(k_cmp, v_cmp, loop.chunks))
    arguments += [
        _keys(k_cmp, RUN), _values(v_cmp, RUN), _pages(k_slc, v_slc), _rows(k_slc, v_slc),
        _keys(k_win, KEYS), _values(v_win, KEYS),
    ]  # fmt: skip
    if loop:
        arguments.append(_packed(k_win, v_win, 1))
        tiles -= SPARE
    arguments += [by_row.transpose(2, 3).contiguous(), shifts]
    arguments += _positions(past - before, tiles, seen, (num_local, window), q.device)
    kernel = kernels.forward
    if loop:
        arguments += loop.tables(seen, num_local, q.device)
        looped, kernel = {"begin": loop.begin}, kernels.forward_looped
    (o,) = kernel(
        *arguments,
        _weights(block, q.device),
        torch.eye(rows // group, device=q.device).repeat_interleave(group, 0),
        torch.eye(QUERIES, device=q.device).repeat(KEYS // QUERIES, 1),
        _slot_keys(slots, q.device),
        _slot_lanes(q.device),
        batch=batch, group=group, block=block, count=num_selected, initial=num_initial,
        local=num_local, window=window, past=past - before, tokens=tokens, scale=scale,
        paired=tiles > 1, **looped, **constants,
    )  # fmt: skip
    first = before + (TOKENS if loop else 0)
    return o[:, first : first + queries].contiguous()


def instructions(lanes: int, queries: int, tokens: int, window: int) -> int:
    """About how many instructions the unrolled kernel has for so many kv heads of batch rows
    (`tests/neuron/test_neuron_nsa_attention.py` counts them)."""
    tiles = queries / QUERIES + 1
    keys = (tokens - queries / 2) / STRIDE / KEYS  # tiles of them, on average
    near = window / KEYS + 1
    return int(lanes * (OF_LANE + tiles * (OF_TILE + OF_KEYS * (keys + near))))


def loop_of(
    plan: Plan, sizes: tuple[int, int, int], block: int, count: int, forced: tuple[int, int],
    window: int,
) -> Loop | None:  # fmt: skip
    """The loop of a call, if it has one: unrolled, its program for one of two cores would have too
    many instructions (so one and two cores do the same), or SBUF too little room.

    Args:
        sizes: kv heads of all batch rows, S, T. block: l. count: n. forced: num_initial, num_local.
    """
    lanes, queries, tokens = sizes
    sizes_of_loop = plan["looped"]
    unrolled = instructions(-(-lanes // 2), queries, tokens, window)
    if unrolled <= sizes_of_loop["most_unrolled"] and tokens <= MOST_TOKENS:
        return None
    ranked = max(tokens, sizes_of_loop["least_ranked"])
    return Loop.of(tokens - queries, tokens, block, count, *forced, window, ranked)


@dataclass(frozen=True)
class Loop:
    """What the looped kernel does in its loop: groups of 128 tokens.

    Attributes:
        begin: the first of them, of all. groups: how many. block: l.
        ranked: tokens whose blocks are ranked, T at least.
    """

    begin: int
    groups: int
    block: int
    ranked: int

    @classmethod
    def of(
        cls, past: int, tokens: int, block: int, count: int, initial: int, local: int,
        window: int, ranked: int,
    ) -> Loop | None:  # fmt: skip
        """Before it each query's window, forced and chosen blocks are there, one group earlier."""
        of_window = 1 + (window + KEYS - 2) // KEYS
        of_blocks = 1 + (max(count, initial + local) + 2) // 2
        begin = max(of_window, of_blocks, past // TOKENS)
        groups = -(-tokens // TOKENS) - begin
        possible = groups > 0 and count > initial + local
        return cls(begin, groups, block, ranked) if possible else None

    @property
    def end(self) -> int:
        """The position behind its last tile, and those that it only loads."""
        return TOKENS * (self.begin + self.groups) + QUERIES * SPARE

    @property
    def chunks(self) -> int:
        """Runs of 1024 compressed keys, in whole pieces of what is ranked by a lane."""
        keys = max(1, (self.ranked - self.block) // STRIDE + 1)
        return -(-keys // (2 * OF_CHUNK)) * 2

    def tables(
        self, seen: tuple[int, int], local: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """`turns` and `starts` of the kernel; seen: compressed keys, and l."""
        keys, block = seen
        pairs = torch.arange(2 * (self.groups + 1), device=device)
        pairs = pairs.clamp(max=2 * self.groups - 1)  # the last turn takes those of the one before
        t0 = TOKENS * self.begin + TOKENS // 2 * pairs

        def visible(t: Tensor) -> Tensor:
            return ((t + 1 - block).div(STRIDE, rounding_mode="floor") + 1).clamp(0, keys)

        whole = visible(t0) // OF_CHUNK
        every = (visible(t0 + TOKENS // 2 - 1) + OF_CHUNK - 1) // OF_CHUNK
        turns = torch.stack((whole, every), 1).int().reshape(-1, 4)
        # The blocks that the pair before may choose end before its local ones.
        near = 2 * self.begin - 1 + torch.arange(2 * (self.groups + 1), device=device) - local
        start = t0 - STRIDE * OF_CHUNK * whole
        following = torch.cat((start[1:], start[-1:]))
        starts = torch.stack((following, near), 1).float().reshape(-1, 4)
        first = F.pad(start[:1].float(), (0, 3))[None]
        return turns, torch.cat((starts, first))


def _tiles(x: Tensor, before: int, after: int, kv_heads: int) -> Tensor:
    """[B, S, Hq, D] -> [B * Hkv, tiles, 32, G, D]; edges are repeated where queries are missing,
    `after` of them at the end at least."""
    after += -(before + x.shape[1] + after) % QUERIES
    parts = [x[:, :1].expand(-1, before, -1, -1), x, x[:, -1:].expand(-1, after, -1, -1)]
    grouped = torch.cat(parts, 1).unflatten(2, (kv_heads, -1)).movedim(2, 1).flatten(0, 1)
    tiles: Tensor = grouped.unflatten(1, (-1, QUERIES))
    return tiles


def _longer(x: Tensor, more: int) -> Tensor:
    """[B, T, Hkv, D] with `more` rows of zeros."""
    return F.pad(x, (0, 0, 0, 0, 0, more)) if more else x


def _chunks(k: Tensor, v: Tensor, count: int) -> Tensor:
    """Compressed keys and values by half chunks, [B * Hkv, count + 1, 2, 128, columns]."""
    keys = (count + 1) * OF_CHUNK
    k, v = (_longer(x, keys - x.shape[1]) for x in (k, v))
    halves: Tensor = _packed(k, v, OF_CHUNK // 2 // KEYS).unflatten(1, (-1, 2))
    return halves


def _packed(k: Tensor, v: Tensor, size: int) -> Tensor:
    """K and V [B, T, Hkv, D] as [B * Hkv, runs, 128, columns], `size` tiles of 128 keys in a run:
    K^T's first 128 rows; those behind, tiles in turn on either half; [v | 1]."""
    keys, rows = (
        F.pad(x.transpose(1, 2).flatten(0, 1), (0, 0, 0, -x.shape[1] % (size * KEYS)))
        .unflatten(1, (-1, size, KEYS))
        for x in (k, F.pad(v, (0, 1), value=1.0))
    )  # fmt: skip
    lanes, runs, _, _, dk = keys.shape
    k_t = keys.permute(0, 1, 4, 2, 3)  # [lanes, runs, DK, size, 128]
    low, rest = min(dk, KEYS), max(0, dk - KEYS)
    columns = KEYS * (-(-size // 2) if rest else 0)
    upper = k.new_zeros(lanes, runs, KEYS, columns)
    if rest:
        by_half = upper.unflatten(2, (2, BLOCK)).unflatten(4, (-1, KEYS))
        for tile in range(size):
            by_half[:, :, tile % 2, :rest, tile // 2] = k_t[:, :, low:, tile]
    lower = F.pad(k_t[:, :, :low].flatten(3), (0, 0, 0, KEYS - low))
    packed: Tensor = torch.cat((lower, upper, rows.transpose(2, 3).flatten(3)), -1)
    return packed


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
