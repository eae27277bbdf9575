"""Native Sparse Attention, forward, in one kernel: three branches, the choice, the gated sum.

Dimensions: per kv head, tiles of 32 queries x G heads = C columns (G <= 16, C <= 512); Dk up to
192, Dv up to 128; l up to 64, d = 16, m = 64. Positions are compile-time integers.
Layout: keys on partitions, S^T = K q^T [128 keys, C] for all branches, so P^T is PE's stationary
operand of P @ [v | 1] as it is. One shift per tile and branch is the exponential's bias: an upper
bound of the logits (norms of queries and keys), so that nothing overflows.

    for each tile of queries, `ahead` tiles before the rest:
        for each 128 compressed keys:
            P^T = exp(scale * S^T - U), float32                            PE, ScalarE
            o += P @ [v | 1]; shares += P @ [W | 1], P as two bfloat16      PE, VectorE
        scores = sum over heads of shares / row sum, float32               PE
        the best n without the forced ones: rounds of max8                 VectorE
        list: the union over 32 queries, again by max8; a mask per block   PE, VectorE
    for each tile of queries:
        gather the listed blocks, as pages or by rows, two tiles ahead     run-time addresses on DMA
        for each 128 keys of w:    S^T, masks only where a query's window begins or ends; P^T;
                                   o += P @ [v | 1]
        for each two blocks:       the same, what hides them added by PE
        o = sum over branches of gate / row sum * o, written once
    for each tile with more blocks than its list has places:               hardware loops, `crowded`
        the selected branch, from lists of any length, one for every 128 rows
    for each tile with a row whose sum is too small beside the bound:      hardware loops, `again`
        all of it, with each row's exact maximum, whatever the union

Modules: `geometry` (tiles, plain integers), `work` (a tile on its way), `compressed`, `selected`,
`window` (the branches), `choose`, `unite`, `pipeline` (the order of everything), `constants`,
`flags`; `flagged` (tiles once more), `crowded` with `rows`, `again` with `running`.

What must be right does not hang on luck: block scores are float32 (P's upper and lower halves are
two bfloat16, 16 of 24 bits; the row sum comes from the same); forced blocks have fixed places;
equal scores go to the lowest block; the device itself finds which tiles it must do again.

Program: unrolled, 550 to 2,800 instructions per tile of queries between 8K and 256K tokens, and
1,600 to 2,400 per kv head for `again`, 400 to 600 for `crowded`. Where that is more than AWS's
compiler takes, `looped` does the same in hardware loops: 11,000 to 12,500 instructions per kv head
whatever the length, up to 1M tokens. HBM of a core keeps what the
queries of a kv head chose, 64 bytes per tile and block, and their output without the selected
branch, in float32: 134 and 537 MB at 64K tokens. SBUF keeps all compressed keys up to 8,192 (128K
tokens); beyond, they are loaded ahead, eight tiles at a time, for each tile of queries. What ends
at 256K tokens is the room for shares, which stay for all 512 rows until the rows' sums are known:
64 KB per partition.

Modelled with G = 16, 192/128, n = 16, 48 places per list, bfloat16, ns per (query, kv head) at a
position, and what is busy (central value of the cycle model; not run on hardware):

| position | time | PE | VectorE | ScalarE | queues of sync, ScalarE, GpSimd |
|---|---|---|---|---|---|
| 6.5K | 917 | 703 | 605 | 568 | 355, 118, 340 |
| 52K | 1407 | 1296 | 1058 | 1049 | 1250, 350, 879 |
| 207K | 3442 | 3225 | 2805 | 2326 | 1150, 500, 814 (with ScalarE's queue) |

Up to 32K tokens run-time DMA of 45 pages would bound it (1080 at 6.5K); so there 32 of the blocks
come by rows (`by_rows`), for which PE makes 24 transposes and VectorE 4 copies per tile. Then PE:
0.84 us per 128 compressed keys (S^T 0.33, P V 0.23, shares 0.23, sum over heads 0.05), 0.62 us per
two blocks. ScalarE gives time to DMA only beside compressed branches of up to 47 tiles of keys. A
tile done `again` takes 0.36 ms at 6.5K and 0.56 ms at 52K, ten times what it takes otherwise: one
in a hundred would cost a tenth. One whose union is longer than its list takes 0.11 ms more at 52K.
Weighed:
- Ranking with a query per lane, and unions with a tile per lane, take VectorE 25 and 14 us per tile
  of queries at the end of 256K; in four chunks, and by pieces of 128 blocks, 9 and 5.
- Shares as a float32 product of P: PE 0.45 us instead of 0.23, but without VectorE's 0.6 us for P's
  lower halves: PE bound since VectorE ranks in chunks.
- Shares with W stationary, blocks on partitions: 0.42 us of PE with the row sums, and two more
  passes of VectorE, as the sum over heads is then along the free dim.
- Shares of bfloat16 P alone are cheaper by 0.12 us, but choose another block in 4 %
  of a prototype's queries.
- Lists of 40 places: about 130 ns less where DMA bounds, but a fifth of the tiles must be done
  again when 5 % of a query's blocks are new; with 48, one in a hundred if they come independently.
- Blocks by rows everywhere: 7 % slower at 52K, where PE bounds it (but 20 % faster at the high end
  of the band). Of all blocks: the own one would need masks by token.
- Long unions against all keys, masked by PE, in hardware loops: 0.25 ms at 52K by products alone;
  against the union of 32 queries, gathered by rows: 0.12 ms; of 8 queries: 0.05, 0.08 as it runs.
- Masks of selected blocks multiplied by VectorE instead of added by PE: 12 us of VectorE per tile.
- The statistics of `again` before the pipeline, for shifts that are always safe: all logits twice.
"""

