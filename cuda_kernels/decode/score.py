"""First decode launch: compressed and window branches, and the selection. See the package."""

import triton
import triton.language as tl

from ..common import LOG2E, dot, dot_split, load_split, narrow
from ..compressed_attention import visible_blocks
from ..select_blocks import keep_winners
from .paging import (
    attend_tokens,
    is_last,
    merge_partials,
    paged_rows,
    position_of,
    store_partial,
)


@triton.jit
def _tile_importance(
    p, importance, over, rows, GP: tl.constexpr, G: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr,
    BLOCKS: tl.constexpr, RATIO: tl.constexpr,
):  # fmt: skip
    """Stores what a tile of exponentials p [GP, BLOCKS * RATIO] adds to its selection blocks.

    Per head (rows, of which those below G are real), relative to the tile's maximum: importance
    [G, BLOCKS], and what the last block passes on to the next tile's first, over [G]. The weights
    are those of `select_blocks`.
    """
    R: tl.constexpr = SELECT // STRIDE
    A: tl.constexpr = BLOCK // STRIDE
    block = tl.arange(0, BLOCKS)
    place = tl.arange(0, BLOCKS * RATIO) % RATIO
    own = tl.where(place < R, tl.minimum(A, R - place), 0).to(tl.float32)
    scores = tl.sum(tl.reshape(p * own[None, :], [GP, BLOCKS, RATIO]), 2)
    if A > 1:
        passed = tl.where(place < R, tl.maximum(place + A - R, 0), 0).to(tl.float32)
        passed = tl.sum(tl.reshape(p * passed[None, :], [GP, BLOCKS, RATIO]), 2)
        previous = tl.maximum(block - 1, 0)[None, :] + tl.zeros([GP, BLOCKS], tl.int32)
        scores += tl.where(block[None, :] > 0, tl.gather(passed, previous, 1), 0.0)
        last = tl.sum(tl.where(block[None, :] == BLOCKS - 1, passed, 0.0), 1)
    else:
        last = tl.zeros([GP], tl.float32)
    tl.store(importance + rows[:, None] * BLOCKS + block[None, :], scores, mask=(rows < G)[:, None])
    tl.store(over + rows, last, mask=rows < G)


