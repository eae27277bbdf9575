"""Block choice: importance of blocks, forced ones, the n best, and where their rows lie.

Rows here are (kv head, query) pairs, one per partition, blocks along the free axis, all float32.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.spans import spans

FORCED = 1.0e30
"""Above every importance, which is at most G times the stride's blocks."""

BANK = 512
"""float32 columns of a PSUM bank."""

NONE = -3.0e38
"""Below every importance; a value that is nowhere is its opposite."""


def preference(place, blocks: int, initial: int):
    """`FORCED` for blocks that are chosen anyway, else 0: [pairs, blocks].

    place: as of `choose`.
    """
    found = sbuf((place.shape[0], blocks), nl.float32)
    nisa.iota(found, [[1, blocks]], offset=0, channel_multiplier=0)
    nisa.tensor_scalar(found, found, nl.greater, place[:, 1:2], op1=nl.multiply, operand1=FORCED)
    if initial > 0:
        nisa.memset(found[:, 0 : min(initial, blocks)], FORCED)
    return found


def shared_weights(owners, inverse, length: int, ratio: int):
    """For each place of a compressed block beside a selection block what sums p_slc [rows, pairs].

    Args:
        owners: [rows, pairs] float32, 1 where a row is one of the pair's heads.
        inverse: [rows, 1], see `lanes.Scores`.
        length, ratio: l / d and m / d: compressed block i covers the strides i .. i + length - 1,
            selection block j the strides ratio * j .. ratio * (j + 1) - 1.
    """
    by_count, found = {}, []
    for offset in range(1 - length, ratio):
        # Compressed block ratio * j + offset shares so many strides with selection block j.
        count = min(offset + length, ratio) - max(offset, 0)
        if count not in by_count:
            weights = sbuf(owners.shape, nl.float32)
            nisa.tensor_scalar(
                weights, owners, nl.multiply, inverse, op1=nl.multiply, operand1=float(count)
            )
            by_count[count] = weights
        found.append(by_count[count])
    return found


def importance(shares, exponentials, base: int, first: int, count: int, ratio: int):
    """p_slc [pairs, count] in PSUM of `count` selection blocks from `first` on.

    Args:
        shares: from `shared_weights`.
        exponentials: [rows, ...] float32 of compressed blocks from number `base` on, in order;
            zeros before the first and behind the last.
    """
    found = psum((shares[0].shape[1], count))
    for i in range(len(shares)):
        start = ratio * (first + 1) + i - len(shares) - base
        moving = exponentials[:, start : start + ratio * (count - 1) + 1 : ratio]
        nisa.nc_matmul(found, shares[i], moving, accumulate=i > 0)
    return found


def choose(ranked, place, chosen: int):
    """The best blocks: numbers [pairs, n] uint32, and 1.0 where there is one, else 0.0.

    Args:
        ranked: [pairs, blocks], blocks >= 8; overwritten.
        place: [pairs, 4]: own block of the query (negative: none), last block before the local
            ones, 1 + the query's position, first row of the sequence's table.
    """
    zero = sbuf((ranked.shape[0], 1), nl.float32)
    nisa.memset(zero, 0.0)
    nisa.range_select(
        ranked, ranked, nl.greater_equal, nl.less_equal, zero, place[:, 0:1],
        reduce_cmd=nisa.reduce_cmd.idle,
    )  # fmt: skip
    numbers, best = search(ranked, chosen)
    real = sbuf(best.shape, nl.float32)
    nisa.tensor_scalar(real, best, nl.greater_equal, 0.0)
    return numbers, real


def search(ranked, chosen: int):
    """The largest of each row, the lowest number on ties: numbers uint32, and values."""
    pairs, blocks = ranked.shape
    spare = sbuf((pairs, blocks), nl.float32)
    rounds = (chosen + 7) // 8
    numbers = sbuf((pairs, 8 * rounds), nl.uint32)
    best = sbuf((pairs, 8 * rounds), nl.float32)
    for r in range(rounds):
        eight = slice(8 * r, 8 * r + 8)
        nisa.max8(best[:, eight], ranked)
        if 8 * r + 8 > chosen:
            # Equal values take the lowest places from the back: the surplus must not take part.
            nisa.memset(best[:, chosen : 8 * r + 8], -NONE)
        nisa.nc_match_replace8(spare, ranked, best[:, eight], NONE, dst_idx=numbers[:, eight])
        ranked, spare = spare, ranked
    return numbers[:, 0:chosen], best[:, 0:chosen]


def seen_tokens(numbers, real, place, size: int):
    """How many tokens of each chosen block its query sees: [pairs, n] float32.

    size: tokens of a block.
    """
    seen = sbuf(real.shape, nl.float32)
    nisa.tensor_scalar(seen, numbers, nl.multiply, -float(size), op1=nl.add, operand1=place[:, 2:3])
    nisa.tensor_scalar(seen, seen, nl.minimum, float(size), op1=nl.maximum, operand1=0.0)
    nisa.tensor_tensor(seen, seen, real, nl.multiply)
    return seen


def look_up(numbers, seen, place, table, blocks: int):
    """Asks for the first row of each chosen block in its pool, by `table` [B * blocks, 1] in HBM.

    Returns:
        For each 128 places: these rows, int32 [places, pairs], and `seen` turned alike.
    """
    pairs, chosen = seen.shape
    at = sbuf((pairs, chosen), nl.float32)
    # A row of NaN matches nothing: its numbers are any, but must be some block's.
    nisa.tensor_scalar(
        at, numbers, nl.minimum, float(blocks - 1), op1=nl.add, operand1=place[:, 3:4]
    )
    found = []
    for first, count in spans(chosen, nl.tile_size.pmax):
        bank = psum((count, 2, pairs))
        for i, source in ((0, at), (1, seen)):
            part = source[:, first : first + count]
            nisa.nc_transpose(bank[:, i, :], part, engine=nisa.engine.tensor)
        index, rows = sbuf((count, pairs), nl.int32), sbuf((count, pairs), nl.int32)
        turned = sbuf((count, pairs), nl.float32)
        nisa.tensor_copy(index, bank[:, 0, :])
        for p in range(pairs):
            nisa.dma_copy(rows[:, p : p + 1], table.vector_select(0, index[:, p : p + 1]))
        nisa.tensor_copy(turned, bank[:, 1, :])
        found.append((rows, turned))
    return found


def placed(found):
    """What `look_up` asked for, [places, 2, pairs] float32 for each 128 places."""
    columns = []
    for rows, turned in found:
        both = sbuf((rows.shape[0], 2, rows.shape[1]), nl.float32)
        nisa.tensor_copy(both[:, 0, :], rows)
        nisa.tensor_copy(both[:, 1, :], turned)
        columns.append(both)
    return columns


def by_lane(seen, rows_of):
    """`seen` of the pair of each row and query: [rows, queries, n] float32, 0 where a row is no row
    of that query.

    rows_of: [pairs, queries, rows] float32: 1 where a row is one of a pair's, and the pair has that
        query.
    """
    places, (_, queries, rows) = seen.shape[1], rows_of.shape
    found = sbuf((rows, queries, places), nl.float32)
    for s in range(queries):
        for first, count in spans(places, BANK):
            bank = psum((rows, count))
            part = seen[:, first : first + count]
            nisa.nc_matmul(bank, rows_of[:, s, :], part, accumulate=False)
            nisa.tensor_copy(found[:, s, first : first + count], bank)
    return found
