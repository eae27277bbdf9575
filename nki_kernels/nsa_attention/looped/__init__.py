"""The same in a hardware loop, for lengths whose unrolled programs no compiler takes.

Tiles before the loop's first group, where blocks are few, are unrolled as in the other kernel; they
come behind it, since the first turns of the loop write rows before its first tile. Modules:
`groups`, the loop and its order; `chunks`, the compressed branch in an inner loop; `scores`, what
its shares make of blocks; `lists`, what queries chose; `rest`, the window and the selected branch;
`sizes`.

What differs: shares wait in HBM for their rows' sums (SBUF has no room for those of four tiles, and
no compute engine writes to run-time addresses), and are summed over heads beside the next pair's
products; listed blocks come by rows only, 48 at once, those of longer lists in an inner loop, so no
tile is `crowded`; a list is made by one instruction of GpSimd.

Modelled as the other, ns per (query, kv head) of 256K tokens: 2,152 at 55K and 3,892 at 207K, where
the unrolled program takes 1,445 and 3,442. Chunks of 1,024 compressed keys are visited whole, at
55K a fifth of that work, at 207K 3 %, and all tiles rank as many blocks as the last. Of a group at
207K, 496 us: PE 453, VectorE 382, ScalarE 352, the queue of sync 339, GpSimd 93 and its queue 114.
Weighed: chunks of 512 keys (300 ns of every engine per turn, and six DMAs of 1.6 us);
sums of products kept in PSUM over the loop (AWS's compiler is reported to refuse it).
"""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import sbuf
from nki_kernels.common.cores import share
from nki_kernels.nsa_attention.again import Scratch, Tables, do_again
from nki_kernels.nsa_attention.constants import Constants
from nki_kernels.nsa_attention.crowded import do_crowded
from nki_kernels.nsa_attention.flagged import AT_ONCE, clear, clear_behind
from nki_kernels.nsa_attention.geometry import BLOCKS_OF_KEYS, QUERIES, Geometry, tiles_of
from nki_kernels.nsa_attention.lane import Lane
from nki_kernels.nsa_attention.looped.groups import Groups, Kept
from nki_kernels.nsa_attention.looped.sizes import CHUNK as CHUNK_TILES
from nki_kernels.nsa_attention.looped.sizes import GROUP
from nki_kernels.nsa_attention.pipeline import Pipeline
from nki_kernels.nsa_attention.rows import Numbers
from nki_kernels.nsa_attention.running import CHUNK

TOKENS = GROUP * QUERIES
OF_CHUNK = CHUNK_TILES * BLOCKS_OF_KEYS  # blocks


@nki.jit
def forward_looped(
    q_t, chunks, k_cmp_t, v_cmp, pages, rows, k_win_t, v_win, near, gates, shifts, marks, trips,
    turns, starts, weights, heads, same, slot_keys, slot_lanes,
    batch: int, group: int, block: int, count: int, initial: int, local: int, window: int,
    past: int, tokens: int, begin: int, ahead: int, paired: bool, queues: tuple, by_rows: tuple,
    scale: float,
):  # fmt: skip
    """o [B, 32 * (tiles + 5), Hq, DV] in q's dtype; what the first 128 and the last 32 rows hold
    means nothing.

    Args: those of `forward`, for whole groups of four tiles from `begin` on, and

        q_t, gates, shifts: eight tiles more than there are.
        chunks: [LANES, runs + 1, 2, 128, columns], see `chunks`: compressed keys and values by
            CHUNK tiles, as many as there are blocks that are ranked, and one.
        near: [LANES, tiles of keys + 1, 128, columns], see `rest.Rest`.
        turns: int32 [groups + 1, 4], of either half of a group: chunks that all of its queries see,
            and in all.
        starts: float32 [groups + 2, 4]: of the next pair, see `chunks.Chunks.begin`; and the last
            block that the pair before may choose; in the last row of the first pair.
        begin: group of 128 tokens, of all, that the loop begins with.
    """
    lanes = q_t.shape[0]
    kv_heads, groups = lanes // batch, turns.shape[0] - 1
    dv, slots = v_cmp.shape[2] - 1, slot_keys.shape[0]
    geometry = Geometry(group, block, count, initial, local, window, slots, by_rows, past, tokens)
    short = min(tokens, TOKENS * begin)
    before = Geometry(group, block, count, initial, local, window, slots, by_rows, past, short)
    first = (TOKENS * begin - before.first) // QUERIES
    before.tiles = first
    geometry.padded = OF_CHUNK * (chunks.shape[1] - 1)
    before.behind = geometry.tiles = geometry.behind = first + GROUP * groups
    tiles, crowds = geometry.tiles, before.crowded_from() < first
    o = nl.ndarray(
        (batch, QUERIES * (tiles + GROUP + 1), kv_heads * group, dv), dtype=q_t.dtype,
        buffer=nl.shared_hbm,
    )  # fmt: skip
    flagged = tiles if tiles <= AT_ONCE else (tiles + AT_ONCE - 1) // AT_ONCE * AT_ONCE
    flags = nl.ndarray((lanes, 2, 2 * GROUP + flagged), dtype=nl.float32, buffer=nl.private_hbm)
    shape = (max(1, first), before.padded, QUERIES)
    turned = nl.ndarray(shape, dtype=q_t.dtype, buffer=nl.private_hbm)
    shape = (first if crowds else 1, geometry.rows, geometry.parts, dv)
    others = nl.ndarray(shape, dtype=nl.float32, buffer=nl.private_hbm)
    lists = nl.ndarray((max(1, first), slots), dtype=nl.int32, buffer=nl.private_hbm)
    constants = Constants(weights, heads, same, slot_keys, slot_lanes)
    tables = Tables(marks, trips)
    kept = Kept(geometry, chunks.shape[1] - 1)
    own, number = share(lanes)
    done = []
    for lane in range(own, own + number):
        b, head = divmod(lane, kv_heads)
        every = o[b, :, head * group : (head + 1) * group, :]
        tensors = Lane(
            q_t[lane], k_cmp_t[lane], v_cmp[lane], pages[lane], rows[lane], k_win_t[lane],
            v_win[lane], gates[lane], shifts[lane], every[TOKENS:],
            flags[lane, :, 2 * GROUP :], (turned, others),
        )  # fmt: skip
        tensors.loop(
            chunks[lane], near[lane], turns, starts, every[QUERIES * first :],
            flags[lane, 0:1, first : 2 * GROUP + tiles],
        )  # fmt: skip
        clear_behind(geometry, tensors.o)
        clear(every[0:TOKENS])
        if flagged > tiles:
            none = sbuf((1, flagged - tiles), nl.float32)
            nisa.memset(none, 0.0)
            nisa.dma_copy(tensors.unsafe[:, tiles:flagged], none)
        Groups(geometry, constants, tensors, scale, kept, begin, first, groups).run()
        if first > 0:
            pipeline = Pipeline(
                before, constants, tensors, turned, lists, scale, queues, tiles_of(before, paired),
                ahead,
            )  # fmt: skip
            pipeline.run()
        if crowds:
            numbers = Numbers(before.parts, before.padded, constants, q_t.dtype)
            do_crowded(before, constants, tensors, tables, numbers, scale)
        done.append(tensors)
    scratch = Scratch(k_cmp_t.shape[2] // CHUNK, q_t.dtype)
    for tensors in done:
        do_again(geometry, constants, tensors, tables, scratch, scale)
    return o
