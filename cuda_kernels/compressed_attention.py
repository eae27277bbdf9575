"""Attention over compressed blocks: forward and backward.

Block i covers tokens [i * STRIDE, i * STRIDE + BLOCK) and is visible to the query at position t iff
its last token is at most t. Hence the query sees the first `visible_blocks(t)` blocks: a staircase
instead of a diagonal.

Bound by matrix products: 2 * (Dk + Dv) FLOP per visible (query, block) pair and head forward. The
compressed keys and values are 1 / STRIDE of the raw ones and stay in the L2 cache (2.6 MB per kv
head at 64K tokens), so bytes do not matter.

Design: a query tile holds (token, head) pairs of one group, as in `attention`. Backward is two
kernels: dq with a query tile outside and dk, dv with a key tile outside, seven products where a
fused form has five but needs atomics for dq. There are few key tiles (32 to 64 per kv head at 64K
tokens), the first of which sees every query; so the queries of a tile are cut in SPLITS parts,
whose float32 sums `reduce_splits` adds in a fixed order: SPLITS * Nc * Hkv * (Dk + Dv) * 4 bytes,
84 MB at 64K tokens with 64/4/192/128 and 4 splits, 0.04 ms to write and read back.
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
def visible_blocks(position, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """How many compressed blocks the query at `position` sees."""
    return tl.maximum(position + 1 - BLOCK + STRIDE, 0) // STRIDE


@triton.jit
def count_compressed(
    cu_k, cu_cmp, num_seqs, BLOCK: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Where each sequence's compressed blocks begin, back to back: cu_cmp. Grid: (1,).

    Args:
        cu_k, cu_cmp: int32 [num_seqs + 1], offsets of raw keys and of compressed blocks.
    """
    before = 0
    for start in range(0, num_seqs, TILE):
        index = start + tl.arange(0, TILE)
        inside = index < num_seqs
        first = tl.load(cu_k + index, mask=inside, other=0)
        last = tl.load(cu_k + index + 1, mask=inside, other=0) - first - 1
        count = tl.where(inside, visible_blocks(last, BLOCK, STRIDE), 0)
        tl.store(cu_cmp + index, before + tl.cumsum(count, 0) - count, mask=inside)
        before += tl.sum(count, 0)
    tl.store(cu_cmp + num_seqs, before)


@triton.jit
def sequence_bounds(sequence, cu_q, cu_k, cu_cmp, S, T, NC, PACKED: tl.constexpr):
    """Query start, queries, keys, first compressed block and compressed blocks of a sequence."""
    q_start = 0
    cmp_start = 0
    if PACKED:
        q_start = tl.load(cu_q + sequence)
        cmp_start = tl.load(cu_cmp + sequence)
        S = tl.load(cu_q + sequence + 1) - q_start
        T = tl.load(cu_k + sequence + 1) - tl.load(cu_k + sequence)
        NC = tl.load(cu_cmp + sequence + 1) - cmp_start
    return q_start, S, T, cmp_start, NC


