"""Block scores of a tile of queries against one piece of the compressed keys."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.spans import spans

PARTITIONS = 128
BANK = 512


def queries_at_once(group):
    """(queries, heads) of one matmul's moving operand: up to 512 columns.

    Queries are 128, 64 or 32, where PE may write them among the partitions of a tile.
    """
    for queries in (128, 64):
        if queries * group <= BANK:
            return queries, group
    return 32, min(group, BANK // 32)


def load_queries(q, shift, first, count, heads):
    """Transposes q's rows (query, head) and loads their shifts.

    Args:
        q: view [queries, G, D] in HBM. shift: view [pieces, queries, G] in HBM.
        first, count: of the queries; heads: (first, count) of the G heads.

    Returns:
        One tile [Dc, count * heads] per 128 channels, and [pieces, count * heads].
    """
    start, many = heads
    dim, columns = q.shape[2], count * many
    tiles = []
    for _, width in spans(dim, PARTITIONS):
        tiles.append(nl.ndarray((width, columns), dtype=q.dtype, buffer=nl.sbuf))
    for token, tokens in spans(count, PARTITIONS // many):
        rows = tokens * many
        natural = nl.ndarray((rows, dim), dtype=q.dtype, buffer=nl.sbuf)
        at = first + token
        nisa.dma_copy(natural, q[at : at + tokens, start : start + many, :])
        for which in range(len(tiles)):
            width = tiles[which].shape[0]
            turned = nl.ndarray((width, rows), dtype=q.dtype, buffer=nl.psum)
            part = natural[:, which * PARTITIONS : which * PARTITIONS + width]
            nisa.nc_transpose(turned, part, engine=nisa.engine.tensor)
            begin = token * many
            nisa.tensor_copy(tiles[which][:, begin : begin + rows], turned)
    row = nl.ndarray((shift.shape[0], columns), dtype=shift.dtype, buffer=nl.sbuf)
    nisa.dma_copy(row, shift[:, first : first + count, start : start + many])
    return tiles, row


def visible(last, first, keys, offset, count):
    """0/1 [count, queries]: key offset + p is one that the query sees.

    Args:
        last, first: float32 [128, queries], of the keys that each query sees; first None: 0.
        keys: float32 [128, 1], the piece's first key + p.
    """
    queries = last.shape[1]
    mask = nl.ndarray((count, queries), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(
        mask, last[0:count, :], nl.subtract, keys[0:count, :], op1=nl.greater_equal,
        operand1=float(offset),
    )  # fmt: skip
    if first is not None:
        after = nl.ndarray((count, queries), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_scalar(
            after, first[0:count, :], nl.subtract, keys[0:count, :], op1=nl.less_equal,
            operand1=float(offset),
        )  # fmt: skip
        nisa.tensor_tensor(mask, mask, after, nl.multiply)
    return mask


def add_tile(sums, loaded, keys, ones, weight, mask, scale, group):
    """Adds the scores of one tile of keys, of every query, to `sums` [queries, blocks] in PSUM.

    p = exp(scale * (q . k + shift)), keys on partitions; summed over the heads by VectorE; then
    the keys' shares of the blocks by a float32 matmul with `weight` [keys, blocks]. Invisible
    keys may give inf, which the minimum turns into a number before the mask makes it 0.

    Args:
        loaded: list of (first query, queries, heads, tiles, shift) as `load_queries` makes them.
        keys: one [Dc, keys] per 128 channels. ones: [pieces, 128]. mask: 0/1 [keys, queries].
        group: G, of which no sum of probabilities is more than a rounding above.
    """
    count = mask.shape[0]
    for first, queries, heads, tiles, shift in loaded:
        columns = queries * heads
        logits = nl.ndarray((count, columns), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(logits, ones[:, 0:count], shift, accumulate=False)
        for which in range(len(tiles)):
            nisa.nc_matmul(logits, keys[which], tiles[which], accumulate=True)
        p = nl.ndarray((count, queries, heads), dtype=nl.float32, buffer=nl.sbuf)
        nisa.activation(p, nl.exp, logits.reshape((count, queries, heads)), scale=scale)
        total = p[:, :, 0]
        if heads > 1:
            total = nl.ndarray((count, queries), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_reduce(total, nl.add, p, axis=2)
        seen = nl.ndarray((count, queries), dtype=nl.float32, buffer=nl.sbuf)
        nisa.scalar_tensor_tensor(
            seen, total, nl.minimum, 2.0 * group, nl.multiply, mask[:, first : first + queries]
        )
        target = sums[first : first + queries, :]
        if sums.shape[0] > queries:
            width = 32 if queries <= 32 else 64
            nisa.nc_matmul(
                target, seen, weight, accumulate=True, tile_position=(0, first),
                tile_size=(PARTITIONS, width),
            )  # fmt: skip
        else:
            nisa.nc_matmul(target, seen, weight, accumulate=True)
