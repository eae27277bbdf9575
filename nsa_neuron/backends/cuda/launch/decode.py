"""Launches `cuda_kernels/decode`: a few new tokens per sequence against paged caches.

Cache layout. Keys and values lie in pools of pages `[P, page, Hkv, D]` (any strides, last dim
contiguous); one pool may hold pages of several kinds. An int32 table `[B, pages]` names the pages
of each sequence in order: token (or compressed block) i of sequence b lies in page
`table[b, i // page]` at offset `i % page`. The table's width bounds the length; entries past a
sequence's end are never read. There are three caches: compressed (`k_cmp`, `v_cmp`), selected and
window; a model with one raw cache passes it twice. The pages of the selected cache are multiples of
the selection block, so that a block lies in one page. `seqlens` int32 [B] counts the tokens of each
sequence, the new ones included, and stays on the device: every grid and buffer follows from shapes,
so the two launches can be captured in a CUDA graph and replayed while sequences grow. A sequence of
length 0 is an idle slot and gives zeros.

New tokens are written to the caches, and a compressed block appended when one completes, before
these launches: that is the cache's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_neuron.backends.cuda.launch.common import head_dim_constants, key_tile, next_power_of_two

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nsa_neuron.backends.cuda.launch.common import Plan

HEADS_PER_PROGRAM = 16
"""Rows of the smallest matrix product. Larger groups are cut into parts: with more rows a program's
accumulators do not fit its registers, and the keys that the parts share come from L2."""

MAX_RATIO = 128
"""Compressed keys of a selection block, m / d, up to which a tile of `score` fits an SM."""

SELECTED_KEYS = 64
"""Tokens of a tile of `attend`: a selection block, or part of a longer one."""


@dataclass(frozen=True)
class PagedCaches:
    """The caches of a batch; see the module.

    Attributes:
        seqlens: int32 [B].
        k_cmp, v_cmp, k_slc, v_slc, k_win, v_win: pools [P, page, Hkv, D].
        cmp_table, slc_table, win_table: int32 [B, pages], contiguous.
    """

    seqlens: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    cmp_table: Tensor
    k_slc: Tensor
    v_slc: Tensor
    slc_table: Tensor
    k_win: Tensor
    v_win: Tensor
    win_table: Tensor


@dataclass(frozen=True)
class Geometry:
    """NSA's block structure (tokens and blocks) and the scale of the logits."""

    block: int
    stride: int
    select_block: int
    num_selected: int
    num_initial: int
    num_local: int
    window: int
    scale: float


@dataclass(frozen=True)
class Workspace:
    """Buffers between and inside the two launches; reusable for calls of the same shapes.

    One workspace serves one stream: two calls at the same time need two. `counters` are zero
    between calls.
    """

    partial_o: Tensor
    partial_ml: Tensor
    importance: Tensor
    over: Tensor
    tile_maximum: Tensor
    ids: Tensor
    id_scores: Tensor
    counters: Tensor

    @staticmethod
    def allocate(plan: Plan, q: Tensor, caches: PagedCaches, geometry: Geometry) -> Workspace:
        """Buffers for queries and caches of these shapes."""
        return _allocate(_Sizes.of(plan, q, caches, geometry), q.device)


