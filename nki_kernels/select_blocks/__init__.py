"""Importance of selection blocks and the choice of the best n, in one kernel.

Dimensions: q [B, S, Hq, D], G = Hq / H heads share a kv head; Nc compressed keys (blocks of l
tokens every d), Ns selection blocks of m tokens, which m / d keys begin in. lse is that of
compressed attention. Scores are float32 throughout; no map of them exists, in SBUF or in HBM.

Layout: a tile is 128 queries (fewer if G is large). Keys are on partitions (S^T form), queries x
heads along the free dim; then scores have queries on partitions. Keys come in pieces of up to 480
blocks, so that a piece's scores are one bank of PSUM:

    for each kv head, each tile of queries:
        q^T; -lse / scale as up to three further channels                      PE, DMA
        best = n empty places
        for each piece of keys:
            for each 128 keys, each 512 columns:
                logits = k q^T - lse / scale                                   PE
                p = exp(scale * logits)                                        ScalarE
                p = sum over heads, 0 where hidden (edges only)                VectorE
                scores[queries, blocks] += p^T weights[keys, blocks]           PE, float32
            forced blocks above all others, hidden ones below 0                VectorE
            best = the best n of best and piece, ascending by id               VectorE, GpSimd
        ids = best - first block of the sequence, -1 where empty

The weights |tokens(key) & tokens(block)| / d make one matmul of the mapping for any l, d, m; a
tile's last keys also share the next block, which is carried into the next tile, and piece. The
best n are rounds of `max8` and `nc_match_replace8`, which take the first of equal values: ties go
to the lowest id because the list has lower ids than the piece. Masks are made from each query's
first and last key, so packed sequences, laid out at whole selection blocks, are one row of keys.

Modelled with G = 16, n = 16, 32/16/64, bfloat16, ns per (query, kv head) at the end of a sequence
(low / central / high of the cycle model, and what each engine is busy; not run on hardware):

| tokens, D | programs | time | PE | ScalarE | VectorE |
|---|---|---|---|---|---|
| 16K, 192 | one per tile | 224 / 250 / 277 | 183 | 144 | 250 |
| 64K, 192 | one per tile | 726 / 811 / 1011 | 646 | 575 | 796 |
| 64K, 192 | hardware loops | 901 / 1065 / 1337 | 655 | 574 | 883 |
| 256K, 192 | hardware loops | central 3355 | | | |

Bound by VectorE: the sum over heads takes 0.6 us per 128 keys and 512 columns, where logits take
0.45 us of PE and exp 0.48 of ScalarE. So a piece's marks and merge are issued behind the next
piece's logits, and nothing of VectorE's waits for GpSimd. Turns of a hardware loop hardly overlap,
which costs about 30 us per tile of queries, 3 % at 256K; run-time addresses are few, and left to
hardware descriptors. Loops run where unrolled programs would pass about a million instructions.
Looped, a kv head's program has fewer than 2,500 instructions whatever the length.

Weighed (us per 128 keys and 512 columns):
- Scores from the bfloat16 P of compressed attention (the prototype `fused2`) are nearly free but
  choose another block in 4 % of queries; rule 3 wants float32.
- Float32 scores from that kernel's float32 P, before it is normalised: weights as stationary, P as
  moving operand, 0.27 of PE instead of 0.45, no second exp, and 0.45 of VectorE (evacuation,
  division by the row's sum, sum over heads) instead of 0.75; but every row's scores stay until its
  sum is known, 2 MB per 32 queries at 64K. About 1.05 for both stages, bound by VectorE, instead of
  1.4 for two kernels: the next thing to build.
- Rows (query, head) on partitions: the bias of exp is then free, but the sum over heads becomes a
  float32 matmul over all keys, 0.86 of PE, against 0.6 of VectorE.
- Four of sixteen heads summed by PE (their p as stationary operand, with a stride of 16 elements):
  748 instead of 811 at 64K; not done, as no document prices such a stride.
- The first of the additions over heads by GpSimd, for every second or fourth tile: VectorE 703 and
  749 instead of 796, but 826 to 915 in all, since logits then wait for GpSimd.
- A map of a row's scores and one selection at its end: fewer passes, but VectorE searches at most
  16,384 elements, and 1M tokens with m = 16 have 65,536.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.spans import covering, spans
from nki_kernels.select_blocks.tile import (
    Call,
    finish_tile,
    lots,
    score_piece,
    settle_piece,
    start_tile,
)


@nki.jit
def forward(
    q, kt, shift, rows, columns, weights, trips, scale: float, tiles: tuple, piece: int, span: int,
    reach: tuple, length: int, count: int, width: int, limit: int, initial: int, packed: bool,
):  # fmt: skip
    """ids int32 [B, S, H, width]: the selected blocks of each query, ascending, then -1.

    Args:
        q: [B, S, Hq, D]. kt: [B, H, D, keys] transposed compressed keys, for a whole number of
            pieces; or D + shifts channels, the last ones 1, where the shifts share their tile.
        shift: [shifts, B, S, Hq], adds up to -lse / scale; bfloat16, or float32 like q.
        rows: float32 [2, S], last and first key that a query sees.
        columns: float32 [S, 4]: own block, first block of the sequence, the block before the local
            ones, the block behind the initial ones.
        weights: float32 [kinds, 128, blocks], shares of a tile's keys in its blocks, so small that
            no score reaches 1.
        trips: int32 [2, tiles, 2]: of each tile of queries, pieces whose keys every query sees and
            pieces in all; in the second half, of it and its pair together.
        tiles: (first key, keys, first block, blocks, kind) of the tiles of keys of a piece.
        piece: blocks of a piece. span: keys of a block.
        reach: of each tile of queries, (blocks that some query sees, keys that every query sees,
            blocks that are before the local ones of every query);
            empty: hardware loops by `trips` instead of one program per tile.
        length: queries of a tile. count: how many are chosen. limit: more than any block.
        initial: forced blocks at the start. packed: the first key matters.
    """
    batch, queries, _, _ = q.shape
    heads = kt.shape[1]
    group = q.shape[2] // heads
    ids = nl.ndarray((batch, queries, heads, width), dtype=nl.int32, buffer=nl.shared_hbm)
    call = Call(weights, shift, kt.shape[2] > q.shape[3], scale, group, tiles, piece, span)
    call.choose(count, width, limit, initial, packed)
    # Even lanes are split between two cores; else the tiles of queries are.
    cores, core = nl.num_programs(0), nl.program_id(0)
    lanes, split = batch * heads, batch * heads % cores == 0
    mine = lanes // cores if split else lanes
    first = core * mine if split else 0
    for lane in range(first, first + mine):
        b, head = divmod(lane, heads)
        start, end = head * group, (head + 1) * group
        views = (
            q[b, :, start:end, :], shift[:, b, :, start:end], rows, columns, ids[b, :, head, :]
        )  # fmt: skip
        sharing = (1, 0) if split else (cores, core)
        if len(reach) > 0:
            unrolled(call, views, kt[b, head], reach, length, sharing)
        else:
            looped(call, views, kt[b, head], trips, length, sharing)
    return ids


def unrolled(call, views, keys, reach, length, sharing):
    """Every tile of queries with as many tiles of keys as it needs.

    Tiles that two cores share alternate; each pair does the work of the longer one and masks what
    the shorter one must, so that both cores run equal programs.
    """
    cores, core = sharing
    starts, length = covering(views[0].shape[0], length)
    scored, settled = [], []  # what waits for VectorE, and tiles that wait for GpSimd

    def catch_up():
        """Work behind PE's: of the tile before, and of the piece before."""
        for tile, ids in settled:
            finish_tile(call, tile, ids)
        settled.clear()
        for tile, sums, at, plain, ids in scored:
            settle_piece(call, tile, sums, at < call.initial, at + call.piece > plain)
            if ids is not None:
                settled.append((tile, ids))
        scored.clear()

    for pair in range(0, len(starts), cores):
        last = min(pair + cores, len(starts)) - 1
        needed, whole, plain = reach[last][0], reach[pair][1], reach[pair][2]
        part = queries_of(views, starts[min(pair + core, last)], length)
        tile = start_tile(call, part)
        for at, left in spans(needed, call.piece):
            some = keys[:, at * call.span : (at + call.piece) * call.span]
            known = whole - at * call.span
            sums = score_piece(call, tile, some, lots(call.tiles, left), known)
            catch_up()
            ids = part[4] if at + call.piece >= needed else None
            scored.append((tile, sums, at, plain, ids))
    catch_up()
    catch_up()