@triton.jit
def _compressed_split(
    q0, q1, k_head, v_head, table, stride_kp, stride_kt, stride_vp, stride_vt,
    importance, over, tile_maximum, first_tile, last_tile, visible, scale_log2, rows,
    GP: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr, PAGE: tl.constexpr,
    BLOCKS: tl.constexpr, RATIO: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial softmax over key tiles [first_tile, last_tile), storing their importance."""
    R: tl.constexpr = SELECT // STRIDE
    index = tl.arange(0, BLOCKS * RATIO)
    maximum = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc0 = tl.zeros([GP, V0], tl.float32)
    acc1 = tl.zeros([GP, V1 if V1 > 0 else V0], tl.float32)
    for tile in range(first_tile, last_tile):
        key = tile * (BLOCKS * R) + (index // RATIO) * R + index % RATIO
        seen = (index % RATIO < R) & (key < visible)
        k_rows = paged_rows(k_head, table, key, seen, stride_kp, stride_kt, PAGE)
        v_rows = paged_rows(v_head, table, key, seen, stride_vp, stride_vt, PAGE)
        k0, k1 = load_split(k_rows, seen, DK, D0, D1, True)
        v0, v1 = load_split(v_rows, seen, DV, V0, V1, True)
        logits = dot_split(q0, q1, k0, k1, D1, UPCAST, PRECISION) * scale_log2
        logits = tl.where(seen[None, :], logits, float("-inf"))
        # Exponentials relative to the tile's own maximum: what is stored as importance must not
        # depend on later tiles. Every tile has a visible key, so its maximum is finite.
        highest = tl.max(logits, 1)
        p = tl.math.exp2(logits - highest[:, None])
        _tile_importance(
            p, importance + tl.cast(tile, tl.int64) * (G * BLOCKS),
            over + tl.cast(tile, tl.int64) * G, rows, GP, G, BLOCK, STRIDE, SELECT, BLOCKS, RATIO,
        )  # fmt: skip
        tl.store(tile_maximum + tl.cast(tile, tl.int64) * G + rows, highest, mask=rows < G)
        new_maximum = tl.maximum(maximum, highest)
        factor = tl.math.exp2(maximum - new_maximum)
        tile_factor = tl.math.exp2(highest - new_maximum)
        total = total * factor + tl.sum(p, 1) * tile_factor
        p = narrow(p, v0.dtype, UPCAST)
        product = dot(p, v0, tl.zeros([GP, V0], tl.float32), UPCAST, PRECISION)
        acc0 = acc0 * factor[:, None] + product * tile_factor[:, None]
        if V1 > 0:
            product = dot(p, v1, tl.zeros([GP, V1], tl.float32), UPCAST, PRECISION)
            acc1 = acc1 * factor[:, None] + product * tile_factor[:, None]
        maximum = new_maximum
    return acc0, acc1, maximum, total


@triton.jit
def _window_split(
    q0, q1, k_head, v_head, table, stride_kp, stride_kt, stride_vp, stride_vt, begin, end,
    scale_log2,
    GP: tl.constexpr, DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial softmax over tokens [begin, end)."""
    maximum = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc0 = tl.zeros([GP, V0], tl.float32)
    acc1 = tl.zeros([GP, V1 if V1 > 0 else V0], tl.float32)
    for first in range(begin, end, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        seen = token < end
        acc0, acc1, maximum, total = attend_tokens(
            acc0, acc1, maximum, total, q0, q1, k_head, v_head, table, token, seen,
            stride_kp, stride_kt, stride_vp, stride_vt, scale_log2, DK, D0, D1, DV, V0, V1, PAGE,
            UPCAST, PRECISION,
        )  # fmt: skip
    return acc0, acc1, maximum, total


@triton.jit
def _select(
    ids, scratch, importance, over, tile_maximum, lse2_at, position, tiles,
    G: tl.constexpr, SELECT: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
    INITIAL: tl.constexpr, LOCAL: tl.constexpr, BLOCKS: tl.constexpr, SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Sums the importance over heads, CHUNK blocks at a time, and keeps the ids of the top N.

    Args:
        ids: int32 [NP], scratch: float32 [NP], their scores. lse2_at: float32 [G], lse in base 2.
        HEADS: heads summed at once.
    """
    CHUNK: tl.constexpr = SLOTS - NP
    slot = tl.arange(0, SLOTS)
    own = position // SELECT
    kept = tl.zeros([1], tl.int32)
    own_row = tl.zeros([1], tl.int32) + own
    for chunk in range(0, own + 1, CHUNK):
        block = chunk + slot - NP
        tile = block // BLOCKS
        fresh = (slot >= NP) & (block <= own)
        here = fresh & (tile < tiles)
        after = fresh & (block % BLOCKS == 0) & (tile > 0) & (tile <= tiles)
        values = tl.zeros([SLOTS], tl.float32)
        for start in range(0, G, HEADS):
            head = start + tl.arange(0, HEADS)
            real = head < G
            lse2 = tl.load(lse2_at + head, mask=real, other=float("-inf"), cache_modifier=".cg")
            lse2 = tl.where(lse2 == float("-inf"), float("inf"), lse2)
            where = tile[None, :].to(tl.int64) * G + head[:, None]
            mask = here[None, :] & real[:, None]
            top = tl.load(
                tile_maximum + where, mask=mask, other=float("-inf"), cache_modifier=".cg"
            )
            part = tl.load(
                importance + where * BLOCKS + (block % BLOCKS)[None, :], mask=mask, other=0.0,
                cache_modifier=".cg",
            )  # fmt: skip
            values += tl.sum(part * tl.math.exp2(top - lse2[:, None]), 0)
            mask = after[None, :] & real[:, None]
            where -= G
            top = tl.load(
                tile_maximum + where, mask=mask, other=float("-inf"), cache_modifier=".cg"
            )
            part = tl.load(over + where, mask=mask, other=0.0, cache_modifier=".cg")
            values += tl.sum(part * tl.math.exp2(top - lse2[:, None]), 0)
        old = slot < kept
        carried = tl.load(scratch + slot, mask=(slot < NP) & old, other=0.0)
        values = tl.where(slot < NP, carried, values)
        old_ids = tl.load(ids + slot, mask=(slot < NP) & old, other=0)
        numbers = tl.where(slot < NP, old_ids, block)
        live = tl.where(slot < NP, old, block <= own)
        kept = keep_winners(
            scratch + tl.zeros([1, SLOTS], tl.int32), ids + tl.zeros([1, SLOTS], tl.int32),
            values[None, :], numbers[None, :], live[None, :], own_row, N, INITIAL, LOCAL,
        )  # fmt: skip
    padding = tl.arange(0, NP)
    tl.store(ids + padding, tl.full([NP], -1, tl.int32), mask=padding >= kept)


@triton.jit
def score(
    q, k_cmp, v_cmp, k_win, v_win, cmp_table, win_table, seqlens,
    partial_o, partial_ml, importance, over, tile_maximum, ids, id_scores, counters,
    S, HQ, HKV, MAX_TILES, cmp_pages, win_pages, scale,
    stride_qb, stride_qt, stride_qh, stride_kp, stride_kt, stride_kh,
    stride_vp, stride_vt, stride_vh, stride_wkp, stride_wkt, stride_wkh,
    stride_wvp, stride_wvt, stride_wvh,
    G: tl.constexpr, GP: tl.constexpr, PARTS: tl.constexpr,
    DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr, N: tl.constexpr,
    NP: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, WINDOW: tl.constexpr,
    CMP_PAGE: tl.constexpr, WIN_PAGE: tl.constexpr,
    CMP_SPLITS: tl.constexpr, WIN_SPLITS: tl.constexpr, PLACES: tl.constexpr,
    BLOCKS: tl.constexpr, RATIO: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of the compressed or window branch of one (sequence, token, kv head).

    Grid: (B * S * Hkv * (CMP_SPLITS + WIN_SPLITS) * PARTS,): a grid may have 2**31 - 1 programs
    along x, but only 65,535 along y. A group's heads are cut into PARTS of GP heads, side by side,
    since they read the same keys.

    Args:
        q: [B, S, Hq, DK], last dim contiguous. k_cmp, v_cmp, k_win, v_win: pools
            [P, page, Hkv, D], last dim contiguous. cmp_table [B, cmp_pages], win_table
            [B, win_pages] and seqlens [B]: int32; the queries are the last S of seqlens tokens.
        partial_o, partial_ml: PLACES partial results per item, see `paging`: first the compressed
            splits (the merged result replaces the first), then the window's.
        importance: float32 [items, MAX_TILES, G, BLOCKS]; over, tile_maximum: float32 [items,
            MAX_TILES, G]; ids: int32 [items, NP], id_scores: float32 [items, NP].
        counters: int32 [items, PARTS], all 0, and 0 again afterwards.
    """
    split = tl.program_id(0) // PARTS % (CMP_SPLITS + WIN_SPLITS)
    item = (tl.program_id(0) // (PARTS * (CMP_SPLITS + WIN_SPLITS))).to(tl.int64)
    batch, query, kv_head, position = position_of(item, seqlens, S, HKV)
    scale_log2 = scale * LOG2E
    rows = tl.program_id(0) % PARTS * GP + tl.arange(0, GP)
    q_rows = q + batch * stride_qb + query * stride_qt + (kv_head * G + rows) * stride_qh
    q0, q1 = load_split(q_rows, rows < G, DK, D0, D1, True)
    if split >= CMP_SPLITS:
        first_seen = tl.maximum(position - WINDOW + 1, 0)
        SHARE: tl.constexpr = (WINDOW + WIN_SPLITS - 1) // WIN_SPLITS
        begin = first_seen + (split - CMP_SPLITS) * SHARE
        end = tl.minimum(begin + SHARE, position + 1)
        acc0, acc1, maximum, total = _window_split(
            q0, q1, k_win + kv_head * stride_wkh, v_win + kv_head * stride_wvh,
            win_table + batch * win_pages, stride_wkp, stride_wkt, stride_wvp, stride_wvt,
            begin, end, scale_log2, GP, DK, D0, D1, DV, V0, V1, WIN_PAGE, BLOCK_N,
            UPCAST, PRECISION,
        )  # fmt: skip
        store_partial(
            partial_o, partial_ml, item * PLACES + split, acc0, acc1, maximum, total, rows,
            G, DV, V0, V1,
        )  # fmt: skip
    else:
        R: tl.constexpr = SELECT // STRIDE
        visible = visible_blocks(position, BLOCK, STRIDE)
        tiles = tl.cdiv(visible, BLOCKS * R)
        share = tl.cdiv(tiles, CMP_SPLITS)
        first_tile = split * share
        last_tile = tl.minimum(first_tile + share, tiles)
        item_importance = importance + item * MAX_TILES * (G * BLOCKS)
        item_over = over + item * MAX_TILES * G
        item_maximum = tile_maximum + item * MAX_TILES * G
        acc0, acc1, maximum, total = _compressed_split(
            q0, q1, k_cmp + kv_head * stride_kh, v_cmp + kv_head * stride_vh,
            cmp_table + batch * cmp_pages, stride_kp, stride_kt, stride_vp, stride_vt,
            item_importance, item_over, item_maximum, first_tile, last_tile, visible, scale_log2,
            rows, GP, G, DK, D0, D1, DV, V0, V1, BLOCK, STRIDE, SELECT, CMP_PAGE, BLOCKS, RATIO,
            UPCAST, PRECISION,
        )  # fmt: skip
        store_partial(
            partial_o, partial_ml, item * PLACES + split, acc0, acc1, maximum, total, rows,
            G, DV, V0, V1,
        )  # fmt: skip
        if is_last(counters + item * PARTS, CMP_SPLITS * PARTS):
            for part in range(PARTS):
                heads = part * GP + tl.arange(0, GP)
                acc0, acc1, lse2 = merge_partials(
                    partial_o, partial_ml, item * PLACES, CMP_SPLITS, heads, GP, G, DV, V0, V1
                )
                tl.debug_barrier()
                # A part that saw nothing counts nothing by its maximum, -inf.
                total = tl.full([GP], 1.0, tl.float32)
                store_partial(
                    partial_o, partial_ml, item * PLACES, acc0, acc1, lse2, total, heads, G,
                    DV, V0, V1,
                )  # fmt: skip
                tl.debug_barrier()
            _select(
                ids + item * NP, id_scores + item * NP, item_importance, item_over, item_maximum,
                partial_ml + item * PLACES * (2 * G), position, tiles, G, SELECT, N, NP, INITIAL,
                LOCAL, BLOCKS, SLOTS, HEADS,
            )  # fmt: skip
