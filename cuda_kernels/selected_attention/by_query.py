"""Selected attention with tiles of adjacent queries: forward and dq.

A tile is QUERIES adjacent tokens x G heads (G = 16: 4 tokens, 64 rows, one wgmma). It walks the
union of the blocks its tokens selected, each block with a bit per token that says who selected it.

Why the union, bytes and FLOPs per token and kv head (G = 16, n = 16, m = 64, 192/128, 2 bytes):
one token per program reads 16 blocks = 655 KB of K, V through L2 for 10.5 MFLOP x 2, and fills 16
rows of a tile whose instruction has 64; at 64K tokens and 4 kv heads that is 172 GB, 31 ms of L2.
The union of 4 tokens reads between 164 KB (all blocks shared) and 563 KB (only the three forced
ones shared: 3 + 4 * 13 blocks), and the rows of tokens that did not select a block ride along in
an instruction that is issued anyway. So the union is never slower than single tokens; QUERIES in
the plan is the knob, and QUERIES = 1 is query-outer with one token. Whether it is faster than
`by_block` depends on the overlap: see `union`.
"""

import triton
import triton.language as tl

from ..common import (
    LOG2E,
    dot,
    dot_split,
    load_base2_lse,
    load_split,
    narrow,
    softmax_result,
    softmax_step,
    store_split,
    token_group_rows,
    token_rows,
)
from .union import BY_QUERY, query_tile


