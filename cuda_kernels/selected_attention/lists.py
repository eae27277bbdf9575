"""Who selected each block: `block_indices` turned round, as lists by block, in four kernels.

A counting sort per (batch row, kv head), a *lane*: the tokens are cut in chunks, `count_pairs`
counts each chunk's pairs by block, `sum_chunks` adds the chunks before up, `cut_lists` adds the
blocks before up and cuts the lists in work items, `place_pairs` writes every pair where it belongs.
Equal inputs give equal lists, by block and then by token; nothing is atomic.

A lane has room for S * NUM_SELECTED pairs, so no lane waits for the sums of another one, and what
a pass needs lies behind one pointer. `items` is int32 [lanes, parts, width] with, for C =
blocks_per_head + 1, in each row: where the lists begin in this part of the tokens [C], where they
end [C], first work items [C] (in the last column their number), first workspace slots of the lists
of several items [C], and the block of each item.

Bound by latency and by bytes: ids are read twice, 6 bytes per pair are written, and the table of
counts is 2 bytes per pair: 64K tokens, 4 heads, 16 slots: 100 MB, where PyTorch's stable sort with
what surrounds it passes over 50 bytes per pair several times in 44 launches.
"""

import triton
import triton.language as tl

from ..common import packed_tile
from .union import BY_BLOCK


@triton.jit
def lane_of(batch, KV_HEADS):
    """Number of this program's (batch row, kv head); kv heads are the grid's second axis."""
    return batch * KV_HEADS + tl.program_id(1)


