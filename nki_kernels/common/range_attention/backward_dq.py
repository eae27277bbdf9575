"""Gradient of range attention with respect to q. See the package for what is computed.

Layout: as in the forward, tiles of up to 512 rows and keys on partitions. P is made again from lse,
which is a safe shift for any logits; lse and delta = rowsum(dO * O) - dlse are added as rows of the
matmuls, so that nothing is broadcast along partitions.

    for each tile of rows:
        q^T, dO^T                                                 PE transposes
        for each 128 keys:
            S^T = k q^T - lse / scale;   dP^T = v dO^T - delta    PE
            P^T = exp(scale * S^T)                                ScalarE
            dS^T = P^T * dP^T, 0 where not visible                VectorE
            dQ += dS k                                            PE
        dq = scale * dQ

Bound by PE: per 128 keys and 512 rows two shifts, S and dP by Dk and Dv, dQ by Dk: five passes of
0.22 us at 128/128, seven at 192/128 in bfloat16; VectorE takes 0.6 us beside that. Modelled: 1.35
and 1.66 us. With rows on partitions the shifts would be free, but dS would have to be transposed
for dQ, which costs a pass and two copies out of PSUM.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.range_attention.geometry import cut, query_tiles
from nki_kernels.common.range_attention.operands import (
    Chunks,
    Constants,
    hide,
    load_rows,
    query_bounds,
    shift_rows,
    store_rows,
    transpose_rows,
    visible,
)


def gradient_of_queries(grad_o, q, k_t, v_t, k, stats, bounds, reach, scale, chunk, resident):
    """dq [B, S, Hq, Dk] in q's dtype, in HBM.

    grad_o [B, S, Hq, Dv], q [B, S, Hq, Dk], k_t [B, Hkv, Dk, T], v_t [B, Hkv, Dv, T],
    k [B, T, Hkv, Dk], stats [B, S, Hq, 2] float32 (-lse, finite, and delta), bounds [S, 2];
    scale > 0. chunk, resident: as in the forward.
    """
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    dq = nl.ndarray(q.shape, dtype=q.dtype, buffer=nl.shared_hbm)
    constants = Constants(q.dtype)
    chunks = Chunks(chunk, keys, resident)
    for tile in query_tiles(batch, kv_heads, heads // kv_heads, queries, keys, reach, 4):
        chunks.select(tile.batch, tile.kv_head)
        if tile.last == tile.first:
            for p in range(tile.parts):
                zero = sbuf((tile.part(p)[1], width), q.dtype)
                nisa.memset(zero, 0.0)
                store_rows(dq, tile, p, zero)
            continue
        rows = load_tile(grad_o, q, stats, tile, constants, scale)
        limits = query_bounds(bounds, tile)
        sums = []
        for p in range(tile.parts):
            sums.append(psum((tile.part(p)[1], width), nl.float32))
        waiting = []
        for first, skipped, count in chunks.of(tile.first, tile.last - tile.first):
            loaded = (
                chunks.turned("k_t", k_t, first), chunks.turned("v_t", v_t, first),
                chunks.tiles("k", k, first, False),
            )  # fmt: skip
            place = (first, skipped, count)
            waiting = add_chunk(sums, rows, loaded, place, limits, tile, constants, scale, waiting)
        add_keys(sums, tile, waiting)
        for p in range(tile.parts):
            result = sbuf((tile.part(p)[1], width), q.dtype)
            nisa.tensor_scalar(result, sums[p], nl.multiply, scale)
            store_rows(dq, tile, p, result)
    return dq


def load_tile(grad_o, q, stats, tile, constants, scale):
    """(q^T, dO^T, row of -lse / scale, row of -delta) of a tile."""
    q_parts, grad_parts = [], []
    most = tile.part(0)[1]
    statistics = sbuf((most, tile.parts, 2), nl.float32)
    if tile.part(tile.parts - 1)[1] < most:
        nisa.memset(statistics, 0.0)
    for p in range(tile.parts):
        q_parts.append(load_rows(q, tile, p))
        grad_parts.append(load_rows(grad_o, tile, p))
        stat = load_rows(stats, tile, p)
        kept = statistics[0 : tile.part(p)[1], p, :]
        nisa.tensor_copy(kept, stat, engine=nisa.engine.vector)
    return turn_tile(q_parts, grad_parts, statistics, tile, constants, scale)


def turn_tile(q_parts, grad_parts, statistics, tile, constants, scale):
    """The same of rows in SBUF and their statistics, [rows of a part, parts, 2]."""
    shifts = sbuf((statistics.shape[0], tile.parts), nl.float32)
    nisa.tensor_scalar(shifts, statistics[:, :, 0], nl.multiply, -1.0 / scale)
    return (
        transpose_rows(q_parts, tile),
        transpose_rows(grad_parts, tile),
        shift_rows(shifts, tile, constants),
        shift_rows(statistics[:, :, 1], tile, constants),
    )


def add_chunk(sums, rows, loaded, place, limits, tile, constants, scale, waiting):
    """dQ of a chunk's keys, (first, skipped, keys) as of `Chunks.of`; k^T, v^T and k are `loaded`.

    Returns:
        dS^T whose dQ comes after the next scores, as `waiting` was of the chunk before.
    """
    first, skipped, count = place
    k_chunk, v_chunk, k_rows = loaded
    for k0, size in cut(count, 128):
        here = (skipped + k0, size, first + skipped + k0)
        grad_s = score_gradients(rows, k_chunk, v_chunk, here, limits, tile, constants, scale)
        add_keys(sums, tile, waiting)
        waiting = [(grad_s, k_rows[0:size, (skipped + k0) // 128, :], here[2])]
    return waiting


def score_gradients(rows, k_chunk, v_chunk, here, limits, tile, constants, scale):
    """dS^T [keys, columns] of up to 128 keys, unscaled, in the inputs' dtype."""
    q_t, grad_t, shift, delta = rows
    start, size, position = here
    scores = psum((size, tile.columns), nl.float32)
    shifted_product(scores, k_chunk, q_t, start, shift, constants)
    weights = sbuf((size, tile.columns), nl.float32)
    nisa.activation(weights, nl.exp, scores, scale=scale)
    products = psum((size, tile.columns), nl.float32)
    shifted_product(products, v_chunk, grad_t, start, delta, constants)
    grad_s = sbuf((size, tile.columns), q_t[0].dtype)
    nisa.tensor_tensor(grad_s, weights, products, nl.multiply)
    if not tile.sees_all(position, position + size):
        hide(grad_s, visible(limits, tile, constants, position, size), tile)
    return grad_s


def shifted_product(result, chunk, columns, start, shift, constants):
    """result [keys, columns] = chunk^T @ columns + shift, over chunks of the contraction."""
    keys = result.shape[0]
    for c in range(len(columns)):
        nisa.nc_matmul(result, chunk[c][:, start : start + keys], columns[c], accumulate=c > 0)
    nisa.nc_matmul(result, constants.ones[:, 0:keys], shift, accumulate=True)


def add_keys(sums, tile, waiting):
    """dQ += dS @ k for every part, if something waits."""
    for grad_s, k_rows, position in waiting:
        for p in range(tile.parts):
            c0, rows = tile.part(p)
            nisa.nc_matmul(
                sums[p], grad_s[:, c0 : c0 + rows], k_rows, accumulate=position != tile.first
            )
