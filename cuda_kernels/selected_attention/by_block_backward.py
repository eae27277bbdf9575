"""Backward of selected attention with tiles of keys: dk and dv for all groups, dq for small ones.

Work items as in `by_block`. Hot blocks: every query selects block 0, while the mean list has n * m
entries. A list longer than CHUNK becomes several items; their dk, dv go to a float32 workspace and
`reduce_dkv` adds them up in order. A block with one item writes its dk, dv itself. No atomics, and
the same sum in every run; nothing of size G is written.

dq by block writes a partial dq per (query, slot, head) and adds the slots up; see `union` for where
that wins.
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
    packed_tile,
    store_split,
    token_rows,
)
from .by_block import listed
from .lists import items_of, items_of_block, lane_of, work_item
from .union import BY_BLOCK


@triton.jit
def backward_dkv(
    q, k, v, grad_o, lse, delta, dk, dv, workspace, queries, items, lane_width, lane_slots,
    cu_q, cu_k, num_seqs, S, T, blocks_per_head, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_gb, stride_gt, stride_gh,
    G: tl.constexpr, DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    NUM_SELECTED: tl.constexpr, SELECT_BLOCK: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one block from one item's queries, all G heads of them.

    Grid: (bound of items x tiles of BLOCK_N keys in a block, Hkv, B). Transposed logits
    [BLOCK_N, BLOCK_M], so that p and ds are left operands as they are.

    Args:
        queries, items, lane_width: as `forward_by_block`, of a single part.
        dk: [B, T, Hkv, DK]; dv: [B, T, Hkv, DV], contiguous.
        workspace: float32 [B, Hkv, lane_slots, SELECT_BLOCK, DK + DV]; blocks of a single item
            have no slot in it.
        lse, delta: float32 [B, S, Hq], contiguous.
    """
    SUB: tl.constexpr = (SELECT_BLOCK + BLOCK_N - 1) // BLOCK_N
    item = tl.program_id(0) // SUB
    inside = tl.program_id(0) % SUB * BLOCK_N
    KV_HEADS = tl.num_programs(1)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    if item < items_of(items, batch, lane_width, 0, blocks_per_head):
        tokens = S
        keys = T
        number, begin, count, q_start, S, k_start, T, first_key = work_item(
            items, item, batch, lane_width, 0, cu_q, cu_k, num_seqs, S, T, blocks_per_head,
            SELECT_BLOCK, CHUNK, NUM_SELECTED, PACKED,
        )  # fmt: skip
        offset = inside + tl.arange(0, BLOCK_N)
        key = first_key + offset
        there = (offset < SELECT_BLOCK) & (key < T)
        first_key += inside
        k_head = k + batch * stride_kb + k_start * stride_kt + kv_head * stride_kh
        v_head = v + batch * stride_vb + k_start * stride_vt + kv_head * stride_vh
        k_rows = token_rows(k_head, first_key, stride_kt, BLOCK_N)
        v_rows = token_rows(v_head, first_key, stride_vt, BLOCK_N)
        k0, k1 = load_split(k_rows, there, DK, D0, D1, True)
        v0, v1 = load_split(v_rows, there, DV, V0, V1, True)
        q_head = q + batch * stride_qb + kv_head * G * stride_qh
        g_head = grad_o + batch * stride_gb + kv_head * G * stride_gh
        stat = batch * tokens * KV_HEADS * G + kv_head * G
        scale_log2 = scale * LOG2E
        # Where the results go: the less is alive over the loop, the more registers it has.
        first_item, of_block, slot = items_of_block(
            items, number, batch, lane_width, blocks_per_head
        )
        alone = of_block == 1
        slot += item - first_item
        out = (lane_of(batch, KV_HEADS) * lane_slots + slot) * SELECT_BLOCK + inside
        first_out = (batch * keys + k_start + first_key) * KV_HEADS + kv_head
        out = tl.where(alone, first_out, out)
        # In the numbering of `queries`, so that the loop holds no offset between the two.
        last_seen_by = key - (T - S - q_start).to(tl.int32)
        rows = count * G
        dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
        dk1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else D0], tl.float32)
        dv0 = tl.zeros([BLOCK_N, V0], tl.float32)
        dv1 = tl.zeros([BLOCK_N, V1 if V1 > 0 else V0], tl.float32)
        # What the rows need would be hoisted over this loop and spilled there.
        next_query = listed(queries + begin, 0, rows, G, BLOCK_M)
        for first_row in tl.range(0, rows, BLOCK_M, disable_licm=True):
            row = first_row + tl.arange(0, BLOCK_M)
            valid = row < rows
            query = next_query
            next_query = listed(queries + begin, first_row + BLOCK_M, rows, G, BLOCK_M)
            token = query.to(tl.int64)
            q_rows = q_head + token * stride_qt + (row % G) * stride_qh
            g_rows = g_head + token * stride_gt + (row % G) * stride_gh
            stats = stat + token * (KV_HEADS * G) + row % G
            q0, q1 = load_split(q_rows, valid, DK, D0, D1, True)
            g0, g1 = load_split(g_rows, valid, DV, V0, V1, True)
            lse2 = load_base2_lse(lse + stats, valid)
            row_delta = tl.load(delta + stats, mask=valid, other=0.0)
            logits = dot_split(k0, k1, q0, q1, D1, UPCAST, PRECISION) * scale_log2
            seen = last_seen_by[:, None] <= query[None, :]
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

        if alone:
            dk_rows = token_rows(dk + out * DK, 0, KV_HEADS * DK, BLOCK_N)
            dv_rows = token_rows(dv + out * DV, 0, KV_HEADS * DV, BLOCK_N)
            store_split(dk_rows, there, dk0 * scale, dk1 * scale, DK, D0, D1)
            store_split(dv_rows, there, dv0, dv1, DV, V0, V1)
        else:
            out_rows = token_rows(workspace + out * (DK + DV), 0, DK + DV, BLOCK_N)
            store_split(out_rows, there, dk0 * scale, dk1 * scale, DK, D0, D1)
            store_split(out_rows + DK, there, dv0, dv1, DV, V0, V1)


