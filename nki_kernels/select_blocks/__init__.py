"""Importance of selection blocks and the choice of the best n."""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.spans import covering, spans
from nki_kernels.select_blocks.tile import Call, finish_tile, lots, score_piece, start_tile


@nki.jit
def forward(
    q, kt, shift, rows, columns, weights, trips, scale: float, tiles: tuple, piece: int, span: int,
    reach: tuple, length: int, count: int, width: int, limit: int, packed: bool,
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
        reach: of each tile of queries, (blocks that some query sees, keys that every query sees);
            empty: run hardware loops by `trips` instead of one program per tile.
        length: queries of a tile. count: how many are chosen. limit: more than any block.
        packed: the first key matters.
    """
    batch, queries, _, _ = q.shape
    heads = kt.shape[1]
    group = q.shape[2] // heads
    ids = nl.ndarray((batch, queries, heads, width), dtype=nl.int32, buffer=nl.shared_hbm)
    call = Call(weights, shift, kt.shape[2] > q.shape[3], scale, group, tiles, piece, span)
    call.choose(count, width, limit, packed)
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
    for pair in range(0, len(starts), cores):
        last = min(pair + cores, len(starts)) - 1
        part = queries_of(views, starts[min(pair + core, last)], length)
        tile = start_tile(call, part)
        for at, left in spans(reach[last][0], call.piece):
            some = keys[:, at * call.span : (at + call.piece) * call.span]
            score_piece(call, tile, some, lots(call.tiles, left), reach[pair][1] - at * call.span)
        finish_tile(call, tile, part[4])


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

        def seen(j):
            some = lots(call.tiles, call.piece)
            score_piece(call, tile, pieces.select(1, j), some, keys_of_piece)

        def edge(j):
            score_piece(call, tile, pieces.select(1, j), lots(call.tiles, call.piece), 0)

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
