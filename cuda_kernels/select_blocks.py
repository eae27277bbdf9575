"""Selection: importance of every selection block, and the top n of them, in one kernel.

Per tile of TOKENS queries of one group the kernel recomputes the compressed logits, turns them into
probabilities with the given lse, sums them over the heads, and over compressed blocks with the
weights of `_block_scores`; it keeps the scores of CHUNK selection blocks at a time in a scratch
buffer of its own, and merges them into a running top n. Grid: as many programs as stay resident;
each works through tiles of queries (`tile += programs`), the longest first.

Bound by the products q @ k: 2 * Dk FLOP per (query, head, compressed block), 3.3 ms at 64K tokens
with 64/4/192, against 1.07 GB for the block-score map written and read once, which is why it stays
in the programs' scratch: programs * TOKENS * SLOTS * 4 bytes (8 MB with 264 programs, 8 tokens,
1024 slots), rewritten over and over, so it lives in the L2 cache; independent of the length, so 1M
tokens cost no more memory than 64K. Logits are [keys, queries]: the sum over heads then runs along
the columns of an accumulator, mostly inside one thread, where [queries, keys] would need three
times the warp shuffles, and 4096 exponentials per 64 x 64 tile already cost as much as the product.

The top n is found by bisection on the scores' bit patterns (they are >= 0, so they order as
integers): count the scores >= middle until exactly n remain, about 10 to 20 passes over registers,
then compact the winners by a prefix sum. Ascending ids and the lowest index on ties come with it.
A bitonic sort of 1024 64-bit (score, id) pairs per row would cost several times that.
"""

import triton
import triton.language as tl

from .common import LOG2E, dot_split, load_base2_lse, load_split, packed_tile
from .compressed_attention import count_compressed as count_compressed
from .compressed_attention import sequence_bounds, visible_blocks

_INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def _block_scores(
    q0, q1, lse2, limit, k_head, stride_kt, first_block, end, carry, scale_log2,
    GP: tl.constexpr, TOKENS: tl.constexpr,
    DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr,
    BLOCKS: tl.constexpr, RATIO: tl.constexpr, MASK: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Importance [BLOCKS, TOKENS] of selection blocks first_block .. and the next one's carry.

    In units of STRIDE, compressed block i covers [i, i + a) and selection block j covers
    [j * r, (j + 1) * r), a = BLOCK / STRIDE <= r = SELECT / STRIDE. The block at i = j * r + e
    therefore shares min(a, r - e) units with j and the other max(0, e + a - r) with j + 1: the
    second part is shifted by one block, and the last block's is carried to the next call.

    Args:
        lse2: +inf in columns of no head, which then count nothing.
        limit: [TOKENS] compressed blocks visible to each query; end: the largest of them.
        carry: float32 [TOKENS]. RATIO: r rounded up to a power of two.
    """
    R: tl.constexpr = SELECT // STRIDE
    A: tl.constexpr = BLOCK // STRIDE
    index = tl.arange(0, BLOCKS * RATIO)
    offset = (index // RATIO) * R + index % RATIO
    key = first_block * R + offset
    inside = index % RATIO < R
    k_rows = k_head + tl.cast(first_block * R, tl.int64) * stride_kt + offset * stride_kt
    if RATIO > R or MASK:
        k0, k1 = load_split(k_rows, inside & (key < end), DK, D0, D1, True)
    else:
        k0, k1 = load_split(k_rows, inside, DK, D0, D1, False)
    logits = dot_split(k0, k1, q0, q1, D1, UPCAST, PRECISION) * scale_log2
    p = tl.math.exp2(logits - lse2[None, :])
    p = tl.sum(tl.reshape(p, [BLOCKS * RATIO, TOKENS, GP]), 2)
    if MASK:
        p = tl.where(key[:, None] < limit[None, :], p, 0.0)

    place = index % RATIO
    own = tl.where(inside, tl.minimum(A, R - place), 0).to(tl.float32)
    scores = tl.sum(tl.reshape(p * own[:, None], [BLOCKS, RATIO, TOKENS]), 1)
    if A > 1:
        over = tl.where(inside, tl.maximum(place + A - R, 0), 0).to(tl.float32)
        over = tl.sum(tl.reshape(p * over[:, None], [BLOCKS, RATIO, TOKENS]), 1)
        block = tl.arange(0, BLOCKS)
        previous = tl.maximum(block - 1, 0)[:, None] + tl.zeros([BLOCKS, TOKENS], tl.int32)
        shifted = tl.gather(over, previous, 0)
        scores += tl.where(block[:, None] == 0, carry[None, :], shifted)
        carry = tl.sum(tl.where(block == BLOCKS - 1, 1.0, 0.0)[:, None] * over, 0)
    return scores, carry


@triton.jit
def _nth_largest(keys, N: tl.constexpr):
    """A threshold [TOKENS] with at most N of keys [TOKENS, SLOTS] above it and, as far as there are
    N that are >= 0, at least N not below it. Bisection over int32."""
    low = tl.zeros([keys.shape[0]], tl.int32)
    high = tl.full([keys.shape[0]], _INFINITY_BITS + 1, tl.int32)
    gap = _INFINITY_BITS + 1
    while gap > 1:
        middle = low + (high - low) // 2
        count = tl.sum((keys >= middle[:, None]).to(tl.int32), 1)
        settled = high - low <= 1
        low = tl.where((count >= N) & (settled == 0), middle, low)
        high = tl.where((count < N) & (settled == 0), middle, high)
        high = tl.where(count == N, low + 1, high)
        gap = tl.max(high - low, 0)
    return low


@triton.jit
def _winners(keys, N: tl.constexpr):
    """Which of keys [TOKENS, SLOTS] (-1: none) are the N largest, lowest slot first on ties.

    Returns:
        bool [TOKENS, SLOTS], their ranks in slot order, how many there are [TOKENS].
    """
    threshold = _nth_largest(keys, N)[:, None]
    above = (keys > threshold).to(tl.int32)
    equal = (keys == threshold).to(tl.int32)
    room = N - tl.sum(above, 1)
    marks = above + equal * 65536
    if keys.shape[0] == 1:
        # Triton 3.6 cannot lower a scan over [1, SLOTS] in the layouts that the row's pointers get.
        ranks = tl.reshape(tl.cumsum(tl.reshape(marks, [keys.shape[1]]), 0), keys.shape)
    else:
        ranks = tl.cumsum(marks, 1)
    above_rank = ranks % 65536
    equal_rank = ranks // 65536
    taken = (above + equal * (equal_rank <= room[:, None]).to(tl.int32)) > 0
    rank = above_rank + tl.minimum(equal_rank, room[:, None]) - 1
    count = N - room + tl.minimum(tl.sum(equal, 1), room)
    return taken, rank, count


@triton.jit
def keep_winners(
    score_rows, id_rows, values, ids, live, own, N: tl.constexpr,
    INITIAL: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Keeps the N best of the live candidates: their scores and ids, by ascending id.

    Args:
        score_rows, id_rows: pointers [TOKENS, SLOTS], all of a row alike, to where rank 0 goes;
            may be where values and ids were read from.
        values: float32, ids: int32 (ascending along live slots), live: bool, all [TOKENS, SLOTS].
        own: int32 [TOKENS], the queries' own blocks: with LOCAL and INITIAL, what is forced.

    Returns:
        int32 [TOKENS], how many were kept.
    """
    forced = (ids < INITIAL) | (ids > own[:, None] - LOCAL)
    keys = tl.maximum(values, 0.0).to(tl.int32, bitcast=True)
    keys = tl.where(live, tl.where(forced, _INFINITY_BITS, keys), -1)
    taken, rank, kept = _winners(keys, N)
    tl.debug_barrier()
    tl.store(score_rows + rank, values, mask=taken)
    tl.store(id_rows + rank, ids, mask=taken)
    tl.debug_barrier()
    return kept


@triton.jit
def _select_tile(
    q0, q1, lse2, limit, least, end, token, valid, own, k_head, stride_kt, scores, carried_ids,
    out, stride_out, scale_log2,
    GP: tl.constexpr, TOKENS: tl.constexpr,
    DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    BLOCKS: tl.constexpr, RATIO: tl.constexpr, SLOTS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores all blocks of a query tile, CHUNK = SLOTS - NP at a time, and stores the top N ids.

    Slots [0, NP) of a row of scratch hold the winners so far, the others the scores of a chunk.

    Args:
        own: int32 [TOKENS] selection block of each query. scores: float32 [TOKENS, SLOTS] and
        carried_ids: int32 [TOKENS, NP], this program's scratch. out: [tokens, N] at stride_out.
    """
    CHUNK: tl.constexpr = SLOTS - NP
    R: tl.constexpr = SELECT // STRIDE
    row = tl.arange(0, TOKENS)
    slot = tl.arange(0, SLOTS)
    candidate = tl.arange(0, NP)
    last_own = tl.max(own, 0)
    score_rows = scores + row[:, None] * SLOTS
    id_rows = carried_ids + row[:, None] * NP
    carry = tl.zeros([TOKENS], tl.float32)
    kept = tl.zeros([TOKENS], tl.int32)
    # What the key tiles need would be hoisted over this loop and spilled there.
    for chunk in tl.range(0, last_own + 1, CHUNK, disable_licm=True):
        chunk_end = tl.minimum(chunk + CHUNK, last_own + 1)
        full = tl.minimum(least // R, chunk_end)
        full = chunk + tl.maximum(full - chunk, 0) // BLOCKS * BLOCKS
        column = tl.arange(0, BLOCKS)
        for first in range(chunk, full, BLOCKS):
            tile, carry = _block_scores(
                q0, q1, lse2, limit, k_head, stride_kt, first, end, carry, scale_log2, GP, TOKENS,
                DK, D0, D1, BLOCK, STRIDE, SELECT, BLOCKS, RATIO, False, UPCAST, PRECISION,
            )  # fmt: skip
            tl.store(score_rows + (NP + first - chunk + column)[None, :], tl.trans(tile))
        for first in range(full, chunk_end, BLOCKS):
            tile, carry = _block_scores(
                q0, q1, lse2, limit, k_head, stride_kt, first, end, carry, scale_log2, GP, TOKENS,
                DK, D0, D1, BLOCK, STRIDE, SELECT, BLOCKS, RATIO, True, UPCAST, PRECISION,
            )  # fmt: skip
            tl.store(score_rows + (NP + first - chunk + column)[None, :], tl.trans(tile))
        tl.debug_barrier()

        old = slot[None, :] < NP
        old_live = old & (slot[None, :] < kept[:, None])
        old_ids = tl.load(id_rows + slot[None, :], mask=old_live, other=0)
        ids = tl.where(old, old_ids, chunk + slot[None, :] - NP)
        live = (ids <= own[:, None]) & (old_live | (old == 0))
        live = live & (ids < chunk_end)
        values = tl.load(score_rows + slot[None, :], mask=live, other=0.0)
        kept = keep_winners(score_rows, id_rows, values, ids, live, own, N, INITIAL, LOCAL)
    ids = tl.load(id_rows + candidate[None, :], mask=candidate[None, :] < kept[:, None], other=-1)
    target = out + token.to(tl.int64)[:, None] * stride_out + candidate[None, :]
    tl.store(target, ids, mask=valid[:, None] & (candidate < N)[None, :])
    tl.debug_barrier()


@triton.jit
def forward(
    q, k_cmp, lse, block_indices, scores, carried_ids, cu_q, cu_k, cu_cmp, num_seqs,
    S, T, HQ, HKV_B, tiles, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    G: tl.constexpr, GP: tl.constexpr, DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    PACKED: tl.constexpr, TOKENS: tl.constexpr, BLOCKS: tl.constexpr, RATIO: tl.constexpr,
    SLOTS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Ids of the N selected blocks of every query and kv head.

    Grid: (programs,); program p takes items p, p + programs, ... of all `tiles * Hkv * B`.

    Args:
        q: [B, S, Hq, DK] and k_cmp: [B, Nc, Hkv, DK], last dim contiguous; lse: float32
            [B, S, Hq], contiguous, of the compressed logits. HKV_B: Hkv * B. tiles: query tiles per
            kv head and batch.
        block_indices: int32 [B, S, Hkv, N], contiguous.
        scores: float32 [programs, TOKENS, SLOTS]; carried_ids: int32 [programs, TOKENS, NP].
        GP: G rounded up to a power of two; columns with G <= head < GP count nothing.
        BLOCKS, RATIO: selection blocks per key tile, and SELECT / STRIDE rounded up to a power of
            two: a tile has BLOCKS * RATIO keys. BLOCKS divides SLOTS and NP.
    """
    HKV = HQ // G
    scale_log2 = scale * LOG2E
    tokens = S
    keys = T
    # What tiles have in common would be hoisted over this loop and spilled there.
    for item in tl.range(tl.program_id(0), tiles * HKV_B, tl.num_programs(0), disable_licm=True):
        tile = tiles - 1 - item // HKV_B
        kv_head = tl.cast(item % HKV_B % HKV, tl.int64)
        batch = tl.cast(item % HKV_B // HKV, tl.int64)
        sequence = 0
        if PACKED:
            sequence, tile = packed_tile(tile, cu_q, num_seqs, 1, TOKENS)
        q_start, S, T, cmp_start, _ = sequence_bounds(
            sequence, cu_q, cu_k, cu_cmp, tokens, keys, 0, PACKED
        )
        first_token = tile * TOKENS
        if first_token < S:
            program = tl.program_id(0).to(tl.int64)
            head = kv_head * G
            token = first_token + tl.arange(0, TOKENS)
            own = tl.where(token < S, (T - S + token) // SELECT, -1)
            column = tl.arange(0, TOKENS * GP)
            column_token = first_token + column // GP
            valid = (column_token < S) & (column % GP < G)
            limit = visible_blocks(T - S + token, BLOCK, STRIDE)
            limit = tl.where(token < S, limit, 0)
            least = visible_blocks(T - S + first_token, BLOCK, STRIDE)
            end = tl.max(limit, 0)

            row_start = batch * tokens + q_start + first_token
            q_head = q + batch * stride_qb + tl.cast(q_start + first_token, tl.int64) * stride_qt
            q_rows = q_head + head * stride_qh
            q_rows += (column // GP) * stride_qt + (column % GP) * stride_qh
            q0, q1 = load_split(q_rows, valid, DK, D0, D1, True)
            lse_rows = lse + row_start * HQ + head + (column // GP) * HQ + column % GP
            lse2 = load_base2_lse(lse_rows, valid)
            k_head = k_cmp + batch * stride_kb + cmp_start.to(tl.int64) * stride_kt
            k_head += kv_head * stride_kh
            out = block_indices + (row_start * HKV + kv_head) * N
            _select_tile(
                q0, q1, lse2, limit, least, end, tl.arange(0, TOKENS), token < S, own,
                k_head, stride_kt, scores + program * (TOKENS * SLOTS),
                carried_ids + program * (TOKENS * NP), out, HKV * N, scale_log2, GP, TOKENS,
                DK, D0, D1, BLOCK, STRIDE, SELECT, N, NP, INITIAL, LOCAL, BLOCKS, RATIO, SLOTS,
                UPCAST, PRECISION,
            )  # fmt: skip
