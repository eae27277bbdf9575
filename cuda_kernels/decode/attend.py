"""Second decode launch: the selected branch, and the gated sum of all three. See the package."""

import triton
import triton.language as tl

from ..common import LOG2E, load_split, store_split
from .paging import (
    attend_tokens,
    is_last,
    merge_partials,
    position_of,
    store_partial,
)


@triton.jit
def _selected_split(
    q0, q1, k_head, v_head, table, ids, stride_kp, stride_kt, stride_vp, stride_vt,
    first, position, scale_log2, SHARE: tl.constexpr, N: tl.constexpr,
    GP: tl.constexpr, DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    SELECT: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial softmax over the selected blocks [first, first + SHARE), BLOCK_N tokens at a time."""
    maximum = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc0 = tl.zeros([GP, V0], tl.float32)
    acc1 = tl.zeros([GP, V1 if V1 > 0 else V0], tl.float32)
    for place in range(first, tl.minimum(first + SHARE, N)):
        block = tl.load(ids + place)
        if block >= 0:
            for tile in range(0, SELECT, BLOCK_N):
                inside = tile + tl.arange(0, BLOCK_N)
                token = block * SELECT + inside
                seen = (inside < SELECT) & (token <= position)
                acc0, acc1, maximum, total = attend_tokens(
                    acc0, acc1, maximum, total, q0, q1, k_head, v_head, table, token, seen,
                    stride_kp, stride_kt, stride_vp, stride_vt, scale_log2, DK, D0, D1, DV, V0, V1,
                    PAGE, UPCAST, PRECISION,
                )  # fmt: skip
    return acc0, acc1, maximum, total


@triton.jit
def _add_branch(
    out0, out1, partial_o, partial_ml, first, count, gate_rows, rows, GP: tl.constexpr,
    G: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
):  # fmt: skip
    """Adds a branch, merged from its `count` partial results and gated, to the output tiles."""
    part0, part1, _ = merge_partials(partial_o, partial_ml, first, count, rows, GP, G, DV, V0, V1)
    gate = tl.load(gate_rows, mask=rows < G, other=0.0).to(tl.float32)
    return out0 + part0 * gate[:, None], out1 + part1 * gate[:, None]


@triton.jit
def attend(
    q, k_slc, v_slc, slc_table, seqlens, gates, o, ids, partial_o, partial_ml, counters,
    S, HQ, HKV, slc_pages, scale,
    stride_qb, stride_qt, stride_qh, stride_kp, stride_kt, stride_kh,
    stride_vp, stride_vt, stride_vh,
    G: tl.constexpr, GP: tl.constexpr, PARTS: tl.constexpr,
    DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    SELECT: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, SLC_PAGE: tl.constexpr,
    CMP_SPLITS: tl.constexpr, WIN_SPLITS: tl.constexpr, SLC_SPLITS: tl.constexpr,
    PLACES: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of the selected branch of one (sequence, token, kv head); the last one combines.

    Grid: (B * S * Hkv * SLC_SPLITS * PARTS,), as in `score`.

    Args:
        q: [B, S, Hq, DK]; k_slc, v_slc: pools [P, page, Hkv, D]; slc_table: int32 [B, slc_pages].
        gates: [B, S, Hq, 3] (compressed, selected, window) and o: [B, S, Hq, DV], contiguous.
        ids, partial_o, partial_ml, counters: as `score` left them.
    """
    part = tl.program_id(0) % PARTS
    split = tl.program_id(0) // PARTS % SLC_SPLITS
    item = (tl.program_id(0) // (PARTS * SLC_SPLITS)).to(tl.int64)
    batch, query, kv_head, position = position_of(item, seqlens, S, HKV)
    rows = part * GP + tl.arange(0, GP)
    q_rows = q + batch * stride_qb + query * stride_qt + (kv_head * G + rows) * stride_qh
    q0, q1 = load_split(q_rows, rows < G, DK, D0, D1, True)
    SHARE: tl.constexpr = (N + SLC_SPLITS - 1) // SLC_SPLITS
    acc0, acc1, maximum, total = _selected_split(
        q0, q1, k_slc + kv_head * stride_kh, v_slc + kv_head * stride_vh,
        slc_table + batch * slc_pages, ids + item * NP, stride_kp, stride_kt, stride_vp, stride_vt,
        split * SHARE, position, scale * LOG2E, SHARE, N, GP, DK, D0, D1, DV, V0, V1, SELECT,
        SLC_PAGE, BLOCK_N, UPCAST, PRECISION,
    )  # fmt: skip
    first_window = item * PLACES + CMP_SPLITS
    first_selected = first_window + WIN_SPLITS
    store_partial(
        partial_o, partial_ml, first_selected + split, acc0, acc1, maximum, total, rows,
        G, DV, V0, V1,
    )  # fmt: skip
    if is_last(counters + item * PARTS + part, SLC_SPLITS):
        out_row = (batch * S + query) * HQ + kv_head * G + rows
        out0 = tl.zeros([GP, V0], tl.float32)
        out1 = tl.zeros([GP, V1 if V1 > 0 else V0], tl.float32)
        gate_rows = gates + out_row * 3
        out0, out1 = _add_branch(
            out0, out1, partial_o, partial_ml, item * PLACES, 1, gate_rows, rows, GP, G, DV, V0, V1
        )
        out0, out1 = _add_branch(
            out0, out1, partial_o, partial_ml, first_selected, SLC_SPLITS, gate_rows + 1, rows, GP,
            G, DV, V0, V1,
        )  # fmt: skip
        out0, out1 = _add_branch(
            out0, out1, partial_o, partial_ml, first_window, WIN_SPLITS, gate_rows + 2, rows, GP,
            G, DV, V0, V1,
        )  # fmt: skip
        store_split(o + out_row * DV, rows < G, out0, out1, DV, V0, V1)