@triton.jit
def _keys_of(
    entry, step, row_query, position, QUERIES: tl.constexpr, SELECT_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """First key of an entry's sub-tile, keys, keys inside the block, last key each row may see."""
    SUB: tl.constexpr = (SELECT_BLOCK + BLOCK_N - 1) // BLOCK_N
    offset = (step % SUB) * BLOCK_N
    start = (entry >> QUERIES) * SELECT_BLOCK + offset
    key = start + tl.arange(0, BLOCK_N)
    inside = offset + tl.arange(0, BLOCK_N) < SELECT_BLOCK
    member = (entry >> row_query) & 1
    limit = tl.where(member == 1, position, -1)
    return start, key, inside, limit


@triton.jit
def forward(
    q, k, v, o, lse, entries, counts, chosen, cu_q, cu_k, num_seqs, S, T, HQ,
    scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    G: tl.constexpr, DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    NUM_SELECTED: tl.constexpr, SELECT_BLOCK: tl.constexpr, PACKED: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, MEASURED: tl.constexpr,
):  # fmt: skip
    """Output and lse of QUERIES tokens x G heads, over the entries that `union_blocks` listed.

    Grid: (query tiles, Hkv, B). The next entry is loaded one step ahead: the addresses of a step's
    K and V hang on it.

    Args:
        q: [B, S, Hq, DK]; k: [B, T, Hkv, DK]; v: [B, T, Hkv, DV], last dim contiguous.
        o: [B, S, Hq, DV], contiguous; lse: float32 [B, S, Hq], contiguous.
        chosen: int32 [1], see `choose_strategy`; read where MEASURED.
        BLOCK_M: power of two >= QUERIES * G; the rows past that are idle.
    """
    if MEASURED:
        if tl.load(chosen) != BY_QUERY:
            return
    number = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    tokens = S
    q_start, S, k_start, T, first_token = query_tile(
        number, cu_q, cu_k, num_seqs, S, T, QUERIES, PACKED
    )
    if first_token < S:
        row_query = tl.arange(0, BLOCK_M) // G
        valid = (row_query < QUERIES) & (first_token + row_query < S)
        position = T - S + first_token + row_query
        head = kv_head * G
        q_head = q + batch * stride_qb + q_start * stride_qt + head * stride_qh
        k_head = k + batch * stride_kb + k_start * stride_kt + kv_head * stride_kh
        v_head = v + batch * stride_vb + k_start * stride_vt + kv_head * stride_vh
        q_rows = token_group_rows(q_head, first_token, stride_qt, stride_qh, G, BLOCK_M)
        q0, q1 = load_split(q_rows, valid, DK, D0, D1, True)

        SUB: tl.constexpr = (SELECT_BLOCK + BLOCK_N - 1) // BLOCK_N
        out = (batch * tl.num_programs(1) + kv_head) * tl.num_programs(0) + number
        entries += out * (QUERIES * NUM_SELECTED)
        steps = tl.load(counts + out) * SUB
        scale_log2 = scale * LOG2E
        maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
        acc1 = tl.zeros([BLOCK_M, V1 if V1 > 0 else V0], tl.float32)
        entry = tl.load(entries, mask=steps > 0, other=0)
        for step in range(0, steps):
            start, key, inside, limit = _keys_of(
                entry, step, row_query, position, QUERIES, SELECT_BLOCK, BLOCK_N
            )
            entry = tl.load(entries + (step + 1) // SUB, mask=step + 1 < steps, other=0)
            there = inside & (key < T)
            k_rows = token_rows(k_head, start, stride_kt, BLOCK_N)
            k0, k1 = load_split(k_rows, there, DK, D0, D1, True)
            logits = dot_split(q0, q1, k0, k1, D1, UPCAST, PRECISION) * scale_log2
            seen = key[None, :] <= limit[:, None]
            if SELECT_BLOCK % BLOCK_N != 0:
                seen = seen & inside[None, :]
            logits = tl.where(seen, logits, float("-inf"))
            p, factor, maximum, total = softmax_step(logits, maximum, total)
            v_rows = token_rows(v_head, start, stride_vt, BLOCK_N)
            v0, v1 = load_split(v_rows, there, DV, V0, V1, True)
            p = narrow(p, v0.dtype, UPCAST)
            acc0 = dot(p, v0, acc0 * factor[:, None], UPCAST, PRECISION)
            if V1 > 0:
                acc1 = dot(p, v1, acc1 * factor[:, None], UPCAST, PRECISION)

        inverse, row_lse = softmax_result(maximum, total)
        stat = (batch * tokens + q_start) * HQ + head
        o_rows = token_group_rows(o + stat * DV, first_token, HQ * DV, DV, G, BLOCK_M)
        store_split(o_rows, valid, acc0 * inverse[:, None], acc1 * inverse[:, None], DV, V0, V1)
        lse_rows = token_group_rows(lse + stat, first_token, HQ, 1, G, BLOCK_M)
        tl.store(lse_rows, row_lse, mask=valid)


@triton.jit
def backward_dq(
    q, k, v, grad_o, lse, delta, dq, entries, counts, chosen, cu_q, cu_k, num_seqs, S, T, HQ,
    scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_gb, stride_gt, stride_gh,
    G: tl.constexpr, DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    NUM_SELECTED: tl.constexpr, SELECT_BLOCK: tl.constexpr, PACKED: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, MEASURED: tl.constexpr,
):  # fmt: skip
    """dq of QUERIES tokens x G heads: the loop of `forward` over the same entries.

    Grid: (query tiles, Hkv, B).

    Args:
        grad_o: [B, S, Hq, DV], last dim contiguous; lse, delta: float32 [B, S, Hq], contiguous.
        dq: [B, S, Hq, DK], contiguous.
    """
    if MEASURED:
        if tl.load(chosen) != BY_QUERY:
            return
    number = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    tokens = S
    q_start, S, k_start, T, first_token = query_tile(
        number, cu_q, cu_k, num_seqs, S, T, QUERIES, PACKED
    )
    if first_token < S:
        row_query = tl.arange(0, BLOCK_M) // G
        valid = (row_query < QUERIES) & (first_token + row_query < S)
        position = T - S + first_token + row_query
        head = kv_head * G
        q_head = q + batch * stride_qb + q_start * stride_qt + head * stride_qh
        g_head = grad_o + batch * stride_gb + q_start * stride_gt + head * stride_gh
        k_head = k + batch * stride_kb + k_start * stride_kt + kv_head * stride_kh
        v_head = v + batch * stride_vb + k_start * stride_vt + kv_head * stride_vh
        q_rows = token_group_rows(q_head, first_token, stride_qt, stride_qh, G, BLOCK_M)
        g_rows = token_group_rows(g_head, first_token, stride_gt, stride_gh, G, BLOCK_M)
        q0, q1 = load_split(q_rows, valid, DK, D0, D1, True)
        g0, g1 = load_split(g_rows, valid, DV, V0, V1, True)
        stat = (batch * tokens + q_start) * HQ + head
        lse_rows = token_group_rows(lse + stat, first_token, HQ, 1, G, BLOCK_M)
        lse2 = load_base2_lse(lse_rows, valid)
        delta_rows = token_group_rows(delta + stat, first_token, HQ, 1, G, BLOCK_M)
        row_delta = tl.load(delta_rows, mask=valid, other=0.0)

        SUB: tl.constexpr = (SELECT_BLOCK + BLOCK_N - 1) // BLOCK_N
        out = (batch * tl.num_programs(1) + kv_head) * tl.num_programs(0) + number
        entries += out * (QUERIES * NUM_SELECTED)
        steps = tl.load(counts + out) * SUB
        scale_log2 = scale * LOG2E
        dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
        dq1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else D0], tl.float32)
        entry = tl.load(entries, mask=steps > 0, other=0)
        for step in range(0, steps):
            start, key, inside, limit = _keys_of(
                entry, step, row_query, position, QUERIES, SELECT_BLOCK, BLOCK_N
            )
            entry = tl.load(entries + (step + 1) // SUB, mask=step + 1 < steps, other=0)
            there = inside & (key < T)
            k_rows = token_rows(k_head, start, stride_kt, BLOCK_N)
            v_rows = token_rows(v_head, start, stride_vt, BLOCK_N)
            k0, k1 = load_split(k_rows, there, DK, D0, D1, True)
            v0, v1 = load_split(v_rows, there, DV, V0, V1, True)
            logits = dot_split(q0, q1, k0, k1, D1, UPCAST, PRECISION) * scale_log2
            seen = key[None, :] <= limit[:, None]
            if SELECT_BLOCK % BLOCK_N != 0:
                seen = seen & inside[None, :]
            p = tl.math.exp2(tl.where(seen, logits, float("-inf")) - lse2[:, None])
            dp = dot_split(g0, g1, v0, v1, V1, UPCAST, PRECISION)
            ds = narrow(p * (dp - row_delta[:, None]), k0.dtype, UPCAST)
            dq0 = dot(ds, k0, dq0, UPCAST, PRECISION)
            if D1 > 0:
                dq1 = dot(ds, k1, dq1, UPCAST, PRECISION)
        dq_rows = token_group_rows(dq + stat * DK, first_token, HQ * DK, DK, G, BLOCK_M)
        store_split(dq_rows, valid, dq0 * scale, dq1 * scale, DK, D0, D1)