import nki
import nki.language as nl

from nki_kernels.common.cores import share, this_core
from nki_kernels.nsa_attention.again import Scratch, Tables, do_again
from nki_kernels.nsa_attention.constants import Constants
from nki_kernels.nsa_attention.crowded import do_crowded
from nki_kernels.nsa_attention.flagged import clear_behind
from nki_kernels.nsa_attention.geometry import QUERIES, Geometry, tiles_of
from nki_kernels.nsa_attention.lane import Lane
from nki_kernels.nsa_attention.looped import forward_looped as forward_looped
from nki_kernels.nsa_attention.pipeline import Pipeline
from nki_kernels.nsa_attention.rows import Numbers
from nki_kernels.nsa_attention.running import CHUNK


@nki.jit
def forward(
    q_t, k_cmp_t, v_cmp, pages, rows, k_win_t, v_win, gates, shifts, marks, trips, weights, heads,
    same, slot_keys, slot_lanes,
    batch: int, group: int, block: int, count: int, initial: int, local: int, window: int,
    past: int, tokens: int, ahead: int, paired: bool, queues: tuple, by_rows: tuple, scale: float,
):  # fmt: skip
    """o [B, 32 * (tiles + 1), Hq, DV] in q's dtype; what the last 32 rows hold means nothing.

    Args:
        q_t: [LANES, tiles, DK, C], a lane per batch row and kv head; column = query * G + head. The
            first tile begins at the last multiple of 32 up to `past`.
        k_cmp_t: [LANES, DK, keys], a multiple of 512. v_cmp: [LANES, keys, DV + 1], last column 1.
        pages: [LANES, 2, blocks, 128, columns], see `selected`.
        rows: [LANES, rows, 8, columns], see `rows`.
        k_win_t, v_win: as k_cmp_t and v_cmp, a multiple of 128.
        gates: [LANES, tiles, rows, parts, 3] float32; row of C = part * rows + row.
        shifts: [LANES, tiles, 3] float32, what is added to the scaled logits of a branch.
        marks, trips: see `again.Tables`.
        weights, heads, same, slot_keys, slot_lanes: see `constants`.
        batch: B. group: G. block: l. count: n. initial, local: forced blocks. window: w.
        past: position of the first query, which q_t begins with. tokens: T.
        ahead: tiles of queries between a compressed branch and the rest of it.
        paired: long tiles and short ones alternate.
        queues: (least tiles of keys, queues of pages in turn beside compressed branches, beside
            others) by `common.queues`; the last that applies counts. ScalarE has time for DMA where
            PE takes longer per job than it does.
        by_rows: see `geometry.Geometry`.
    """
    lanes, tiles, _, _ = q_t.shape
    kv_heads = lanes // batch
    dv = v_cmp.shape[2] - 1
    slots = slot_keys.shape[0]
    geometry = Geometry(group, block, count, initial, local, window, slots, by_rows, past, tokens)
    crowds = geometry.crowded_from() < tiles
    o = nl.ndarray(
        (batch, 32 * (tiles + 1), kv_heads * group, dv), dtype=q_t.dtype, buffer=nl.shared_hbm
    )
    flags = nl.ndarray((lanes, 2, tiles), dtype=nl.float32, buffer=nl.private_hbm)
    core, cores = this_core()
    shape = (tiles, geometry.padded, QUERIES)
    turned = nl.ndarray((cores, *shape), dtype=q_t.dtype, buffer=nl.private_hbm)
    shape = (tiles if crowds else 1, geometry.rows, geometry.parts, dv)
    others = nl.ndarray((cores, *shape), dtype=nl.float32, buffer=nl.private_hbm)
    lists = nl.ndarray((cores, tiles, slots), dtype=nl.int32, buffer=nl.private_hbm)
    constants = Constants(weights, heads, same, slot_keys, slot_lanes)
    tables = Tables(marks, trips)
    first, number = share(lanes)
    done = []
    for lane in range(first, first + number):
        b, head = divmod(lane, kv_heads)
        tensors = Lane(
            q_t[lane], k_cmp_t[lane], v_cmp[lane], pages[lane], rows[lane], k_win_t[lane],
            v_win[lane], gates[lane], shifts[lane],
            o[b, :, head * group : (head + 1) * group, :], flags[lane],
            (turned[core], others[core]),
        )  # fmt: skip
        clear_behind(geometry, tensors.o)
        pipeline = Pipeline(
            geometry, constants, tensors, turned[core], lists[core], scale, queues,
            tiles_of(geometry, paired), ahead,
        )  # fmt: skip
        pipeline.run()
        if crowds:
            numbers = Numbers(geometry.parts, geometry.padded, constants, q_t.dtype)
            do_crowded(geometry, constants, tensors, tables, numbers, scale)
        done.append(tensors)
    scratch = Scratch(k_cmp_t.shape[2] // CHUNK, q_t.dtype)
    for tensors in done:
        do_again(geometry, constants, tensors, tables, scratch, scale)
    return o
