"""Selected attention with tiles of keys, forward: for small groups, or where neighbours disagree.

A work item is a block of keys (of one kv head) and at most CHUNK of the queries that selected it,
from a list sorted by block and then by query (CSR). Its K and V stay on chip while the rows of its
queries (list order x G heads, gathered) pass by.

Forward bytes per (query, slot, head): Dk * 2 of q in, Dv * 2 of partial output out and in again, so
at 64K tokens, 64 heads, 16 slots, 192/128: 25.8 + 34.4 GB, about 14 ms. It grows with Hq whatever
G is, while `by_query` reads K, V per kv head; see `union` for where which one wins.
"""

import triton
import triton.language as tl

from ..common import (
    LN2,
    LOG2E,
    dot,
    dot_split,
    load_split,
    narrow,
    store_split,
    token_rows,
)
from .lists import items_of, work_item
from .union import BY_BLOCK


@triton.jit
def listed(numbers, first_row, rows, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """What a list holds for each of a tile's rows; 0 past its end.

    Loops over a list load it one tile ahead: the addresses of a tile's q hang on it, and a gather
    behind a load of its own iteration waits for memory twice.
    """
    row = first_row + tl.arange(0, BLOCK_M)
    return tl.load(numbers + row // G, mask=row < rows, other=0)


@triton.jit
def forward_by_block(
    q, k, v, partial_o, partial_lse, chosen, queries, slots, items, first_token, lane_width,
    part_offset, cu_q, cu_k, num_seqs, S, T, blocks_per_head, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    G: tl.constexpr, DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    NUM_SELECTED: tl.constexpr, SELECT_BLOCK: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, MEASURED: tl.constexpr,
):  # fmt: skip
    """Attention of each listed query over one block: a normalised partial output and its lse.

    Grid: (bound of items, Hkv, rows of the batch in the pass). BLOCK_N is a power of two >=
    SELECT_BLOCK: the softmax over the block is finished in one tile.

    Args:
        chosen: int32 [1], see `choose_strategy`; read where MEASURED.
        queries, slots: of each pair, by block, see `lists`.
        items, lane_width, part_offset: its work items, see `lists`.
        first_token: of the pass, in the flattened batch.
        partial_o: [pairs of the pass, G, DV], contiguous; partial_lse: float32, base 2, [pairs, G].
    """
    if MEASURED:
        if tl.load(chosen) != BY_BLOCK:
            return
    item = tl.program_id(0)
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
        scale_log2 = scale * LOG2E
        rows = count * G
        group = (batch * tokens - first_token) * tl.num_programs(1) + kv_head
        next_query = listed(queries + begin, 0, rows, G, BLOCK_M)
        next_slot = listed(slots + begin, 0, rows, G, BLOCK_M)
        for first_row in range(0, rows, BLOCK_M):
            row = first_row + tl.arange(0, BLOCK_M)
            valid = row < rows
            query = next_query
            slot = next_slot
            next_query = listed(queries + begin, first_row + BLOCK_M, rows, G, BLOCK_M)
            next_slot = listed(slots + begin, first_row + BLOCK_M, rows, G, BLOCK_M)
            q_rows = q_head + query.to(tl.int64) * stride_qt + (row % G) * stride_qh
            q0, q1 = load_split(q_rows, valid, DK, D0, D1, True)
            position = (T - S + query - q_start).to(tl.int32)
            logits = dot_split(q0, q1, k0, k1, D1, UPCAST, PRECISION) * scale_log2
            seen = there[None, :] & (key[None, :] <= position[:, None])
            logits = tl.where(seen, logits, float("-inf"))
            # Every listed query sees the block's first key: the maximum is finite.
            maximum = tl.where(valid, tl.max(logits, 1), 0.0)
            p = tl.math.exp2(logits - maximum[:, None])
            total = tl.where(valid, tl.sum(p, 1), 1.0)
            p = narrow(p, v0.dtype, UPCAST)
            o0 = dot(p, v0, tl.zeros([BLOCK_M, V0], tl.float32), UPCAST, PRECISION)
            o1 = o0
            if V1 > 0:
                o1 = dot(p, v1, tl.zeros([BLOCK_M, V1], tl.float32), UPCAST, PRECISION)
            pair = (group + query.to(tl.int64) * tl.num_programs(1)) * NUM_SELECTED + slot
            out = pair * G + row % G
            inverse = (1.0 / total)[:, None]
            store_split(partial_o + out * DV, valid, o0 * inverse, o1 * inverse, DV, V0, V1)
            tl.store(partial_lse + out, maximum + tl.math.log2(total), mask=valid)


@triton.jit
def combine(
    partial_o, partial_lse, used_slots, o, lse, chosen, first_token, num_rows, HQ,
    G: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    NUM_SELECTED: tl.constexpr, BLOCK_M: tl.constexpr, MEASURED: tl.constexpr,
):  # fmt: skip
    """Merges the partial outputs of a query's blocks: `o = sum exp(lse_i - lse) o_i`.

    Bytes bound; reads every partial output once. Grid: any number of programs, which share the
    tiles of BLOCK_M rows, a row being a (token, query head) pair of the pass: no more programs than
    stay resident, so that little is launched in vain.

    Args:
        partial_o, partial_lse, chosen: as `forward_by_block` wrote and read them.
        used_slots: int8 [B, S, Hkv, NUM_SELECTED], 0 where nothing was written.
        o: [B, S, Hq, DV]; lse: float32 [B, S, Hq].
        first_token: of the pass, in the flattened batch; num_rows: of the pass.
    """
    if MEASURED:
        if tl.load(chosen) != BY_BLOCK:
            return
    passed = tl.cast(first_token, tl.int64) * HQ
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = row < num_rows
        first = (row // G) * NUM_SELECTED
        maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
        acc1 = tl.zeros([BLOCK_M, V1 if V1 > 0 else V0], tl.float32)
        for slot in range(0, NUM_SELECTED):
            at = used_slots + (passed // G * NUM_SELECTED + first + slot)
            there = valid & (tl.load(at, mask=valid, other=0) != 0)
            entry = (first + slot) * G + row % G
            part = tl.load(partial_lse + entry, mask=there, other=float("-inf"))
            o0, o1 = load_split(partial_o + entry * DV, there, DV, V0, V1, True)
            new_maximum = tl.maximum(maximum, part)
            shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            weight = tl.math.exp2(part - shift)
            factor = tl.math.exp2(maximum - shift)
            total = total * factor + weight
            acc0 = acc0 * factor[:, None] + o0.to(tl.float32) * weight[:, None]
            if V1 > 0:
                acc1 = acc1 * factor[:, None] + o1.to(tl.float32) * weight[:, None]
            maximum = new_maximum
        dead = total == 0.0
        total = tl.where(dead, 1.0, total)
        row_lse = tl.where(dead, float("-inf"), (maximum + tl.math.log2(total)) * LN2)
        inverse = (1.0 / total)[:, None]
        store_split(o + (passed + row) * DV, valid, acc0 * inverse, acc1 * inverse, DV, V0, V1)
        tl.store(lse + passed + row, row_lse, mask=valid)
