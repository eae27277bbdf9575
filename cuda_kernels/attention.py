"""Causal attention, over all earlier keys or over a window of them: forward and backward.

Bound by matrix products: 2 * (Dk + Dv) FLOP per visible (query, key) pair and head forward; the
backward's two kernels spend 2 * (2 Dk + Dv) for dq and 2 * (2 Dk + 2 Dv) for dk, dv (one fused
kernel would save 2 * (Dk + Dv) but needs atomics, or another pass over float32 partials, for dq).

Design: a tile of queries holds (token, head) pairs of one group, so one tile of K, V serves the G
heads, the diagonal wastes G times less than with one head per tile, and dk, dv are summed over the
group in registers. Tiles with the most keys start first, which evens out the causal triangle.

One source serves both ops: WINDOW = 0 sees every earlier key, WINDOW = w the last w. What the two
share is all but the bounds of the loop and one comparison of the mask.
"""

import triton
import triton.language as tl

from .common import (
    LOG2E,
    dot,
    dot_split,
    group_rows,
    load_base2_lse,
    load_split,
    narrow,
    packed_tile,
    softmax_result,
    softmax_step,
    store_split,
    token_rows,
)
from .common import backward_delta as backward_delta


@triton.jit
def _sequence(
    tile, cu_q, cu_k, num_seqs, S, T, SCALE: tl.constexpr, BLOCK: tl.constexpr,
    BY_KEY: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Where a tile's sequence lies: query start, queries, key start, keys, tile inside it."""
    q_start = tl.full([], 0, tl.int64)
    k_start = tl.full([], 0, tl.int64)
    if PACKED:
        if BY_KEY:
            sequence, tile = packed_tile(tile, cu_k, num_seqs, SCALE, BLOCK)
        else:
            sequence, tile = packed_tile(tile, cu_q, num_seqs, SCALE, BLOCK)
        q_start = tl.load(cu_q + sequence).to(tl.int64)
        k_start = tl.load(cu_k + sequence).to(tl.int64)
        S = (tl.load(cu_q + sequence + 1) - q_start).to(tl.int32)
        T = (tl.load(cu_k + sequence + 1) - k_start).to(tl.int32)
    return q_start, S, k_start, T, tile


@triton.jit
def _visible(query, key, T, WINDOW: tl.constexpr):
    """Whether the query at position `query` sees the key at position `key` (broadcast)."""
    seen = (key <= query) & (key < T)
    if WINDOW > 0:
        seen = seen & (key > query - WINDOW)
    return seen


@triton.jit
def _attend(
    acc0, acc1, maximum, total, q0, q1, k_head, v_head, stride_kt, stride_vt, start, T, position,
    scale_log2,
    DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    WINDOW: tl.constexpr, MASK: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the keys [start, start + BLOCK_N) to the running softmax of a query tile."""
    key = start + tl.arange(0, BLOCK_N)
    # Not `token_rows`: its 64-bit offsets inside a tile are kept over both loops, and some spilled.
    place = key.to(tl.int64)
    k0, k1 = load_split(k_head + place * stride_kt, key < T, DK, D0, D1, MASK)
    logits = dot_split(q0, q1, k0, k1, D1, UPCAST, PRECISION) * scale_log2
    if MASK:
        seen = _visible(position[:, None], key[None, :], T, WINDOW)
        logits = tl.where(seen, logits, float("-inf"))
    p, factor, maximum, total = softmax_step(logits, maximum, total)
    v0, v1 = load_split(v_head + place * stride_vt, key < T, DV, V0, V1, MASK)
    p = narrow(p, v0.dtype, UPCAST)
    acc0 = dot(p, v0, acc0 * factor[:, None], UPCAST, PRECISION)
    if V1 > 0:
        acc1 = dot(p, v1, acc1 * factor[:, None], UPCAST, PRECISION)
    return acc0, acc1, maximum, total


@triton.jit
def forward(
    q, k, v, o, lse, cu_q, cu_k, num_seqs, S, T, HQ, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    G: tl.constexpr, DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    WINDOW: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention output and lse of BLOCK_M (token, head) rows of one group.

    Grid: (row tiles, Hkv, B). Keys that every row sees come first, without a mask; the keys of the
    diagonal after them, with it. A window has an edge on either side and is a few tiles long, so
    there one masked loop keeps the pipeline filled where three short ones would not.

    Args:
        q: [B, S, Hq, DK]; k: [B, T, Hkv, DK]; v: [B, T, Hkv, DV], last dim contiguous.
        o: [B, S, Hq, DV], contiguous; lse: float32 [B, S, Hq], contiguous.
        cu_q, cu_k: int32 [num_seqs + 1], read when PACKED.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    tokens = S
    q_start, S, k_start, T, tile = _sequence(
        tile, cu_q, cu_k, num_seqs, S, T, G, BLOCK_M, False, PACKED
    )
    first_row = tile * BLOCK_M
    if first_row < S * G:
        row = first_row + tl.arange(0, BLOCK_M)
        valid = row < S * G
        position = T - S + row // G
        head = kv_head.to(tl.int64) * G
        first_token = batch * tokens + q_start

        q_head = q + batch * stride_qb + q_start * stride_qt + head * stride_qh
        k_head = k + batch * stride_kb + k_start * stride_kt
        v_head = v + batch * stride_vb + k_start * stride_vt
        k_head += kv_head.to(tl.int64) * stride_kh
        v_head += kv_head.to(tl.int64) * stride_vh
        q_rows = group_rows(q_head, first_row, stride_qt, stride_qh, G, BLOCK_M)
        q0, q1 = load_split(q_rows, valid, DK, D0, D1, True)

        first = T - S + first_row // G
        last = T - S + tl.minimum((first_row + BLOCK_M - 1) // G, S - 1)
        begin = 0
        # `first` is never negative. ptxas cannot know, and serialises every wgmma of the loops
        # around a bound that may be (its C7515).
        edge = tl.maximum(first + 1, 0) // BLOCK_N * BLOCK_N
        if WINDOW > 0:
            begin = tl.maximum(first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
            edge = begin
        scale_log2 = scale * LOG2E
        maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
        acc1 = tl.zeros([BLOCK_M, V1 if V1 > 0 else V0], tl.float32)
        if WINDOW == 0:
            for start in range(0, edge, BLOCK_N):
                start = tl.multiple_of(start, BLOCK_N)
                acc0, acc1, maximum, total = _attend(
                    acc0, acc1, maximum, total, q0, q1, k_head, v_head, stride_kt, stride_vt,
                    start, T, position, scale_log2, DK, D0, D1, DV, V0, V1, WINDOW, False,
                    BLOCK_N, UPCAST, PRECISION,
                )  # fmt: skip
        for start in range(edge, last + 1, BLOCK_N):
            start = tl.multiple_of(start, BLOCK_N)
            acc0, acc1, maximum, total = _attend(
                acc0, acc1, maximum, total, q0, q1, k_head, v_head, stride_kt, stride_vt,
                start, T, position, scale_log2, DK, D0, D1, DV, V0, V1, WINDOW, True,
                BLOCK_N, UPCAST, PRECISION,
            )  # fmt: skip

        inverse, row_lse = softmax_result(maximum, total)
        o_head = o + (first_token * HQ + head) * DV
        o_rows = group_rows(o_head, first_row, HQ * DV, DV, G, BLOCK_M)
        store_split(o_rows, valid, acc0 * inverse[:, None], acc1 * inverse[:, None], DV, V0, V1)
        lse_rows = group_rows(lse + first_token * HQ + head, first_row, HQ, 1, G, BLOCK_M)
        tl.store(lse_rows, row_lse, mask=valid)


@triton.jit
def _dq_step(
    dq0, dq1, q0, q1, g0, g1, lse2, delta, k_head, v_head, stride_kt, stride_vt, start, T,
    position, scale_log2,
    DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    WINDOW: tl.constexpr, MASK: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds `ds @ k` of the keys [start, start + BLOCK_N) to dq (not yet scaled)."""
    key = start + tl.arange(0, BLOCK_N)
    k0, k1 = load_split(token_rows(k_head, start, stride_kt, BLOCK_N), key < T, DK, D0, D1, MASK)
    v0, v1 = load_split(token_rows(v_head, start, stride_vt, BLOCK_N), key < T, DV, V0, V1, MASK)
    logits = dot_split(q0, q1, k0, k1, D1, UPCAST, PRECISION) * scale_log2
    if MASK:
        seen = _visible(position[:, None], key[None, :], T, WINDOW)
        logits = tl.where(seen, logits, float("-inf"))
    p = tl.math.exp2(logits - lse2[:, None])
    dp = dot_split(g0, g1, v0, v1, V1, UPCAST, PRECISION)
    ds = narrow(p * (dp - delta[:, None]), k0.dtype, UPCAST)
    dq0 = dot(ds, k0, dq0, UPCAST, PRECISION)
    if D1 > 0:
        dq1 = dot(ds, k1, dq1, UPCAST, PRECISION)
    return dq0, dq1


@triton.jit
def backward_dq(
    q, k, v, grad_o, lse, delta, dq, cu_q, cu_k, num_seqs, S, T, HQ, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_gb, stride_gt, stride_gh,
    G: tl.constexpr, DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    WINDOW: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M (token, head) rows of one group: the loop of `forward` over the same keys.

    Grid: (row tiles, Hkv, B).

    Args:
        grad_o: [B, S, Hq, DV], last dim contiguous; lse, delta: float32 [B, S, Hq], contiguous.
        dq: [B, S, Hq, DK], contiguous.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    tokens = S
    q_start, S, k_start, T, tile = _sequence(
        tile, cu_q, cu_k, num_seqs, S, T, G, BLOCK_M, False, PACKED
    )
    first_row = tile * BLOCK_M
    if first_row < S * G:
        row = first_row + tl.arange(0, BLOCK_M)
        valid = row < S * G
        position = T - S + row // G
        head = kv_head * G
        first_token = batch * tokens + q_start

        q_head = q + batch * stride_qb + q_start * stride_qt + head * stride_qh
        g_head = grad_o + batch * stride_gb + q_start * stride_gt + head * stride_gh
        k_head = k + batch * stride_kb + k_start * stride_kt + kv_head * stride_kh
        v_head = v + batch * stride_vb + k_start * stride_vt + kv_head * stride_vh
        q_rows = group_rows(q_head, first_row, stride_qt, stride_qh, G, BLOCK_M)
        g_rows = group_rows(g_head, first_row, stride_gt, stride_gh, G, BLOCK_M)
        q0, q1 = load_split(q_rows, valid, DK, D0, D1, True)
        g0, g1 = load_split(g_rows, valid, DV, V0, V1, True)
        stat = first_token * HQ + head
        lse2 = load_base2_lse(group_rows(lse + stat, first_row, HQ, 1, G, BLOCK_M), valid)
        delta_rows = group_rows(delta + stat, first_row, HQ, 1, G, BLOCK_M)
        row_delta = tl.load(delta_rows, mask=valid, other=0.0)

        first = T - S + first_row // G
        last = T - S + tl.minimum((first_row + BLOCK_M - 1) // G, S - 1)
        edge = tl.maximum(first + 1, 0) // BLOCK_N * BLOCK_N
        if WINDOW > 0:
            edge = tl.maximum(first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        scale_log2 = scale * LOG2E
        dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
        dq1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else D0], tl.float32)
        if WINDOW == 0:
            for start in range(0, edge, BLOCK_N):
                start = tl.multiple_of(start, BLOCK_N)
                dq0, dq1 = _dq_step(
                    dq0, dq1, q0, q1, g0, g1, lse2, row_delta, k_head, v_head, stride_kt,
                    stride_vt, start, T, position, scale_log2, DK, D0, D1, DV, V0, V1, WINDOW,
                    False, BLOCK_N, UPCAST, PRECISION,
                )  # fmt: skip
        for start in range(edge, last + 1, BLOCK_N):
            start = tl.multiple_of(start, BLOCK_N)
            dq0, dq1 = _dq_step(
                dq0, dq1, q0, q1, g0, g1, lse2, row_delta, k_head, v_head, stride_kt,
                stride_vt, start, T, position, scale_log2, DK, D0, D1, DV, V0, V1, WINDOW,
                True, BLOCK_N, UPCAST, PRECISION,
            )  # fmt: skip
        dq_rows = group_rows(dq + stat * DK, first_row, HQ * DK, DK, G, BLOCK_M)
        store_split(dq_rows, valid, dq0 * scale, dq1 * scale, DK, D0, D1)


@triton.jit
def _dkv_step(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_head, g_head, lse_head, delta_head,
    stride_qt, stride_qh, stride_gt, stride_gh, HQ, first_row, S, T, key, scale_log2,
    G: tl.constexpr, DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    WINDOW: tl.constexpr, MASK: tl.constexpr, BLOCK_M: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the rows [first_row, first_row + BLOCK_M) give to dk (not yet scaled) and dv.

    Works on transposed logits [BLOCK_N, BLOCK_M], so that p and ds are left operands as they are.
    Rows past the end have lse = +inf and so p = 0: they need no mask of the logits.
    """
    row = first_row + tl.arange(0, BLOCK_M)
    valid = row < S * G
    q_rows = group_rows(q_head, first_row, stride_qt, stride_qh, G, BLOCK_M)
    g_rows = group_rows(g_head, first_row, stride_gt, stride_gh, G, BLOCK_M)
    q0, q1 = load_split(q_rows, valid, DK, D0, D1, True)
    g0, g1 = load_split(g_rows, valid, DV, V0, V1, True)
    lse2 = load_base2_lse(group_rows(lse_head, first_row, HQ, 1, G, BLOCK_M), valid)
    delta_rows = group_rows(delta_head, first_row, HQ, 1, G, BLOCK_M)
    row_delta = tl.load(delta_rows, mask=valid, other=0.0)
    logits = dot_split(k0, k1, q0, q1, D1, UPCAST, PRECISION) * scale_log2
    if MASK:
        # Token row // G sees a key from row (key - past) * G on: a bound per key, of which a thread
        # holds two, where a position per row would be eight registers more.
        bound = (key - (T - S)) * G - first_row
        inside = tl.arange(0, BLOCK_M)[None, :]
        seen = inside >= bound[:, None]
        if WINDOW > 0:
            seen = seen & (inside < bound[:, None] + WINDOW * G)
        logits = tl.where(seen, logits, float("-inf"))
    p = tl.math.exp2(logits - lse2[None, :])
    p_low = narrow(p, g0.dtype, UPCAST)
    dv0 = dot(p_low, g0, dv0, UPCAST, PRECISION)
    if V1 > 0:
        dv1 = dot(p_low, g1, dv1, UPCAST, PRECISION)
    dp = dot_split(v0, v1, g0, g1, V1, UPCAST, PRECISION)
    ds = narrow(p * (dp - row_delta[None, :]), q0.dtype, UPCAST)
    dk0 = dot(ds, q0, dk0, UPCAST, PRECISION)
    if D1 > 0:
        dk1 = dot(ds, q1, dk1, UPCAST, PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit
def backward_dkv(
    q, k, v, grad_o, lse, delta, dk, dv, cu_q, cu_k, num_seqs, S, T, HQ, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_gb, stride_gt, stride_gh,
    G: tl.constexpr, DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    WINDOW: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one kv head: a loop over the rows of all G heads that see them.

    Grid: (key tiles, Hkv, B); the first tiles have the most rows. Rows at the diagonal come first,
    masked, then (not with a window) those that see every key of the tile.

    Args:
        dk: [B, T, Hkv, DK], dv: [B, T, Hkv, DV], contiguous; the others as `backward_dq`.
    """
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    tokens = S
    keys = T
    q_start, S, k_start, T, tile = _sequence(
        tl.program_id(0), cu_q, cu_k, num_seqs, S, T, 1, BLOCK_N, True, PACKED
    )
    first_key = tile * BLOCK_N
    if first_key < T:
        key = first_key + tl.arange(0, BLOCK_N)
        valid = key < T
        head = kv_head * G
        k_head = k + batch * stride_kb + k_start * stride_kt + kv_head * stride_kh
        v_head = v + batch * stride_vb + k_start * stride_vt + kv_head * stride_vh
        q_head = q + batch * stride_qb + q_start * stride_qt + head * stride_qh
        g_head = grad_o + batch * stride_gb + q_start * stride_gt + head * stride_gh
        lse_head = lse + (batch * tokens + q_start) * HQ + head
        delta_head = delta + (batch * tokens + q_start) * HQ + head
        k0, k1 = load_split(
            token_rows(k_head, first_key, stride_kt, BLOCK_N), valid, DK, D0, D1, True
        )
        v0, v1 = load_split(
            token_rows(v_head, first_key, stride_vt, BLOCK_N), valid, DV, V0, V1, True
        )

        past = T - S
        rows = S * G
        begin = tl.maximum(first_key - past, 0) * G // BLOCK_M * BLOCK_M
        full = tl.maximum(first_key + BLOCK_N - 1 - past, 0) * G
        full = tl.minimum((full + BLOCK_M - 1) // BLOCK_M * BLOCK_M, rows)
        full = tl.maximum(full, 0)  # as for `edge` in `forward`
        if WINDOW > 0:
            full = tl.minimum(tl.maximum(first_key + BLOCK_N - 1 + WINDOW - past, 0) * G, rows)
        scale_log2 = scale * LOG2E
        dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
        dk1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else D0], tl.float32)
        dv0 = tl.zeros([BLOCK_N, V0], tl.float32)
        dv1 = tl.zeros([BLOCK_N, V1 if V1 > 0 else V0], tl.float32)
        for first_row in tl.range(begin, full, BLOCK_M, disable_licm=True):
            dk0, dk1, dv0, dv1 = _dkv_step(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_head, g_head, lse_head, delta_head,
                stride_qt, stride_qh, stride_gt, stride_gh, HQ, first_row, S, T, key, scale_log2,
                G, DK, D0, D1, DV, V0, V1, WINDOW, True, BLOCK_M, UPCAST, PRECISION,
            )  # fmt: skip
        if WINDOW == 0:
            for first_row in tl.range(full, rows, BLOCK_M, disable_licm=True):
                dk0, dk1, dv0, dv1 = _dkv_step(
                    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_head, g_head, lse_head, delta_head,
                    stride_qt, stride_qh, stride_gt, stride_gh, HQ, first_row, S, T, key,
                    scale_log2, G, DK, D0, D1, DV, V0, V1, WINDOW, False, BLOCK_M, UPCAST,
                    PRECISION,
                )  # fmt: skip

        first_out = (batch * keys + k_start) * tl.num_programs(1) + kv_head
        stride_out = tl.num_programs(1)
        dk_rows = token_rows(dk + first_out * DK, first_key, stride_out * DK, BLOCK_N)
        dv_rows = token_rows(dv + first_out * DV, first_key, stride_out * DV, BLOCK_N)
        store_split(dk_rows, valid, dk0 * scale, dk1 * scale, DK, D0, D1)
        store_split(dv_rows, valid, dv0, dv1, DV, V0, V1)