@triton.jit
def _row_limits(first_row, S, T, G: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
                BLOCK_M: tl.constexpr):  # fmt: skip
    """Visible blocks of every row of a tile, of its first row and of its last valid row."""
    row = first_row + tl.arange(0, BLOCK_M)
    limit = visible_blocks(T - S + row // G, BLOCK, STRIDE)
    limit = tl.where(row < S * G, limit, 0)
    least = visible_blocks(T - S + first_row // G, BLOCK, STRIDE)
    last_token = tl.minimum((first_row + BLOCK_M - 1) // G, S - 1)
    return limit, least, visible_blocks(T - S + last_token, BLOCK, STRIDE)


@triton.jit
def _attend(
    acc0, acc1, maximum, total, q0, q1, k_head, v_head, stride_kt, stride_vt, start, limit, end,
    scale_log2,
    DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    MASK: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the blocks [start, start + BLOCK_N) to the running softmax of a query tile."""
    key = start + tl.arange(0, BLOCK_N)
    k_rows = token_rows(k_head, start, stride_kt, BLOCK_N)
    k0, k1 = load_split(k_rows, key < end, DK, D0, D1, MASK)
    logits = dot_split(q0, q1, k0, k1, D1, UPCAST, PRECISION) * scale_log2
    if MASK:
        logits = tl.where(key[None, :] < limit[:, None], logits, float("-inf"))
    p, factor, maximum, total = softmax_step(logits, maximum, total)
    v_rows = token_rows(v_head, start, stride_vt, BLOCK_N)
    v0, v1 = load_split(v_rows, key < end, DV, V0, V1, MASK)
    p = narrow(p, v0.dtype, UPCAST)
    acc0 = dot(p, v0, acc0 * factor[:, None], UPCAST, PRECISION)
    if V1 > 0:
        acc1 = dot(p, v1, acc1 * factor[:, None], UPCAST, PRECISION)
    return acc0, acc1, maximum, total


@triton.jit
def forward(
    q, k_cmp, v_cmp, o, lse, cu_q, cu_k, cu_cmp, num_seqs, S, T, HQ, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    G: tl.constexpr, DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compressed attention's output and lse of BLOCK_M (token, head) rows of one group.

    Grid: (row tiles, Hkv, B), the rows with the most blocks first.

    Args:
        q: [B, S, Hq, DK]; k_cmp: [B, Nc, Hkv, DK]; v_cmp: [B, Nc, Hkv, DV], last dim contiguous.
        o: [B, S, Hq, DV], contiguous; lse: float32 [B, S, Hq], contiguous.
        cu_q, cu_k, cu_cmp: int32 [num_seqs + 1], offsets of queries, raw keys and compressed
            blocks, read when PACKED.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    tokens = S
    sequence = 0
    if PACKED:
        sequence, tile = packed_tile(tile, cu_q, num_seqs, G, BLOCK_M)
    q_start, S, T, cmp_start, _ = sequence_bounds(sequence, cu_q, cu_k, cu_cmp, S, T, 0, PACKED)
    first_row = tile * BLOCK_M
    if first_row < S * G:
        valid = first_row + tl.arange(0, BLOCK_M) < S * G
        limit, least, end = _row_limits(first_row, S, T, G, BLOCK, STRIDE, BLOCK_M)
        head = kv_head * G
        first_token = batch * tokens + q_start
        q_head = q + batch * stride_qb + q_start.to(tl.int64) * stride_qt + head * stride_qh
        k_head = k_cmp + batch * stride_kb + cmp_start.to(tl.int64) * stride_kt
        v_head = v_cmp + batch * stride_vb + cmp_start.to(tl.int64) * stride_vt
        k_head += kv_head * stride_kh
        v_head += kv_head * stride_vh
        q_rows = group_rows(q_head, first_row, stride_qt, stride_qh, G, BLOCK_M)
        q0, q1 = load_split(q_rows, valid, DK, D0, D1, True)

        scale_log2 = scale * LOG2E
        maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
        acc1 = tl.zeros([BLOCK_M, V1 if V1 > 0 else V0], tl.float32)
        edge = least // BLOCK_N * BLOCK_N
        for start in range(0, edge, BLOCK_N):
            acc0, acc1, maximum, total = _attend(
                acc0, acc1, maximum, total, q0, q1, k_head, v_head, stride_kt, stride_vt,
                start, limit, end, scale_log2, DK, D0, D1, DV, V0, V1, False, BLOCK_N,
                UPCAST, PRECISION,
            )  # fmt: skip
        for start in range(edge, end, BLOCK_N):
            acc0, acc1, maximum, total = _attend(
                acc0, acc1, maximum, total, q0, q1, k_head, v_head, stride_kt, stride_vt,
                start, limit, end, scale_log2, DK, D0, D1, DV, V0, V1, True, BLOCK_N,
                UPCAST, PRECISION,
            )  # fmt: skip

        inverse, row_lse = softmax_result(maximum, total)
        o_head = o + (first_token * HQ + head) * DV
        o_rows = group_rows(o_head, first_row, HQ * DV, DV, G, BLOCK_M)
        store_split(o_rows, valid, acc0 * inverse[:, None], acc1 * inverse[:, None], DV, V0, V1)
        lse_rows = group_rows(lse + first_token * HQ + head, first_row, HQ, 1, G, BLOCK_M)
        tl.store(lse_rows, row_lse, mask=valid)


@triton.jit
def _add_dq(
    acc0, acc1, q0, q1, g0, g1, lse2, delta, k_head, v_head, stride_kt, stride_vt, start, limit,
    end, scale_log2,
    DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    MASK: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the blocks [start, start + BLOCK_N) to a query tile's unscaled gradient."""
    key = start + tl.arange(0, BLOCK_N)
    k_rows = token_rows(k_head, start, stride_kt, BLOCK_N)
    v_rows = token_rows(v_head, start, stride_vt, BLOCK_N)
    k0, k1 = load_split(k_rows, key < end, DK, D0, D1, MASK)
    v0, v1 = load_split(v_rows, key < end, DV, V0, V1, MASK)
    logits = dot_split(q0, q1, k0, k1, D1, UPCAST, PRECISION) * scale_log2
    p = tl.math.exp2(logits - lse2[:, None])
    if MASK:
        p = tl.where(key[None, :] < limit[:, None], p, 0.0)
    dp = dot_split(g0, g1, v0, v1, V1, UPCAST, PRECISION)
    ds = narrow(p * (dp - delta[:, None]), k0.dtype, UPCAST)
    acc0 = dot(ds, k0, acc0, UPCAST, PRECISION)
    if D1 > 0:
        acc1 = dot(ds, k1, acc1, UPCAST, PRECISION)
    return acc0, acc1


@triton.jit
def backward_dq(
    q, k_cmp, v_cmp, grad_o, lse, delta, dq, cu_q, cu_k, cu_cmp, num_seqs, S, T, HQ, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_gb, stride_gt, stride_gh,
    G: tl.constexpr, DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_M (token, head) rows of q. Grid and arguments as in `forward`.

    Args:
        grad_o: [B, S, Hq, DV], last dim contiguous; lse, delta: float32 [B, S, Hq], contiguous.
        dq: [B, S, Hq, DK], contiguous.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    tokens = S
    sequence = 0
    if PACKED:
        sequence, tile = packed_tile(tile, cu_q, num_seqs, G, BLOCK_M)
    q_start, S, T, cmp_start, _ = sequence_bounds(sequence, cu_q, cu_k, cu_cmp, S, T, 0, PACKED)
    first_row = tile * BLOCK_M
    if first_row < S * G:
        valid = first_row + tl.arange(0, BLOCK_M) < S * G
        limit, least, end = _row_limits(first_row, S, T, G, BLOCK, STRIDE, BLOCK_M)
        head = kv_head * G
        first_token = batch * tokens + q_start
        q_head = q + batch * stride_qb + q_start.to(tl.int64) * stride_qt + head * stride_qh
        g_head = grad_o + batch * stride_gb + q_start.to(tl.int64) * stride_gt + head * stride_gh
        k_head = k_cmp + batch * stride_kb + cmp_start.to(tl.int64) * stride_kt
        v_head = v_cmp + batch * stride_vb + cmp_start.to(tl.int64) * stride_vt
        k_head += kv_head * stride_kh
        v_head += kv_head * stride_vh
        q_rows = group_rows(q_head, first_row, stride_qt, stride_qh, G, BLOCK_M)
        q0, q1 = load_split(q_rows, valid, DK, D0, D1, True)
        g_rows = group_rows(g_head, first_row, stride_gt, stride_gh, G, BLOCK_M)
        g0, g1 = load_split(g_rows, valid, DV, V0, V1, True)
        row_offset = first_token * HQ + head
        lse2 = load_base2_lse(group_rows(lse + row_offset, first_row, HQ, 1, G, BLOCK_M), valid)
        d_rows = group_rows(delta + row_offset, first_row, HQ, 1, G, BLOCK_M)
        row_delta = tl.load(d_rows, mask=valid, other=0.0)

        scale_log2 = scale * LOG2E
        acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
        acc1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else D0], tl.float32)
        edge = least // BLOCK_N * BLOCK_N
        for start in range(0, edge, BLOCK_N):
            acc0, acc1 = _add_dq(
                acc0, acc1, q0, q1, g0, g1, lse2, row_delta, k_head, v_head, stride_kt, stride_vt,
                start, limit, end, scale_log2, DK, D0, D1, DV, V0, V1, False, BLOCK_N,
                UPCAST, PRECISION,
            )  # fmt: skip
        for start in range(edge, end, BLOCK_N):
            acc0, acc1 = _add_dq(
                acc0, acc1, q0, q1, g0, g1, lse2, row_delta, k_head, v_head, stride_kt, stride_vt,
                start, limit, end, scale_log2, DK, D0, D1, DV, V0, V1, True, BLOCK_N,
                UPCAST, PRECISION,
            )  # fmt: skip
        dq_rows = group_rows(dq + row_offset * DK, first_row, HQ * DK, DK, G, BLOCK_M)
        store_split(dq_rows, valid, acc0 * scale, acc1 * scale, DK, D0, D1)


@triton.jit
def _add_dkv(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_head, g_head, lse_head, delta_head,
    stride_qt, stride_qh, stride_gt, stride_gh, HQ, key, first_row, S, T, scale_log2,
    G: tl.constexpr, DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, MASK: tl.constexpr, BLOCK_M: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds BLOCK_M (token, head) rows to a key tile's gradients; logits are [keys, rows]."""
    row = first_row + tl.arange(0, BLOCK_M)
    valid = row < S * G
    q_rows = group_rows(q_head, first_row, stride_qt, stride_qh, G, BLOCK_M)
    g_rows = group_rows(g_head, first_row, stride_gt, stride_gh, G, BLOCK_M)
    q0, q1 = load_split(q_rows, valid, DK, D0, D1, MASK)
    g0, g1 = load_split(g_rows, valid, DV, V0, V1, MASK)
    lse2 = load_base2_lse(group_rows(lse_head, first_row, HQ, 1, G, BLOCK_M), valid)
    d_rows = group_rows(delta_head, first_row, HQ, 1, G, BLOCK_M)
    delta = tl.load(d_rows, mask=valid, other=0.0)
    logits = dot_split(k0, k1, q0, q1, D1, UPCAST, PRECISION) * scale_log2
    p = tl.math.exp2(logits - lse2[None, :])
    if MASK:
        # Token row // G sees a block from the row of the block's last token on: a bound per block,
        # of which a thread holds two, where a limit per row would be eight registers more.
        bound = (key * STRIDE + BLOCK - 1 - (T - S)) * G - first_row
        inside = tl.arange(0, BLOCK_M)[None, :]
        p = tl.where((inside >= bound[:, None]) & (inside < S * G - first_row), p, 0.0)
    p_low = narrow(p, g0.dtype, UPCAST)
    dv0 = dot(p_low, g0, dv0, UPCAST, PRECISION)
    if V1 > 0:
        dv1 = dot(p_low, g1, dv1, UPCAST, PRECISION)
    dp = dot_split(v0, v1, g0, g1, V1, UPCAST, PRECISION)
    ds = narrow(p * (dp - delta[None, :]), q0.dtype, UPCAST)
    dk0 = dot(ds, q0, dk0, UPCAST, PRECISION)
    if D1 > 0:
        dk1 = dot(ds, q1, dk1, UPCAST, PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit
def backward_dkv(
    q, k_cmp, v_cmp, grad_o, lse, delta, dk, dv, cu_q, cu_k, cu_cmp, num_seqs, S, T, NC, HQ, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_gb, stride_gt, stride_gh,
    G: tl.constexpr, DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, PACKED: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N compressed keys and values over 1 / SPLITS of the rows that see them.

    Grid: (key tiles * SPLITS, Hkv, B), the tiles with the most queries first.

    Args:
        grad_o: [B, S, Hq, DV], last dim contiguous; lse, delta: float32 [B, S, Hq], contiguous.
        dk: [SPLITS, B, Nc, Hkv, DK] and dv: [SPLITS, B, Nc, Hkv, DV], contiguous.
    """
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    tokens = S
    blocks = NC
    sequence = 0
    if PACKED:
        sequence, tile = packed_tile(tile, cu_cmp, num_seqs, 1, BLOCK_N)
    q_start, S, T, cmp_start, NC = sequence_bounds(sequence, cu_q, cu_k, cu_cmp, S, T, NC, PACKED)
    first_key = tile * BLOCK_N
    if first_key < NC:
        key = first_key + tl.arange(0, BLOCK_N)
        HKV = HQ // G
        head = kv_head * G
        q_head = q + batch * stride_qb + q_start.to(tl.int64) * stride_qt + head * stride_qh
        g_head = grad_o + batch * stride_gb + q_start.to(tl.int64) * stride_gt + head * stride_gh
        k_head = k_cmp + batch * stride_kb + cmp_start.to(tl.int64) * stride_kt
        v_head = v_cmp + batch * stride_vb + cmp_start.to(tl.int64) * stride_vt
        k_head += kv_head * stride_kh
        v_head += kv_head * stride_vh
        k0, k1 = load_split(
            token_rows(k_head, first_key, stride_kt, BLOCK_N), key < NC, DK, D0, D1, True
        )
        v0, v1 = load_split(
            token_rows(v_head, first_key, stride_vt, BLOCK_N), key < NC, DV, V0, V1, True
        )
        row_offset = (batch * tokens + q_start) * HQ + head

        first_seen = tl.maximum(first_key * STRIDE + BLOCK - 1 - (T - S), 0)
        last_key = tl.minimum(first_key + BLOCK_N, NC) - 1
        all_seen = tl.maximum(last_key * STRIDE + BLOCK - 1 - (T - S), 0)
        first_tile = first_seen * G // BLOCK_M
        tiles = tl.cdiv(S * G, BLOCK_M)
        share = tl.cdiv(tl.maximum(tiles - first_tile, 0), SPLITS)
        begin = first_tile + split * share
        end = tl.minimum(begin + share, tiles)
        # Tiles [begin, edge) lie on the staircase, [edge, whole) see every block, [whole, end) is
        # at most one tile with fewer than BLOCK_M rows.
        whole = tl.minimum(S * G // BLOCK_M, end)
        edge = tl.minimum(tl.maximum(tl.cdiv(all_seen * G, BLOCK_M), begin), end)
        whole = tl.maximum(whole, edge)

        scale_log2 = scale * LOG2E
        dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
        dk1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else D0], tl.float32)
        dv0 = tl.zeros([BLOCK_N, V0], tl.float32)
        dv1 = tl.zeros([BLOCK_N, V1 if V1 > 0 else V0], tl.float32)
        for index in range(edge, whole):
            dk0, dk1, dv0, dv1 = _add_dkv(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_head, g_head, lse + row_offset,
                delta + row_offset, stride_qt, stride_qh, stride_gt, stride_gh, HQ, key,
                index * BLOCK_M, S, T, scale_log2, G, DK, D0, D1, DV, V0, V1, BLOCK, STRIDE,
                False, BLOCK_M, UPCAST, PRECISION,
            )  # fmt: skip
        for step in range(begin, end - (whole - edge)):
            index = step + tl.where(step < edge, 0, whole - edge)
            dk0, dk1, dv0, dv1 = _add_dkv(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_head, g_head, lse + row_offset,
                delta + row_offset, stride_qt, stride_qh, stride_gt, stride_gh, HQ, key,
                index * BLOCK_M, S, T, scale_log2, G, DK, D0, D1, DV, V0, V1, BLOCK, STRIDE,
                True, BLOCK_M, UPCAST, PRECISION,
            )  # fmt: skip

        out_start = (split * tl.num_programs(2) + batch) * blocks + cmp_start
        dk_head = dk + (out_start * HKV + kv_head) * DK
        dv_head = dv + (out_start * HKV + kv_head) * DV
        dk_rows = token_rows(dk_head, first_key, HKV * DK, BLOCK_N)
        dv_rows = token_rows(dv_head, first_key, HKV * DV, BLOCK_N)
        store_split(dk_rows, key < NC, dk0 * scale, dk1 * scale, DK, D0, D1)
        store_split(dv_rows, key < NC, dv0, dv1, DV, V0, V1)


@triton.jit
def reduce_splits(partial, total, elements, SPLITS: tl.constexpr, BLOCK_E: tl.constexpr):
    """`total[e] = sum over splits, in order, of partial[split, e]`, rounded to total's dtype.

    Bytes bound. Grid: (elements / BLOCK_E,). partial: float32 [SPLITS, elements].
    """
    element = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    valid = element < elements
    acc = tl.zeros([BLOCK_E], tl.float32)
    for split in tl.static_range(SPLITS):
        at = split * tl.cast(elements, tl.int64) + element
        acc += tl.load(partial + at, mask=valid, other=0.0)
    tl.store(total + element, acc.to(total.dtype.element_ty), mask=valid)