def looped(call, views, keys, trips, length, sharing):
    """The same in hardware loops over tiles of queries and pieces of keys.

    Tiles that the loop cannot reach, because they begin early or have no pair, come after it.
    """
    cores, core = sharing
    queries = views[0].shape[0]
    starts, length = covering(queries, length)
    keys_of_piece = call.piece * call.span
    pieces = keys.reshape_dim(1, (keys.shape[1] // keys_of_piece, keys_of_piece))
    table = trips[0 if cores == 1 else 1]

    def work(part, bounds):
        """One tile of queries, by its views and its row of `trips`."""
        tile = start_tile(call, part)
        whole, every = nisa.register_alloc(), nisa.register_alloc()
        nisa.register_load(whole, bounds[0:1])
        nisa.register_load(every, bounds[1:2])

        def score(j, known):
            some = lots(call.tiles, call.piece)
            sums = score_piece(call, tile, pieces.select(1, j), some, known)
            settle_piece(call, tile, sums, True, True)

        def seen(j):
            score(j, keys_of_piece)

        def edge(j):
            score(j, 0)

        nl.fori_loop(0, whole, seen)
        nl.fori_loop(whole, every, edge)
        finish_tile(call, tile, part[4])

    turns = queries // (length * cores)
    if turns > 0:
        q, shift, rows, columns, ids = queries_of(views, 0, turns * cores * length)
        shared = (turns, cores, length)
        q, shift = q.reshape_dim(0, shared), shift.reshape_dim(1, shared)
        rows, columns = rows.reshape_dim(1, shared), columns.reshape_dim(0, shared)
        ids = ids.reshape_dim(0, shared)
        bounds = table[0 : turns * cores].reshape_dim(0, (turns, cores)).select(1, core)

        def turn(i):
            part = (
                q.select(1, core).select(0, i), shift.select(2, core).select(1, i),
                rows.select(2, core).select(1, i), columns.select(1, core).select(0, i),
                ids.select(1, core).select(0, i),
            )  # fmt: skip
            work(part, bounds.select(0, i))

        nl.fori_loop(0, turns, turn)
    for pair in range(turns * cores, len(starts), cores):
        last = min(pair + core, len(starts) - 1)
        work(queries_of(views, starts[last], length), table[last])


def queries_of(views, first, length):
    """The queries first .. first + length - 1 of q, shift, rows, columns and ids."""
    q, shift, rows, columns, ids = views
    end = first + length
    return q[first:end], shift[:, first:end], rows[:, first:end], columns[first:end], ids[first:end]
