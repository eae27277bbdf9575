"""Forward of a tile of rows for any logits: the shift is the exact maximum of each row.

    q^T                                                           PE transposes
    1. m = max of the visible logits of each row, from S (rows on partitions):
       for each 512 keys, each part:  S = q k^T;  range_select(S, lo, hi) -> max, sum of exp
    2. for each 128 keys:             S^T = k q^T - m;  P^T = exp(scale * S^T)
                                      at the edges of the ranges: P^T = 0 where not visible
                                      o += P v, sum += P 1
    o = o / sum, lse = m * scale + log(sum); rows that see nothing: 0 and -inf

The shift of a row lies along the free dim of S^T: it is added inside the matmul as one to three
more contraction rows, exact in float32. Hidden keys never touch the maximum, and what overflows
among them is replaced, not multiplied.
Bound by PE, per 128 keys and 512 rows: scores twice (once or twice each by Dk), shift, P V; 1.1 us
at 128/128, 1.5 us at 192/128 in bfloat16. The two halves are bound by VectorE (0.75 us) and by PE;
they do not overlap. One pass with a running maximum would have to transpose P on PE and to rescale
o on VectorE, which then takes 0.9 us: no gain at 128/128.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.range_attention.geometry import cut
from nki_kernels.common.range_attention.operands import (
    SMALLEST_SUM,
    hide,
    load_rows,
    query_bounds,
    row_bounds,
    shift_rows,
    store_rows,
    transpose_rows,
    visible,
)

NOTHING_SEEN = -1e30  # below any logit, above range_select's fill
GROUP = 2  # tiles of keys per exponential


def attend_tile(q, bounds, o, lse, tile, source, constants, scale):
    """One tile of rows that sees some keys."""
    rows = []
    for p in range(tile.parts):
        rows.append(load_rows(q, tile, p))
    q_t = transpose_rows(rows, tile)
    by_row = []
    for p in range(tile.parts):
        by_row.append(row_bounds(bounds, tile, p))
    maxima, totals = block_columns(q_t, by_row, tile, source, scale, 0)
    largest, total = row_statistics(maxima, totals, tile, scale)
    shift = shift_rows(largest, tile, constants)
    limits = query_bounds(bounds, tile)
    sums = weighted_sums(q_t, shift, limits, tile, source, constants, scale)
    for p in range(tile.parts):
        finish_part(o, lse, tile, p, sums[p], largest, total, constants, scale)


def row_statistics(maxima, totals, tile, scale):
    """What a row's softmax needs, of `block_columns`, float32.

    Returns:
        largest [rows of a part, parts]: the largest visible logit before scaling; 0 if none.
        total: the sum of exp(scale * (logit - largest)); 0 if none.
    """
    rows = tile.part(0)[1]
    largest, total = sbuf((rows, tile.parts), nl.float32), sbuf((rows, tile.parts), nl.float32)
    if tile.part(tile.parts - 1)[1] < rows:
        nisa.memset(largest, 0.0)
    for p in range(tile.parts):
        rows = tile.part(p)[1]
        of_part = largest[0:rows, p : p + 1]
        merge_blocks(maxima[p], totals[p], of_part, total[0:rows, p : p + 1], scale)
        # A row that sees nothing has range_select's fill, which is no shift.
        nisa.scalar_tensor_tensor(of_part, of_part, nl.greater, NOTHING_SEEN, nl.multiply, of_part)
    return largest, total


def block_columns(q_t, limits, tile, source, scale, spare):
    """Statistics of the logits with rows on partitions, of blocks of up to 512 keys, float32.

    Returns:
        For each part [rows, blocks + spare], the first `spare` columns unwritten: the largest
        visible logit before scaling, and the sum of exp(scale * (logit - largest)).
    """
    chunks = source.chunks.of(tile.first, tile.last - tile.first)
    blocks = spare
    for _, _, count in chunks:
        blocks += len(cut(count, 512))
    maxima, totals = [], []
    for p in range(tile.parts):
        rows = tile.part(p)[1]
        maxima.append(sbuf((rows, blocks), nl.float32))
        totals.append(sbuf((rows, blocks), nl.float32))
    block = spare
    for first, skipped, count in chunks:
        k_t = source.keys(first)
        for k0, width in cut(count, 512):
            start = skipped + k0
            for p in range(tile.parts):
                c0, rows = tile.part(p)
                scores = psum((rows, width), nl.float32)
                for c in range(len(q_t)):
                    keys = k_t[c][:, start : start + width]
                    nisa.nc_matmul(scores, q_t[c][:, c0 : c0 + rows], keys, accumulate=c > 0)
                here = (block, first + start)
                block_statistics(scores, limits[p], here, maxima[p], totals[p], scale)
            block += 1
    return maxima, totals


def block_statistics(scores, limits, here, maxima, totals, scale):
    """The maximum of a block of logits [rows, keys] and the sum of exponentials below it."""
    block, first_key = here
    seen = sbuf(scores.shape, nl.float32)
    largest = maxima[:, block : block + 1]
    nisa.range_select(
        seen,
        scores,
        nl.greater_equal,
        nl.less,
        limits[:, 0:1],
        limits[:, 1:2],
        reduce_res=largest,
        range_start=first_key,
    )
    # Far above range_select's fill, so that hidden keys count 0 where a row sees nothing.
    bias = sbuf((scores.shape[0], 1), nl.float32)
    nisa.tensor_scalar(bias, largest, nl.maximum, NOTHING_SEEN, op1=nl.multiply, operand1=-scale)
    ignored = sbuf(scores.shape, nl.bfloat16)
    nisa.activation_reduce(
        ignored, nl.exp, seen, nl.add, totals[:, block : block + 1], bias=bias, scale=scale
    )


def merge_blocks(maxima, totals, largest, total, scale):
    """Statistics of whole rows from those of their blocks [rows, blocks]."""
    rows = maxima.shape[0]
    nisa.tensor_reduce(largest, nl.maximum, maxima, axis=1)
    bias = sbuf((rows, 1), nl.float32)
    nisa.tensor_scalar(bias, largest, nl.maximum, NOTHING_SEEN, op1=nl.multiply, operand1=-scale)
    weights = sbuf(maxima.shape, nl.float32)
    nisa.activation(weights, nl.exp, maxima, bias=bias, scale=scale)
    nisa.tensor_tensor(weights, weights, totals, nl.multiply)
    nisa.tensor_reduce(total, nl.add, weights, axis=1)


def weighted_sums(q_t, shift, limits, tile, source, constants, scale):
    """P @ [v | 1] of every part in PSUM, with P = exp(scale * (logits - shift)) where visible."""
    sums = []
    for p in range(tile.parts):
        sums.append(psum((tile.part(p)[1], source.v.shape[3] + 1), nl.float32))
    waiting = []  # the group whose P @ V comes after the next group's scores
    for first, skipped, count in source.chunks.of(tile.first, tile.last - tile.first):
        k_t = source.keys(first)
        v = source.values(first)
        for k0, width in cut(count, 128 * GROUP):
            key0 = skipped + k0
            weights = weights_of(
                q_t, shift, limits, tile, constants, scale, k_t, first, key0, width
            )
            if len(waiting) > 0:
                add_values(sums, tile, waiting[0], waiting[0][1] == tile.first)
                waiting = []
            waiting.append((weights, first + key0, v, key0))
    add_values(sums, tile, waiting[0], waiting[0][1] == tile.first)
    return sums


def weights_of(q_t, shift, limits, tile, constants, scale, k_t, first, key0, width):
    """P^T of `width` keys from chunk position key0, as a list of [keys, columns]."""
    tiles = cut(width, 128)
    columns = tile.columns
    scores = psum((128, GROUP, 512), nl.float32)
    weights = sbuf((128, GROUP, columns), q_t[0].dtype)
    found = []
    for j, (k0, keys) in enumerate_list(tiles):
        score = scores[0:keys, j, 0:columns]
        for c in range(len(q_t)):
            k_part = k_t[c][:, key0 + k0 : key0 + k0 + keys]
            nisa.nc_matmul(score, k_part, q_t[c], accumulate=c > 0)
        nisa.nc_matmul(score, constants.ones[:, 0:keys], shift, accumulate=True)
        found.append(weights[0:keys, j, :])
    if width % 128 == 0:
        whole = len(tiles)
        nisa.activation(weights[:, 0:whole, :], nl.exp, scores[:, 0:whole, 0:columns], scale=scale)
    else:
        for j, (_, keys) in enumerate_list(tiles):
            nisa.activation(found[j], nl.exp, scores[0:keys, j, 0:columns], scale=scale)
    for j, (k0, keys) in enumerate_list(tiles):
        position = first + key0 + k0
        if not tile.sees_all(position, position + keys):
            hide(found[j], visible(limits, tile, constants, position, keys), tile)
    return found


def enumerate_list(items):
    """(index, item) pairs: `enumerate` is not in the compiled subset."""
    found = []
    for i in range(len(items)):
        found.append((i, items[i]))
    return found


def add_values(sums, tile, group, opening):
    """Adds a group's P @ [v | 1] to the sums of every part."""
    weights, _, v, key0 = group
    for j in range(len(weights)):
        keys = weights[j].shape[0]
        for p in range(tile.parts):
            c0, rows = tile.part(p)
            nisa.nc_matmul(
                sums[p],
                weights[j][:, c0 : c0 + rows],
                v[0:keys, key0 // 128 + j, :],
                accumulate=not (opening and j == 0),
            )


def finish_part(o, lse, tile, p, sums, largest, total, constants, scale):
    """Divides by the row sums and writes o and lse of a part.

    o is divided by the sum of what PE multiplied v with, rounded to the inputs' dtype; lse has the
    float32 sum.
    """
    rows, width = tile.part(p)[1], o.shape[3]
    inverse = sbuf((rows, 1), nl.float32)
    nisa.tensor_scalar(inverse, sums[:, width : width + 1], nl.maximum, SMALLEST_SUM)
    nisa.reciprocal(inverse, inverse)
    result = sbuf((rows, width), o.dtype)
    nisa.tensor_scalar(result, sums[:, 0:width], nl.multiply, inverse)
    store_rows(o, tile, p, result)
    row_total = total[0:rows, p : p + 1]
    logarithm = sbuf((rows, 1), nl.float32)
    nisa.tensor_scalar(logarithm, row_total, nl.maximum, SMALLEST_SUM)
    nisa.activation(logarithm, nl.log, logarithm)
    row_lse = sbuf((rows, 1), nl.float32)
    nisa.scalar_tensor_tensor(
        row_lse, largest[0:rows, p : p + 1], nl.multiply, scale, nl.add, logarithm
    )
    dead = sbuf((rows, 1), nl.uint16)
    nisa.tensor_scalar(dead, row_total, nl.equal, 0.0)
    nisa.tensor_copy_predicated(row_lse, constants.minus_infinity[0:rows, :], dead)
    store_rows(lse, tile, p, row_lse)
