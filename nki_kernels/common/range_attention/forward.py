"""Forward of range attention: o and lse. See the package for what is computed.

Dimensions: B batches, S queries, T keys, Hq = G * Hkv heads, Dk and Dv up to 256.
Layout: a tile is up to 512 rows (queries x heads of one kv head, 4 parts of 128). Scores have keys
on partitions (S^T form), so P needs no transpose, and the row sum is a column of ones in V.

    for each group of tiles:
        fast:  P^T = exp(scale * k q^T - U) with one U for the tile, an upper bound of its logits
        if a row's sum fell below 1e-18 on some core:             a loop of 0 or 1 turns
            exact: the same tiles again, the shift being each row's maximum

`fast` and `exact` say what each costs. The device chooses by what came out, so the result is right
for any logits: nothing overflows below an upper bound, and a sum that is large enough has lost
nothing. Exact from the start are tiles that may hold rows without keys, packed batches, float16
(whose P would need 11 bits), and the last pair of an odd number of queries, whose middle one two
cores write, so that its bits must not hang on its tile. Both cores of an lnc 2 launch take the
same way.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import sbuf
from nki_kernels.common.cores import this_core
from nki_kernels.common.range_attention import exact
from nki_kernels.common.range_attention.fast import Fast
from nki_kernels.common.range_attention.geometry import query_tiles
from nki_kernels.common.range_attention.looped_forward import attend_looped
from nki_kernels.common.range_attention.operands import Chunks, Constants, store_rows
from nki_kernels.common.range_attention.source import Source, largest_of

PAIRS = 8  # pairs of tiles that are redone together


def attend(
    q, k_t, v, bounds, largest_key, trips, bases, reach, scale, chunk, resident, looped
):  # fmt: skip
    """o [B, S, Hq, Dv] in q's dtype and lse [B, S, Hq, 1] float32, in HBM.

    q [B, S, Hq, Dk], k_t [B, Hkv, Dk, T], v [B, T, Hkv, Dv], bounds [S, 2], largest_key [B, Hkv]
    float32: the largest norm of a kv head's keys; scale > 0.
    chunk: keys per load, a multiple of 512. resident: keys of a kv head that SBUF may hold.
    trips, bases, looped: of `loops.Loops`, or None, None and () for an unrolled program.
    """
    if len(looped) > 0:
        return attend_looped(q, k_t, v, bounds, largest_key, trips, bases, scale, looped)
    batch, queries, heads, _ = q.shape
    kv_heads, keys = k_t.shape[1], k_t.shape[3]
    o = nl.ndarray((batch, queries, heads, v.shape[3]), dtype=q.dtype, buffer=nl.shared_hbm)
    lse = nl.ndarray((batch, queries, heads, 1), dtype=nl.float32, buffer=nl.shared_hbm)
    constants = Constants(q.dtype)
    source = Source(k_t, v, Chunks(chunk, keys, resident))
    fast = Fast(q, bounds, largest_key, o, lse, source, constants, scale)
    waiting = []
    for tile in query_tiles(batch, kv_heads, heads // kv_heads, queries, keys, reach, 4):
        if len(waiting) > 0 and tile.pair >= waiting[0].pair + PAIRS:
            attend_group(fast, waiting)
            waiting = []
        if tile.last == tile.first:
            write_dead(o, lse, tile, constants)
        elif q.dtype == nl.float16 or tile.overlaps or not tile.all_alive:
            source.chunks.select(tile.batch, tile.kv_head)
            exact.attend_tile(q, bounds, o, lse, tile, source, constants, scale)
        else:
            waiting.append(tile)
    if len(waiting) > 0:
        attend_group(fast, waiting)
    return o, lse


def attend_group(fast, tiles):
    """Tiles the fast way, and all of them the exact way if some row asks for it."""
    turns = nisa.register_alloc()
    nisa.register_load(turns, worst_of_cores(fast.attend(tiles)))

    def redo(_):
        # Chunks of its own: what a loop's body loads stays in it.
        chunks = Chunks(fast.source.chunks.size, fast.source.chunks.keys, 0)
        again = Source(fast.source.k_t, fast.source.v, chunks)
        for tile in tiles:
            again.chunks.select(tile.batch, tile.kv_head)
            exact.attend_tile(
                fast.q, fast.bounds, fast.o, fast.lse, tile, again, fast.constants, fast.scale
            )

    nl.fori_loop(0, turns, redo)


def worst_of_cores(unsafe):
    """1 as int32 [1, 1] if a row of [128, columns] on either core is unsafe, else 0."""
    count = largest_of(unsafe)
    core, cores = this_core()
    if cores == 2:
        other = sbuf((1, 1), nl.float32)
        nisa.sendrecv(
            src=count, dst=other, send_to_rank=1 - core, recv_from_rank=1 - core, pipe_id=0
        )
        nisa.tensor_tensor(count, count, other, nl.maximum)
    flag = sbuf((1, 1), nl.int32)
    nisa.tensor_scalar(flag, count, nl.minimum, 1.0)
    return flag


def write_dead(o, lse, tile, constants):
    """A tile whose rows see nothing: o = 0, lse = -inf."""
    for p in range(tile.parts):
        rows = tile.part(p)[1]
        zero = sbuf((rows, o.shape[3]), o.dtype)
        nisa.memset(zero, 0.0)
        store_rows(o, tile, p, zero)
        store_rows(lse, tile, p, constants.minus_infinity[0:rows, :])
