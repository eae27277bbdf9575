"""Block scores of a tile of queries against one piece of the compressed keys."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.queues import fetch
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


def load_queries(q, shift, first, count, heads, joined):
    """Transposes q's rows (query, head) and loads their shifts.

    Args:
        q: view [queries, G, D] in HBM. shift: view [pieces, queries, G] in HBM.
        first, count: of the queries; heads: (first, count) of the G heads.
        joined: the shifts are further channels, as the keys have ones there; else a tile of their
            own, the last one.

    Returns:
        One tile [channels, count * heads] per 128 channels.
    """
    start, many = heads
    dim, columns, pieces = q.shape[2], count * many, shift.shape[0]
    shifts = shift[:, first : first + count, start : start + many]
    tiles, turned_rows = [], []
    for channel, channels in spans(dim + pieces if joined else dim, PARTITIONS):
        tile = nl.ndarray((channels, columns), dtype=q.dtype, buffer=nl.sbuf)
        below = min(channels, dim - channel)
        if below > 0:
            turned_rows.append((tile[0:below, :], channel))
        if below < channels:
            fetch(tile[below:channels, :], shifts)
        tiles.append(tile)
    for place, tokens, natural in load_rows(q, first, count, heads):
        rows = tokens * many
        for tile, channel in turned_rows:
            channels = tile.shape[0]
            turned = nl.ndarray((channels, rows), dtype=q.dtype, buffer=nl.psum)
            part = natural[:, channel : channel + channels]
            nisa.nc_transpose(turned, part, engine=nisa.engine.tensor)
            nisa.tensor_copy(tile[:, place * many : place * many + rows], turned)
    if not joined:
        row = nl.ndarray((pieces, columns), dtype=shift.dtype, buffer=nl.sbuf)
        fetch(row, shifts)
        tiles.append(row)
    return tiles


def load_rows(q, first, count, heads):
    """Tiles of whole queries, at most 128 rows (query, head): (first query, queries, [rows, D]).

    All full tiles come by one DMA, whose address may be a run-time one that has its price.
    """
    start, many = heads
    dim, per = q.shape[2], PARTITIONS // many
    source = q[first : first + count, start : start + many, :]
    full = count // per
    found = []
    if full > 0:
        natural = nl.ndarray((per * many, full, dim), dtype=q.dtype, buffer=nl.sbuf)
        tiles = source[0 : full * per].reshape_dim(0, (full, per))
        fetch(natural, tiles.permute((1, 2, 0, 3)))
        for tile in range(full):
            found.append((tile * per, per, natural[:, tile, :]))
    left = count - full * per
    if left > 0:
        natural = nl.ndarray((left * many, dim), dtype=q.dtype, buffer=nl.sbuf)
        fetch(natural, source[full * per : count])
        found.append((full * per, left, natural))
    return found


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


def head_sums(queries, keys, mask, scale, group):
    """Sum over heads of p = exp(scale * (q . k + shift)), float32 [keys, queries], 0 where hidden.

    Keys are on partitions. Hidden keys may give inf, which the minimum turns into a number before
    the mask makes it 0.

    Args:
        queries: (first query, queries, heads, tiles), tiles as `load_queries` makes them.
        keys: one [channels, keys] per tile. mask: 0/1 [keys, queries of all]; None: all are seen.
        group: G, of which no sum of probabilities is more than a rounding above.
    """
    first, many, heads, tiles = queries
    count = keys[0].shape[1]
    logits = nl.ndarray((count, many * heads), dtype=nl.float32, buffer=nl.psum)
    for which in range(len(tiles)):
        nisa.nc_matmul(logits, keys[which], tiles[which], accumulate=which > 0)
    p = nl.ndarray((count, many, heads), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(p, nl.exp, logits.reshape((count, many, heads)), scale=scale)
    total = p[:, :, 0]
    if heads > 1:
        total = nl.ndarray((count, many), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_reduce(total, nl.add, p, axis=2)
    if mask is None:
        return total
    seen = nl.ndarray((count, many), dtype=nl.float32, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(
        seen, total, nl.minimum, 2.0 * group, nl.multiply, mask[:, first : first + many]
    )
    return seen


def add_shares(sums, seen, weight, first):
    """Adds [keys, queries]^T @ [keys, blocks] to rows first .. of `sums` [queries, blocks]."""
    many = seen.shape[1]
    target = sums[first : first + many, :]
    if sums.shape[0] == many:
        nisa.nc_matmul(target, seen, weight, accumulate=True)
        return
    nisa.nc_matmul(
        target, seen, weight, accumulate=True, tile_position=(0, first),
        tile_size=(PARTITIONS, 32 if many <= 32 else 64),
    )  # fmt: skip
