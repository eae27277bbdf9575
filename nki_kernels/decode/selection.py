"""Block choice: importance of blocks, forced ones, the n best, and where they lie.

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


def importance(scores, owners, length: int, ratio: int, blocks: int):
    """p_slc [pairs, blocks] of the exponentials of the compressed branch.

    Args:
        owners: [rows, pairs] float32, 1 where a row is one of the pair's heads.
        length, ratio: l / d and m / d: compressed block i covers the strides i .. i + length - 1,
            selection block j the strides ratio * j .. ratio * (j + 1) - 1.
    """
    rows, pairs = owners.shape
    keys, before = scores.values.shape[1], length - 1
    weights, found = sbuf((rows, pairs), nl.float32), sbuf((pairs, blocks), nl.float32)
    nisa.tensor_scalar(weights, owners, nl.multiply, scores.inverse)
    nisa.memset(found, 0.0)
    for block, count in spans(blocks, max(1, (BANK - before) // ratio)):
        for low, width in spans(before + ratio * count, BANK):
            # Compressed blocks first .. last - 1, as far as there are any.
            first = max(0, ratio * block - before + low)
            last = min(keys, ratio * block - before + low + width)
            if last > first:
                bank = psum((pairs, last - first))
                nisa.nc_matmul(bank, weights, scores.values[:, first:last], accumulate=False)
                share_out(found, bank, block, count, first, last, length, ratio)
    return found


def share_out(found, bank, block, count, first, last, length, ratio):
    """Adds compressed blocks first .. last - 1, in `bank`, to selection blocks from `block` on."""
    for offset in range(1 - length, ratio):
        # Compressed block ratio * j + offset shares so many strides with selection block j.
        shared = float(min(offset + length, ratio) - max(offset, 0))
        low = max(block, -((offset - first) // ratio))
        high = min(block + count - 1, (last - 1 - offset) // ratio)
        if high >= low:
            start = ratio * low + offset - first
            part = bank[:, start : start + ratio * (high - low) + 1 : ratio]
            into = found[:, low : high + 1]
            nisa.scalar_tensor_tensor(into, part, nl.multiply, shared, nl.add, into)


def choose(scores, place, chosen: int, initial: int):
    """The best blocks: numbers [pairs, n] uint32, and 1.0 where there is one, else 0.0.

    Args:
        scores: [pairs, blocks], blocks >= 8; overwritten.
        place: [pairs, 2]: own block of the query (negative: none), last block before the local
            ones.
    """
    pairs, blocks = scores.shape
    ranked, spare = sbuf((pairs, blocks), nl.float32), scores
    zero = sbuf((pairs, 1), nl.float32)
    nisa.memset(zero, 0.0)
    nisa.iota(ranked, [[1, blocks]], offset=0, channel_multiplier=0)
    nisa.tensor_scalar(ranked, ranked, nl.greater, place[:, 1:2])
    if initial > 0:
        nisa.memset(ranked[:, 0 : min(initial, blocks)], 1.0)
    nisa.scalar_tensor_tensor(ranked, ranked, nl.multiply, FORCED, nl.add, scores)
    nisa.range_select(
        ranked, ranked, nl.greater_equal, nl.less_equal, zero, place[:, 0:1],
        reduce_cmd=nisa.reduce_cmd.idle,
    )  # fmt: skip
    rounds = (chosen + 7) // 8
    numbers = sbuf((pairs, 8 * rounds), nl.uint32)
    best, real = sbuf((pairs, 8 * rounds), nl.float32), sbuf((pairs, chosen), nl.float32)
    for r in range(rounds):
        eight = slice(8 * r, 8 * r + 8)
        nisa.max8(best[:, eight], ranked)
        if 8 * r + 8 > chosen:
            # Equal values take the lowest places from the back: the surplus must not take part.
            nisa.memset(best[:, chosen : 8 * r + 8], -NONE)
        nisa.nc_match_replace8(spare, ranked, best[:, eight], NONE, dst_idx=numbers[:, eight])
        ranked, spare = spare, ranked
    nisa.tensor_scalar(real, best[:, 0:chosen], nl.greater_equal, 0.0)
    return numbers[:, 0:chosen], real


def units_of(numbers, real, table, parts: int):
    """Units of the chosen blocks: addresses [1, pairs * n * parts], and what they are.

    Args:
        numbers, real: [pairs, n], from `choose`.
        table: [pairs, blocks] int32, a block's place in the pool, counted in blocks.
        parts: units of a block.

    Returns:
        addresses int32, and 1 + the unit's number in its sequence [pairs, n * parts], 0 for none.
    """
    pairs, chosen = numbers.shape
    at = sbuf((pairs, chosen), nl.int32)
    index = sbuf((pairs, chosen), nl.uint32)
    nisa.tensor_copy(index, numbers)
    nisa.nc_n_gather(at, table, index)
    places = sbuf((pairs, chosen, parts), nl.int32)
    names = sbuf((pairs, chosen, parts), nl.float32)
    for part in range(parts):
        nisa.tensor_scalar(places[:, :, part], at, nl.multiply, parts, op1=nl.add, operand1=part)
        nisa.tensor_scalar(
            names[:, :, part], numbers, nl.multiply, float(parts), op1=nl.add,
            operand1=float(part + 1),
        )  # fmt: skip
        nisa.tensor_tensor(names[:, :, part], names[:, :, part], real, nl.multiply)
    addresses = sbuf((1, pairs * chosen * parts), nl.int32)
    nisa.dma_copy(addresses, places)
    return addresses, names.reshape((pairs, chosen * parts))


def visible(names, rows_of, position, unit: int):
    """How many tokens of each unit each row sees, [rows, queries, units of a pair] float32.

    Args:
        names: [pairs, units], from `units_of`.
        rows_of: [pairs, queries, rows] float32: 1 where a row is one of a pair's, and the pair has
            that query.
        position: [rows, 2]: 1 + the row's own unit; tokens of it up to the row's query.
    """
    units, (_, queries, rows) = names.shape[1], rows_of.shape
    seen = sbuf((rows, queries, units), nl.float32)
    for s in range(queries):
        for first, count in spans(units, BANK):
            bank = psum((rows, count))
            nisa.nc_matmul(
                bank, rows_of[:, s, :], names[:, first : first + count], accumulate=False
            )
            own = sbuf((rows, count), nl.float32)
            nisa.tensor_copy(own, bank)
            part = seen[:, s, first : first + count]
            # (own unit - unit) * tokens + tokens of the own one, between 0 and all of them.
            nisa.tensor_scalar(
                part, own, nl.subtract, position[:, 0:1], op1=nl.multiply, operand1=-float(unit)
            )
            nisa.tensor_scalar(
                part, part, nl.add, position[:, 1:2], op1=nl.minimum, operand1=float(unit)
            )
            nisa.tensor_scalar(own, own, nl.greater, 0.0)
            nisa.scalar_tensor_tensor(part, part, nl.maximum, 0.0, nl.multiply, own)
    return seen