@triton.jit
def _pairs(
    block_indices, first, batch, cu_q, cu_k, num_seqs, S, T,
    NUM_SELECTED: tl.constexpr, SELECTED_POW2: tl.constexpr, SELECT_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The pairs of TOKENS tokens from `first` on, [TOKENS * SELECTED_POW2] in the order of ids.

    Returns:
        token, slot, block number in the lane, whether there is such a slot, whether it is used (an
        id that is not negative and no later block than the token's own), where its id stands.
    """
    flat = tl.arange(0, TOKENS * SELECTED_POW2)
    token = first + flat // SELECTED_POW2
    slot = flat % SELECTED_POW2
    inside = (slot < NUM_SELECTED) & (token < S)
    row = (batch * S + token) * tl.num_programs(1) + tl.program_id(1)
    at = row * NUM_SELECTED + slot
    block = tl.load(block_indices + at, mask=inside, other=-1)
    position = T - S + token
    number = block
    if PACKED:
        # The last sequence that begins at or before the token; empty ones begin there, too.
        sequence = tl.zeros([TOKENS * SELECTED_POW2], tl.int32)
        left = num_seqs
        while left > 1:
            half = left // 2
            begins = tl.load(cu_q + sequence + half)
            sequence = tl.where(begins <= token, sequence + half, sequence)
            left -= half
        k_start = tl.load(cu_k + sequence)
        q_end = tl.load(cu_q + sequence + 1)
        position = token - q_end + tl.load(cu_k + sequence + 1) - k_start
        number = k_start // SELECT_BLOCK + sequence + block
    used = inside & (block >= 0) & (block.to(tl.int64) * SELECT_BLOCK <= position)
    return token, slot, number, inside, used, at


@triton.jit
def _alike(number, used, TOKENS: tl.constexpr):
    """Of each used pair, how many used ones have its number: those before it, and all.

    The ids of one token are distinct. Every pair is compared with every other one: 64 of them are
    32 comparisons a thread; 256 would not fit its registers.
    """
    if TOKENS == 1:
        before = tl.zeros(number.shape, tl.int32)
        total = before + 1
    else:
        key = tl.where(used, number, -1)
        order = tl.arange(0, number.shape[0])
        equal = key[:, None] == key[None, :]
        before = tl.sum((equal & (order[None, :] < order[:, None])).to(tl.int32), 1)
        total = tl.sum(equal.to(tl.int32), 1)
    return before, total


@triton.jit
def count_pairs(
    block_indices, counts, used_slots, chosen, cu_q, cu_k, num_seqs, S, T, blocks_per_head, chunk,
    NUM_SELECTED: tl.constexpr, SELECTED_POW2: tl.constexpr, SELECT_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, PACKED: tl.constexpr, MEASURED: tl.constexpr,
):  # fmt: skip
    """Counts the pairs of a chunk of tokens by block. Grid: (chunks, Hkv, B).

    Args:
        block_indices: int32 [B, S, Hkv, NUM_SELECTED], contiguous.
        counts: int32 [B, Hkv, chunks + 1, blocks_per_head]; the last row is left to `sum_chunks`.
        used_slots: int8, as block_indices: 1 for the pairs that the lists will hold.
        chosen: int32 [1], see `choose_strategy`; read where MEASURED.
        chunk: tokens, a multiple of TOKENS.
    """
    if MEASURED:
        if tl.load(chosen) != BY_BLOCK:
            return
    batch = tl.program_id(2).to(tl.int64)
    lane = lane_of(batch, tl.num_programs(1))
    mine = counts + (lane * (tl.num_programs(0) + 1) + tl.program_id(0)) * blocks_per_head
    for start in range(0, blocks_per_head, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        zeros = tl.zeros([COLUMNS], tl.int32)
        tl.store(mine + column, zeros, mask=column < blocks_per_head)
    tl.debug_barrier()
    begin = tl.program_id(0) * chunk
    for first in range(begin, tl.minimum(begin + chunk, S), TOKENS):
        _, _, number, inside, used, at = _pairs(
            block_indices, first, batch, cu_q, cu_k, num_seqs, S, T, NUM_SELECTED, SELECTED_POW2,
            SELECT_BLOCK, TOKENS, PACKED,
        )  # fmt: skip
        before, total = _alike(number, used, TOKENS)
        last = used & (before == total - 1)
        known = tl.load(mine + number, mask=last, other=0)
        tl.store(mine + number, known + total, mask=last)
        tl.store(used_slots + at, used.to(tl.int8), mask=inside)
        tl.debug_barrier()


@triton.jit
def sum_chunks(
    counts, chosen, blocks_per_head, chunks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MEASURED: tl.constexpr,
):  # fmt: skip
    """Replaces each chunk's counts by the sums over the chunks before it; row `chunks` by all.

    Grid: (tiles of COLUMNS blocks, Hkv, B). counts: as `count_pairs` left them.
    """
    if MEASURED:
        if tl.load(chosen) != BY_BLOCK:
            return
    lane = lane_of(tl.program_id(2).to(tl.int64), tl.num_programs(1))
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < blocks_per_head
    table = counts + lane * (chunks + 1) * blocks_per_head
    before = tl.zeros([COLUMNS], tl.int32)
    for first in range(0, chunks, ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        cell = table + row.to(tl.int64) * blocks_per_head + column[None, :]
        there = (row < chunks) & inside[None, :]
        value = tl.load(cell, mask=there, other=0)
        tl.store(cell, tl.cumsum(value, 0) - value + before[None, :], mask=there)
        before += tl.sum(value, 0)
    tl.store(table + tl.cast(chunks, tl.int64) * blocks_per_head + column, before, mask=inside)


@triton.jit
def cut_lists(
    counts, items, chosen, blocks_per_head, chunks, chunks_per_part, width, longest,
    COLUMNS: tl.constexpr, MEASURED: tl.constexpr,
):  # fmt: skip
    """Where lists begin and end in each part of the tokens, and their work items.

    Grid: (parts, Hkv, B). A list's part of more than `longest` queries becomes several items.

    Args:
        counts: as `sum_chunks` left them; `place_pairs` changes them.
        items: int32 [B, Hkv, parts, width], see the module.
    """
    if MEASURED:
        if tl.load(chosen) != BY_BLOCK:
            return
    lane = lane_of(tl.program_id(2).to(tl.int64), tl.num_programs(1))
    table = counts + lane * (chunks + 1) * blocks_per_head
    begin_row = tl.program_id(0) * chunks_per_part
    end_row = tl.minimum(begin_row + chunks_per_part, chunks)
    out = items + (lane * tl.num_programs(0) + tl.program_id(0)) * width
    columns = blocks_per_head + 1
    pairs_before = 0
    items_before = 0
    slots_before = 0
    for start in range(0, blocks_per_head, COLUMNS):
        block = start + tl.arange(0, COLUMNS)
        inside = block < blocks_per_head
        rows = table + block
        length = tl.load(rows + tl.cast(chunks, tl.int64) * blocks_per_head, mask=inside, other=0)
        begin = tl.load(rows + begin_row.to(tl.int64) * blocks_per_head, mask=inside, other=0)
        end = tl.load(rows + end_row.to(tl.int64) * blocks_per_head, mask=inside, other=0)
        first = pairs_before + tl.cumsum(length, 0) - length
        count = (end - begin + longest - 1) // longest
        slots = tl.where(count > 1, count, 0)
        first_item = items_before + tl.cumsum(count, 0) - count
        first_slot = slots_before + tl.cumsum(slots, 0) - slots
        tl.store(out + block, first + begin, mask=inside)
        tl.store(out + columns + block, first + end, mask=inside)
        tl.store(out + 2 * columns + block, first_item, mask=inside)
        tl.store(out + 3 * columns + block, first_slot, mask=inside)
        for index in range(0, tl.max(count, 0)):
            tl.store(out + 4 * columns + first_item + index, block, mask=index < count)
        pairs_before += tl.sum(length, 0)
        items_before += tl.sum(count, 0)
        slots_before += tl.sum(slots, 0)
    tl.store(out + 2 * columns + blocks_per_head, items_before)


@triton.jit
def place_pairs(
    block_indices, counts, items, queries, slots, chosen, cu_q, cu_k, num_seqs, S, T,
    blocks_per_head, chunk, lane_width,
    NUM_SELECTED: tl.constexpr, SELECTED_POW2: tl.constexpr, SELECT_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, PACKED: tl.constexpr, MEASURED: tl.constexpr,
):  # fmt: skip
    """Writes every pair of a chunk to its list. Grid: (chunks, Hkv, B).

    Args:
        counts: as `sum_chunks` left them; a chunk's row is moved on as its pairs are placed.
        items: as `cut_lists` made them. lane_width: elements of a lane in it.
        queries: int32 [B, Hkv, S * NUM_SELECTED], token numbers; slots: int16, the slots of them.
    """
    if MEASURED:
        if tl.load(chosen) != BY_BLOCK:
            return
    batch = tl.program_id(2).to(tl.int64)
    lane = lane_of(batch, tl.num_programs(1))
    mine = counts + (lane * (tl.num_programs(0) + 1) + tl.program_id(0)) * blocks_per_head
    list_begin = items + lane * lane_width
    room = lane * S * NUM_SELECTED
    begin = tl.program_id(0) * chunk
    for first in range(begin, tl.minimum(begin + chunk, S), TOKENS):
        token, slot, number, _, used, _ = _pairs(
            block_indices, first, batch, cu_q, cu_k, num_seqs, S, T, NUM_SELECTED, SELECTED_POW2,
            SELECT_BLOCK, TOKENS, PACKED,
        )  # fmt: skip
        before, total = _alike(number, used, TOKENS)
        placed = tl.load(mine + number, mask=used, other=0)
        place = room + tl.load(list_begin + number, mask=used, other=0) + placed + before
        tl.store(queries + place, token, mask=used)
        tl.store(slots + place, slot.to(tl.int16), mask=used)
        tl.debug_barrier()  # all have read what the last of equals moves on
        last = used & (before == total - 1)
        tl.store(mine + number, placed + total, mask=last)
        tl.debug_barrier()


@triton.jit
def work_item(
    items, item, batch, lane_width, part_offset, cu_q, cu_k, num_seqs, S, T, blocks_per_head,
    SELECT_BLOCK: tl.constexpr, CHUNK: tl.constexpr, NUM_SELECTED: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """What a work item covers: a block of keys, and at most CHUNK of the queries on its list.

    Args:
        items: see the module. part_offset: of a part's row in a lane of it.

    Returns:
        block number in the lane, list begin (in `queries`), how many queries, query start,
        queries, key start and keys of the sequence, first key of the block.
    """
    row = items + lane_of(batch, tl.num_programs(1)) * lane_width + part_offset
    columns = blocks_per_head + 1
    number = tl.load(row + 4 * columns + item)
    chunk = item - tl.load(row + 2 * columns + number)
    begin = tl.load(row + number).to(tl.int64) + chunk.to(tl.int64) * CHUNK
    # In 64 bits until here: from 32 bits LLVM widens the loop over the queries, and spills.
    count = tl.minimum(begin + CHUNK, tl.load(row + columns + number)) - begin
    count = count.to(tl.int32)
    begin += lane_of(batch, tl.num_programs(1)) * S * NUM_SELECTED
    block = number
    q_start = tl.full([], 0, tl.int64)
    k_start = tl.full([], 0, tl.int64)
    if PACKED:
        sequence, block = packed_tile(block, cu_k, num_seqs, 1, SELECT_BLOCK)
        q_start = tl.load(cu_q + sequence).to(tl.int64)
        k_start = tl.load(cu_k + sequence).to(tl.int64)
        S = (tl.load(cu_q + sequence + 1) - q_start).to(tl.int32)
        T = (tl.load(cu_k + sequence + 1) - k_start).to(tl.int32)
    return number, begin, count, q_start, S, k_start, T, block * SELECT_BLOCK


@triton.jit
def items_of(items, batch, lane_width, part_offset, blocks_per_head):
    """How many work items this program's lane has in a part."""
    row = items + lane_of(batch, tl.num_programs(1)) * lane_width + part_offset
    return tl.load(row + 2 * (blocks_per_head + 1) + blocks_per_head)


@triton.jit
def items_of_block(items, number, batch, lane_width, blocks_per_head):
    """First work item, number of items and first workspace slot of a block; of a single part."""
    columns = blocks_per_head + 1
    row = items + lane_of(batch, tl.num_programs(1)) * lane_width + number
    first = tl.load(row + 2 * columns)
    return first, tl.load(row + 2 * columns + 1) - first, tl.load(row + 3 * columns)