@triton.jit
def reduce_dkv(
    workspace, dk, dv, items, lane_width, lane_slots, cu_k, num_seqs, T, blocks_per_head,
    DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    SELECT_BLOCK: tl.constexpr, PACKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds up the items of each block in order; zeros for the blocks that nobody selected.

    Grid: (blocks_per_head x tiles of BLOCK_N keys in a block, Hkv, B). Arguments as `backward_dkv`.
    """
    SUB: tl.constexpr = (SELECT_BLOCK + BLOCK_N - 1) // BLOCK_N
    number = tl.program_id(0) // SUB
    inside = tl.program_id(0) % SUB * BLOCK_N
    KV_HEADS = tl.num_programs(1)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    _, of_block, slot = items_of_block(items, number, batch, lane_width, blocks_per_head)
    if of_block != 1:
        block = number
        k_start = tl.full([], 0, tl.int64)
        keys = T
        if PACKED:
            sequence, block = packed_tile(block, cu_k, num_seqs, 1, SELECT_BLOCK)
            k_start = tl.load(cu_k + sequence).to(tl.int64)
            T = (tl.load(cu_k + sequence + 1) - k_start).to(tl.int32)
        offset = inside + tl.arange(0, BLOCK_N)
        first_key = block * SELECT_BLOCK + inside
        there = (offset < SELECT_BLOCK) & (block * SELECT_BLOCK + offset < T)
        first_slot = lane_of(batch, KV_HEADS) * lane_slots + slot
        dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
        dk1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else D0], tl.float32)
        dv0 = tl.zeros([BLOCK_N, V0], tl.float32)
        dv1 = tl.zeros([BLOCK_N, V1 if V1 > 0 else V0], tl.float32)
        for index in range(0, of_block):
            rows = workspace + ((first_slot + index) * SELECT_BLOCK + offset) * (DK + DV)
            k0, k1 = load_split(rows, there, DK, D0, D1, True)
            v0, v1 = load_split(rows + DK, there, DV, V0, V1, True)
            dk0 += k0
            dv0 += v0
            if D1 > 0:
                dk1 += k1
            if V1 > 0:
                dv1 += v1
        first_out = (batch * keys + k_start) * KV_HEADS + kv_head
        dk_rows = token_rows(dk + first_out * DK, first_key, KV_HEADS * DK, BLOCK_N)
        dv_rows = token_rows(dv + first_out * DV, first_key, KV_HEADS * DV, BLOCK_N)
        store_split(dk_rows, there, dk0, dk1, DK, D0, D1)
        store_split(dv_rows, there, dv0, dv1, DV, V0, V1)


@triton.jit
def backward_dq_by_block(
    q, k, v, grad_o, lse, delta, partial_dq, chosen, queries, slots, items, first_token,
    lane_width, part_offset, cu_q, cu_k, num_seqs, S, T, blocks_per_head, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_gb, stride_gt, stride_gh,
    G: tl.constexpr, DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    NUM_SELECTED: tl.constexpr, SELECT_BLOCK: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, MEASURED: tl.constexpr,
):  # fmt: skip
    """What one block gives to dq of each query on its list.

    Grid as `forward_by_block`; BLOCK_N is a power of two >= SELECT_BLOCK. Arguments as there and
    `backward_dkv`; partial_dq: float32 [pairs of the pass, G, DK].
    """
    if MEASURED:
        if tl.load(chosen) != BY_BLOCK:
            return
    item = tl.program_id(0)
    KV_HEADS = tl.num_programs(1)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = first_token // S + tl.program_id(2).to(tl.int64)
    if item < items_of(items, batch, lane_width, part_offset, blocks_per_head):
        tokens = S
        _, begin, count, q_start, S, k_start, T, first_key = work_item(
            items, item, batch, lane_width, part_offset, cu_q, cu_k, num_seqs, S, T,
            blocks_per_head, SELECT_BLOCK, CHUNK, NUM_SELECTED, PACKED,
        )  # fmt: skip
        offset = tl.arange(0, BLOCK_N)
        key = first_key + offset
        there = (offset < SELECT_BLOCK) & (key < T)
        k_head = k + batch * stride_kb + k_start * stride_kt + kv_head * stride_kh
        v_head = v + batch * stride_vb + k_start * stride_vt + kv_head * stride_vh
        k_rows = token_rows(k_head, first_key, stride_kt, BLOCK_N)
        v_rows = token_rows(v_head, first_key, stride_vt, BLOCK_N)
        k0, k1 = load_split(k_rows, there, DK, D0, D1, True)
        v0, v1 = load_split(v_rows, there, DV, V0, V1, True)
        q_head = q + batch * stride_qb + kv_head * G * stride_qh
        g_head = grad_o + batch * stride_gb + kv_head * G * stride_gh
        stat = batch * tokens * KV_HEADS * G + kv_head * G
        scale_log2 = scale * LOG2E
        past = (T - S - q_start).to(tl.int32)
        rows = count * G
        group = (batch * tokens - first_token) * KV_HEADS + kv_head
        # As in `backward_dkv`.
        next_query = listed(queries + begin, 0, rows, G, BLOCK_M)
        next_slot = listed(slots + begin, 0, rows, G, BLOCK_M)
        for first_row in tl.range(0, rows, BLOCK_M, disable_licm=True):
            row = first_row + tl.arange(0, BLOCK_M)
            valid = row < rows
            query = next_query
            slot = next_slot
            next_query = listed(queries + begin, first_row + BLOCK_M, rows, G, BLOCK_M)
            next_slot = listed(slots + begin, first_row + BLOCK_M, rows, G, BLOCK_M)
            token = query.to(tl.int64)
            q_rows = q_head + token * stride_qt + (row % G) * stride_qh
            g_rows = g_head + token * stride_gt + (row % G) * stride_gh
            stats = stat + token * (KV_HEADS * G) + row % G
            q0, q1 = load_split(q_rows, valid, DK, D0, D1, True)
            g0, g1 = load_split(g_rows, valid, DV, V0, V1, True)
            lse2 = load_base2_lse(lse + stats, valid)
            row_delta = tl.load(delta + stats, mask=valid, other=0.0)
            logits = dot_split(q0, q1, k0, k1, D1, UPCAST, PRECISION) * scale_log2
            seen = there[None, :] & (key[None, :] <= (past + query)[:, None])
            p = tl.math.exp2(tl.where(seen, logits, float("-inf")) - lse2[:, None])
            dp = dot_split(g0, g1, v0, v1, V1, UPCAST, PRECISION)
            ds = narrow(p * (dp - row_delta[:, None]), k0.dtype, UPCAST)
            dq0 = dot(ds, k0, tl.zeros([BLOCK_M, D0], tl.float32), UPCAST, PRECISION)
            dq1 = dq0
            if D1 > 0:
                dq1 = dot(ds, k1, tl.zeros([BLOCK_M, D1], tl.float32), UPCAST, PRECISION)
            pair = (group + token * KV_HEADS) * NUM_SELECTED + slot
            out = partial_dq + (pair * G + row % G) * DK
            store_split(out, valid, dq0 * scale, dq1 * scale, DK, D0, D1)


@triton.jit
def sum_dq(
    partial_dq, used_slots, dq, chosen, first_token, num_rows, HQ,
    G: tl.constexpr, DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    NUM_SELECTED: tl.constexpr, BLOCK_M: tl.constexpr, MEASURED: tl.constexpr,
):  # fmt: skip
    """Adds up the partial dq of a query's blocks in float32, in the order of its slots.

    Grid as `combine`. Args: partial_dq, chosen: as `backward_dq_by_block`; others as `combine`;
    dq: [B, S, Hq, DK].
    """
    if MEASURED:
        if tl.load(chosen) != BY_BLOCK:
            return
    passed = tl.cast(first_token, tl.int64) * HQ
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = row < num_rows
        dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
        dq1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else D0], tl.float32)
        for slot in range(0, NUM_SELECTED):
            entry = (row // G) * NUM_SELECTED + slot
            at = used_slots + (passed // G * NUM_SELECTED + entry)
            there = valid & (tl.load(at, mask=valid, other=0) != 0)
            rows = partial_dq + (entry * G + row % G) * DK
            part0, part1 = load_split(rows, there, DK, D0, D1, True)
            dq0 += part0.to(tl.float32)
            if D1 > 0:
                dq1 += part1.to(tl.float32)
        store_split(dq + (passed + row) * DK, valid, dq0, dq1, DK, D0, D1)
