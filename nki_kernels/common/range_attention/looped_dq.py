"""Gradient with respect to q in hardware loops, as `looped_forward` runs the forward.

for each kv head, each group of queries:                        hardware loop
    q^T, dO^T, rows of -lse / scale and -delta of each tile     as in `backward_dq`
    for each chunk of keys:                                     five hardware loops
        for each tile of the group, each 128 keys:              as in `backward_dq`
        acc += dS k                                             from PSUM to SBUF, VectorE
    dq = scale * acc
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.queues import fetch
from nki_kernels.common.range_attention.backward_dq import add_chunk, add_keys, turn_tile
from nki_kernels.common.range_attention.geometry import queries_per_part
from nki_kernels.common.range_attention.loops import (
    PARTS,
    Edges,
    Loops,
    by_part,
    chunks_of,
    columns_of_chunk,
    for_all_chunks,
    lanes,
    load_group,
    of_group,
    rows_of_chunk,
    tiles_of_group,
)
from nki_kernels.common.range_attention.operands import Constants


def gradient_of_queries(grad_o, q, k_t, v_t, k, stats, bounds, trips, bases, scale, looped):
    """dq [B, S, Hq, Dk], as `backward_dq.gradient_of_queries`; S, T, and the tables and sizes as of
    `looped_forward`."""
    batch, _, heads, _ = q.shape
    dq = nl.ndarray(q.shape, dtype=q.dtype, buffer=nl.shared_hbm)
    constants = Constants(q.dtype)
    loops = Loops(trips, bases, looped)
    constants.keep_positions(loops.small)
    kv_heads = k.shape[2]
    for b, h, h0, own in lanes(batch, kv_heads, heads // kv_heads):
        part = slice(h0, h0 + own)
        rows = (grad_o[b, :, part, :], q[b, :, part, :], stats[b, :, part, :], dq[b, :, part, :])
        keys = (k_t[b, h], v_t[b, h], k[b, :, h, :])
        all_groups(rows, keys, bounds, loops, constants, scale)
    return dq


def all_groups(rows, keys, bounds, loops, constants, scale):
    """dq of this core's groups of a lane; arguments as `one_group`'s, of all groups."""
    size = loops.queries(rows[0].shape[1])

    def turn(i):
        own = []
        for view in rows:
            own.append(of_group(view, size, i))
        tables = (
            of_group(bounds, size, i), of_group(loops.trips, 1, i)[0],
            of_group(loops.bases, 1, i)[0],
        )  # fmt: skip
        one_group(own, keys, tables, loops, constants, scale)

    loops.for_all_groups(rows[0].shape[0] // size, turn)


def one_group(rows, keys, tables, loops, constants, scale):
    """dq of a group.

    rows: its grad_o, q, stats and dq; keys: k^T, v^T and k; tables: its bounds, trips and bases.
    """
    heads, width = rows[1].shape[1], rows[1].shape[2]
    per_part = queries_per_part(heads)
    loaded = []
    for view in rows[0:3]:
        loaded.append(load_group(view, per_part, "y"))
    edges = Edges(tables[0])
    acc = sbuf((per_part * heads, loops.tiles * PARTS, width), nl.float32)
    nisa.memset(acc, 0.0, engine=nisa.engine.gpsimd)
    turned = []
    tiles = tiles_of_group(loops, heads, loops.small, False)
    for r in range(len(tiles)):
        q_parts, grad_parts = [], []
        for p in range(r * PARTS, (r + 1) * PARTS):
            q_parts.append(loaded[1][:, p, :])
            grad_parts.append(loaded[0][:, p, :])
        statistics = loaded[2][:, r * PARTS : (r + 1) * PARTS, :]
        turned.append(turn_tile(q_parts, grad_parts, statistics, tiles[r], constants, scale))

    def visit(size, j, limits):
        of_chunk = (
            columns_of_chunk(keys[0], size, j), columns_of_chunk(keys[1], size, j),
            rows_of_chunk(keys[2], size, j),
        )  # fmt: skip
        add(turned, of_chunk, size, limits, loops, heads, constants, scale, acc)

    for_all_chunks(loops, tables[1], tables[2], keys[0].shape[1], edges, visit)
    result = sbuf(acc.shape, rows[3].dtype)
    for p in range(acc.shape[1]):
        engine = nisa.engine.vector if p % 2 == 0 else nisa.engine.scalar
        nisa.tensor_scalar(result[:, p, :], acc[:, p, :], nl.multiply, scale, engine=engine)
    fetch(by_part(rows[3], per_part), result, "a")


def add(turned, of_chunk, size, limits, loops, heads, constants, scale, acc):
    """Adds dQ of a chunk of `size` keys to `acc` for each tile of the group."""
    chunks = chunks_of(size)
    tiles = tiles_of_group(loops, heads, size, limits is None)
    for r in range(len(tiles)):
        tile, waiting, sums = tiles[r], [], []
        for _ in range(PARTS):
            sums.append(psum((acc.shape[0], acc.shape[2]), nl.float32))
        own = limits
        if limits is not None:
            own = limits[:, tile.t0 : tile.t0 + tile.count, :]
        for first, skipped, count in chunks.of(0, size):
            loaded = (
                chunks.turned("k_t", of_chunk[0], first), chunks.turned("v_t", of_chunk[1], first),
                chunks.tiles("k", of_chunk[2], first, False),
            )  # fmt: skip
            place = (first, skipped, count)
            waiting = add_chunk(
                sums, turned[r], loaded, place, own, tile, constants, scale, waiting
            )
        add_keys(sums, tile, waiting)
        for p in range(PARTS):
            column = acc[:, r * PARTS + p, :]
            nisa.tensor_tensor(column, column, sums[p], nl.add)
