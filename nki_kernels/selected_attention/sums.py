"""Sums of dk and dv in HBM: cleared, where each block adds to, and added up in the end."""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import sbuf
from nki_kernels.common.cores import share
from nki_kernels.common.queues import fetch
from nki_kernels.common.spans import spans


def clear(total):
    """Zeros to an HBM tensor [R, W] of float32."""
    count, width = total.shape
    height = nl.tile_size.pmax
    many = 8 * height
    zeros = sbuf((height, 8 * width), nl.float32)
    nisa.memset(zeros, 0.0)
    whole = count // many
    if whole > 0:
        view = total[0 : whole * many, :].reshape((whole, height, 8 * width))

        def one(i):
            fetch(view.select(0, i), zeros)

        nl.fori_loop(0, whole, one)
    for start, length in spans(count - whole * many, height):
        first = whole * many + start
        fetch(total[first : first + length, :], zeros[0:length, 0:width])


def rows_of(row, tokens):
    """Where the keys of a list [1, U] of pages lie: page * m + key, [keys, tiles] int32."""
    per_tile = nl.tile_size.pmax // tokens
    count = row.shape[1] // per_tile
    size = per_tile * tokens
    raw, at = sbuf((size, count), nl.int32), sbuf((size, count), nl.int32)
    within = sbuf((size, 1), nl.float32)
    for b in range(per_tile):
        own = row.reshape((1, count, per_tile))[:, :, b]
        fetch(raw[b * tokens : (b + 1) * tokens, :], own.broadcast(0, tokens))
    key = sbuf((size, per_tile), nl.float32)
    # The key's number in its page: its partition less the first one of the page.
    nisa.iota(key, [[-tokens, per_tile]], offset=0, channel_multiplier=1)
    low, high = sbuf(key.shape, nl.float32), sbuf(key.shape, nl.float32)
    nisa.tensor_scalar(low, key, nl.greater_equal, 0.0)
    nisa.tensor_scalar(high, key, nl.less, float(tokens))
    nisa.tensor_tensor(low, low, high, nl.multiply)
    nisa.tensor_tensor(key, key, low, nl.multiply)
    nisa.tensor_reduce(within, nl.add, key, axis=1)
    nisa.tensor_scalar(at, raw, nl.multiply, float(tokens), op1=nl.add, operand1=within)
    return at


@nki.jit
def backward_sum(sums_0, sums_1, sums_2, sums_3, keys: int, dk: int, dtype_of):
    """dk [keys, DK] and dv [keys, DV] in dtype_of's dtype: the first rows of four sums added up.

    Args:
        sums_0, ...: [>= keys, DK + DV] float32, in this order.
        dtype_of: any tensor.
    """
    width = sums_0.shape[1]
    dks = nl.ndarray((keys, dk), dtype=dtype_of.dtype, buffer=nl.shared_hbm)
    dvs = nl.ndarray((keys, width - dk), dtype=dtype_of.dtype, buffer=nl.shared_hbm)
    height = min(keys, nl.tile_size.pmax)
    whole = keys // height * height
    blocks = []
    for tensor in (sums_0, sums_1, sums_2, sums_3, dks, dvs):
        view = tensor[0:whole, :]
        blocks.append(view.reshape((whole // height, height, tensor.shape[1])))

    def one(i):
        rows = []
        for view in blocks:
            rows.append(view.select(0, i))
        add_up(rows, height, dk)

    first, number = share(whole // height)
    nl.fori_loop(first, first + number, one)
    if whole < keys:
        rows = []
        for tensor in (sums_0, sums_1, sums_2, sums_3, dks, dvs):
            rows.append(tensor[whole:keys, :])
        add_up(rows, keys - whole, dk)
    return dks, dvs


def add_up(rows, count, dk):
    """rows: views [count, N] of the four sums, of dk and of dv."""
    width = rows[0].shape[1]
    total = sbuf((count, width), nl.float32)
    fetch(total, rows[0])
    for other in rows[1:4]:
        more = sbuf((count, width), nl.float32)
        fetch(more, other)
        nisa.tensor_tensor(total, total, more, nl.add)
    for target, first, last in ((rows[4], 0, dk), (rows[5], dk, width)):
        out = sbuf((count, last - first), target.dtype)
        nisa.tensor_copy(out, total[:, first:last])
        fetch(target, out)