@dataclass(frozen=True)
class _Sizes:
    items: int
    group: int
    parts: int
    dv: int
    blocks: int
    ratio: int
    tiles: int
    kept: int
    cmp_splits: int
    win_splits: int
    slc_splits: int

    @property
    def places(self) -> int:
        return self.cmp_splits + self.win_splits + self.slc_splits

    @staticmethod
    def of(plan: Plan, q: Tensor, caches: PagedCaches, geometry: Geometry) -> _Sizes:
        constants = plan["score"]
        batch, queries, heads, _ = q.shape
        kv_heads, dv = caches.v_cmp.shape[2:]
        items = batch * queries * kv_heads
        per_block = geometry.select_block // geometry.stride
        ratio = next_power_of_two(per_block)
        blocks = _tile_blocks(constants["KEYS"], ratio)
        capacity = caches.cmp_table.shape[1] * caches.k_cmp.shape[1]
        tiles = max(1, -(-capacity // (blocks * per_block)))
        parts = group_parts(heads // kv_heads)
        share = max(1, constants["PROGRAMS"] // (items * parts))
        window_tiles = -(-geometry.window // constants["BLOCK_N"])
        return _Sizes(
            items=items, group=heads // kv_heads, parts=parts, dv=dv, blocks=blocks, ratio=ratio,
            tiles=tiles, kept=next_power_of_two(geometry.num_selected),
            cmp_splits=min(share, tiles, 64), win_splits=min(share, window_tiles),
            slc_splits=min(share, geometry.num_selected),
        )  # fmt: skip


def forward(
    kernels: Any,
    plan: Plan,
    *,
    q: Tensor,
    gates: Tensor,
    block: int,
    stride: int,
    select_block: int,
    num_selected: int,
    num_initial: int,
    num_local: int,
    window: int,
    scale: float,
    **caches: Tensor,
) -> Tensor:
    """The op `decode`: a `step` with buffers of its own; arguments as in its spec."""
    geometry = Geometry(
        block, stride, select_block, num_selected, num_initial, num_local, window, scale
    )
    paged = PagedCaches(**{name: _rows_contiguous(x) for name, x in caches.items()})
    return step(kernels, plan, q, gates, paged, geometry)


def step(
    kernels: Any,
    plan: Plan,
    q: Tensor,
    gates: Tensor,
    caches: PagedCaches,
    geometry: Geometry,
    workspace: Workspace | None = None,
) -> Tensor:
    """NSA of the newest S tokens of each sequence, in two launches (a third clears new counters).

    Args:
        kernels: the package `cuda_kernels.decode`, compiled or interpreted.
        plan: constants of the kernels `score` and `attend`; those of `score` hold KEYS (compressed
            blocks per tile) and PROGRAMS (how many splits fill the device), too.
        q: [B, S, Hq, Dk]; gates: [B, S, Hq, 3] (compressed, selected, window).
        workspace: from `Workspace.allocate` for the same shapes; None allocates one. Its `ids` hold
            the selection afterwards, int32 [B * S * Hkv, >= num_selected].

    Returns:
        o [B, S, Hq, Dv] in q's dtype.
    """
    sizes = _Sizes.of(plan, q, caches, geometry)
    w = workspace or _allocate(sizes, q.device)
    q = q if q.stride(-1) == 1 else q.contiguous()
    batch, queries, heads, dk = q.shape
    kv_heads = caches.v_cmp.shape[2]
    o = torch.empty(batch, queries, heads, sizes.dv, dtype=q.dtype, device=q.device)
    shared: dict[str, Any] = {
        "G": sizes.group, "GP": HEADS_PER_PROGRAM, "PARTS": sizes.parts,
        **head_dim_constants(dk, sizes.dv),
        "SELECT": geometry.select_block, "N": geometry.num_selected, "NP": sizes.kept,
        "CMP_SPLITS": sizes.cmp_splits, "WIN_SPLITS": sizes.win_splits, "PLACES": sizes.places,
    }  # fmt: skip
    kernels.score[((sizes.cmp_splits + sizes.win_splits) * sizes.parts * sizes.items,)](
        q, caches.k_cmp, caches.v_cmp, caches.k_win, caches.v_win, caches.cmp_table,
        caches.win_table, caches.seqlens, w.partial_o, w.partial_ml, w.importance, w.over,
        w.tile_maximum, w.ids, w.id_scores, w.counters, queries, heads, kv_heads, sizes.tiles,
        caches.cmp_table.shape[1], caches.win_table.shape[1], geometry.scale, *q.stride()[:3],
        *_strides(caches.k_cmp, caches.v_cmp, caches.k_win, caches.v_win),
        BLOCK=geometry.block, STRIDE=geometry.stride, INITIAL=geometry.num_initial,
        LOCAL=geometry.num_local, WINDOW=geometry.window, CMP_PAGE=caches.k_cmp.shape[1],
        WIN_PAGE=caches.k_win.shape[1], HEADS=min(16, next_power_of_two(sizes.group)), **shared,
        **score_constants(plan["score"], sizes.ratio, sizes.kept),
    )  # fmt: skip
    kernels.attend[(sizes.slc_splits * sizes.parts * sizes.items,)](
        q, caches.k_slc, caches.v_slc, caches.slc_table, caches.seqlens, gates.contiguous(), o,
        w.ids, w.partial_o, w.partial_ml, w.counters, queries, heads, kv_heads,
        caches.slc_table.shape[1], geometry.scale, *q.stride()[:3],
        *_strides(caches.k_slc, caches.v_slc), SLC_PAGE=caches.k_slc.shape[1],
        SLC_SPLITS=sizes.slc_splits, BLOCK_N=key_tile(SELECTED_KEYS, geometry.select_block),
        **shared, **plan["attend"],
    )  # fmt: skip
    return o


def _allocate(sizes: _Sizes, device: torch.device) -> Workspace:
    s = sizes

    def floats(*shape: int) -> Tensor:
        return torch.empty(s.items, *shape, dtype=torch.float32, device=device)

    return Workspace(
        partial_o=floats(s.places, s.group, s.dv),
        partial_ml=floats(s.places, 2, s.group),
        importance=floats(s.tiles, s.group, s.blocks),
        over=floats(s.tiles, s.group),
        tile_maximum=floats(s.tiles, s.group),
        ids=torch.empty(s.items, s.kept, dtype=torch.int32, device=device),
        id_scores=floats(s.kept),
        counters=torch.zeros(s.items, s.parts, dtype=torch.int32, device=device),
    )


def group_parts(group: int) -> int:
    """Into how many programs the heads of a group are cut."""
    return -(-group // HEADS_PER_PROGRAM)


def score_constants(planned: Mapping[str, Any], ratio: int, kept: int) -> dict[str, Any]:
    """The plan of `score`, filled in for selection blocks of `ratio` compressed keys.

    A block may have more keys than the planned tile. It is a tile of its own then, with 8 warps,
    since it does not fit the registers of 4, and unpipelined: the next one has no room beside it.
    """
    keys = planned["KEYS"]
    passed = {k: v for k, v in planned.items() if k not in ("KEYS", "PROGRAMS")}
    tile = {"BLOCKS": _tile_blocks(keys, ratio), "RATIO": ratio}
    large = {"num_warps": 8, "num_stages": 1} if ratio > keys else {}
    return {**passed, **tile, **large, "SLOTS": max(planned["SLOTS"], 2 * kept)}


def _tile_blocks(keys: int, ratio: int) -> int:
    return max(1, keys // ratio)


def _rows_contiguous(x: Tensor) -> Tensor:
    """Pools with gaps inside rows, and tables with any gaps, are copied: kernels do not take them.

    A serving engine's caches and tables have none, so nothing is copied there.
    """
    if x.dim() == 4:
        return x if x.stride(-1) == 1 else x.contiguous()
    return x.contiguous()


def _strides(*pools: Tensor) -> list[int]:
    return [stride for pool in pools for stride in pool.stride()[:3]]
