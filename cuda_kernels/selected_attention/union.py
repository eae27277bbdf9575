"""What adjacent queries have in common: the union of their blocks, and which design that favours.

Bytes on an H200 per pair of a token and a block of m = 64 keys that it selected (192/128, 2-byte
elements; L2 at 5.5 TB/s, HBM at 4.3 TB/s; computed from these rates, not measured):

- `by_query`: K, V of each union entry through L2, 40,960 B = 7.4 ns / sharing, forward and dq;
- `by_block`, per head: q (and grad_o) in, the partial result out and in again: forward 896 B =
  0.21 ns, dq (float32 partials) 2,184 B = 0.51 ns. Lists, per pair: 25 B = 0.006 ns.

So by_query is the faster one from `sharing * G` = 36 rows on (forward) or 15 (dq): a block read
through L2 pays when that many query rows use it. Matrix products take less than the bytes in all
cases: 3.3 ns (forward) and 5.3 ns (dq) per union entry at 790 TFLOP/s, idle rows included.
`sharing` is between 1 and QUERIES, so small groups are by_block's and dq from G = 16 on is
by_query's whatever the ids are. In between, `choose_strategy` compares on the device: both designs
are launched, and the programs of the one that was not chosen return at once.
"""

import triton
import triton.language as tl

from ..common import packed_tile

BY_BLOCK = tl.constexpr(0)
BY_QUERY = tl.constexpr(1)


@triton.jit
def query_tile(
    tile, cu_q, cu_k, num_seqs, S, T, QUERIES: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Where a tile of QUERIES tokens lies: query start, queries, key start, keys, first token."""
    q_start = tl.full([], 0, tl.int64)
    k_start = tl.full([], 0, tl.int64)
    if PACKED:
        sequence, tile = packed_tile(tile, cu_q, num_seqs, 1, QUERIES)
        q_start = tl.load(cu_q + sequence).to(tl.int64)
        k_start = tl.load(cu_k + sequence).to(tl.int64)
        S = (tl.load(cu_q + sequence + 1) - q_start).to(tl.int32)
        T = (tl.load(cu_k + sequence + 1) - k_start).to(tl.int32)
    return q_start, S, k_start, T, tile * QUERIES


@triton.jit
def union_blocks(
    block_indices, entries, counts, pairs, cu_q, cu_k, num_seqs, S, T,
    NUM_SELECTED: tl.constexpr, SELECTED_POW2: tl.constexpr, SELECT_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Lists the distinct blocks that a tile of QUERIES adjacent tokens selected.

    Grid: (query tiles, Hkv, B). An entry is `block << QUERIES | members`, bit i of members set when
    token i of the tile selected the block. Ids below 0 and blocks that start after the token are
    left out. QUERIES is a power of two <= 8, which leaves 23 bits for the block.

    Args:
        block_indices: int32 [B, S, Hkv, NUM_SELECTED], contiguous.
        entries: int32 [B, Hkv, tiles, QUERIES * NUM_SELECTED]; counts: int32 [B, Hkv, tiles], how
            many of them a tile has; pairs: int32 [B, Hkv, tiles], how many (token, block) pairs.
    """
    number = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    kv_heads = tl.num_programs(1)
    tokens = S
    q_start, S, _, T, first_token = query_tile(number, cu_q, cu_k, num_seqs, S, T, QUERIES, PACKED)
    stride_token = kv_heads * NUM_SELECTED
    ids = block_indices + (batch * tokens + q_start + first_token) * stride_token
    ids += tl.program_id(1) * NUM_SELECTED

    slot = tl.arange(0, SELECTED_POW2)
    flat = tl.arange(0, QUERIES * SELECTED_POW2)
    query = flat // SELECTED_POW2
    inside = (flat % SELECTED_POW2 < NUM_SELECTED) & (first_token + query < S)
    own = tl.load(ids + query * stride_token + flat % SELECTED_POW2, mask=inside, other=-1)
    position = T - S + first_token + query
    own = tl.where(own.to(tl.int64) * SELECT_BLOCK <= position, own, -1)
    members = tl.zeros([QUERIES * SELECTED_POW2], tl.int32)
    for other in tl.static_range(QUERIES):
        there = (slot < NUM_SELECTED) & (first_token + other < S)
        row = tl.load(ids + other * stride_token + slot, mask=there, other=-1)
        row = tl.where(row.to(tl.int64) * SELECT_BLOCK <= T - S + first_token + other, row, -1)
        equal = (own[:, None] == row[None, :]).to(tl.int32)
        members |= tl.max(equal, 1) << other
    # The first token that selected a block is the one that lists it.
    earlier = members & ((1 << query) - 1)
    listed = (own >= 0) & (earlier == 0)
    order = tl.cumsum(listed.to(tl.int32), 0) - 1
    out = (batch * kv_heads + tl.program_id(1)) * tl.num_programs(0) + number
    slots = entries + out * (QUERIES * NUM_SELECTED) + order
    tl.store(slots, (own << QUERIES) | members, mask=listed)
    tl.store(counts + out, tl.sum(listed.to(tl.int32), 0))
    tl.store(pairs + out, tl.sum((own >= 0).to(tl.int32), 0))


@triton.jit
def choose_strategy(counts, pairs, chosen, tiles, min_sharing, BLOCK: tl.constexpr):
    """Stores BY_QUERY where the mean sharing reaches `min_sharing`, else BY_BLOCK.

    The mean sharing is the number of (token, block) pairs over that of union entries, both of the
    whole call. The sums are exact, so equal ids give equal choices. Grid: (1,): at 1M tokens and 4
    kv heads one program reads 8 MB.

    Args:
        counts, pairs: int32 [tiles], of `union_blocks`, over all batches and kv heads.
        chosen: int32 [1].
    """
    entries = tl.zeros([BLOCK], tl.int64)
    selected = tl.zeros([BLOCK], tl.int64)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        entries += tl.load(counts + tile, mask=tile < tiles, other=0)
        selected += tl.load(pairs + tile, mask=tile < tiles, other=0)
    enough = tl.sum(selected, 0).to(tl.float32) >= min_sharing * tl.sum(entries, 0).to(tl.float32)
    tl.store(chosen, tl.where(enough, BY_QUERY, BY_BLOCK))
