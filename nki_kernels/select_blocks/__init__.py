"""Importance of selection blocks and the choice of the best n (see the kernel `forward`)."""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.spans import covering, spans
from nki_kernels.select_blocks.best import chosen_ids, fp32, merge, start_list
from nki_kernels.select_blocks.scores import (
    BANK,
    PARTITIONS,
    add_tile,
    load_queries,
    queries_at_once,
    visible,
)


def my_steps(starts, blocks, lanes):
    """This core's lanes and (first query, blocks) steps: equal programs on both cores.

    Even lanes are split; else the tiles of queries alternate, and each pair does the work of the
    longer one.
    """
    cores, core = nl.num_programs(0), nl.program_id(0)
    if lanes % cores == 0:
        many = lanes // cores
        steps = []
        for tile in range(len(starts)):
            steps.append((starts[tile], blocks[tile]))
        return core * many, many, steps
    steps = []
    for pair in range(0, len(starts), cores):
        last = min(pair + cores, len(starts)) - 1
        steps.append((starts[min(pair + core, last)], blocks[last]))
    return 0, lanes, steps


def lots(tiles, first_beyond):
    """The tiles before block `first_beyond` in lists of at most 512 keys: one load each."""
    found, keys = [], 0
    for tile in tiles:
        if tile[2] >= first_beyond:
            continue
        if not found or keys + tile[1] > BANK:
            found.append([])
            keys = 0
        found[-1].append(tile)
        keys += tile[1]
    return found


def constants(weights, shift, piece):
    """What all tiles of queries share, made once."""
    table = fp32(PARTITIONS, weights.shape[0], weights.shape[2])
    nisa.dma_copy(table, weights.permute((1, 0, 2)))
    ones = nl.ndarray((shift.shape[0], PARTITIONS), dtype=shift.dtype, buffer=nl.sbuf)
    nisa.memset(ones, 1.0)
    zeros = nl.ndarray((1, PARTITIONS + BANK), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.memset(zeros, 0.0)
    block, key = fp32(PARTITIONS, piece), fp32(PARTITIONS, 1)
    nisa.iota(block, [[1, piece]])
    nisa.iota(key, [[0, 1]], channel_multiplier=1)
    return {"weights": table, "ones": ones, "zeros": zeros, "block": block, "key": key}


def score_piece(made, keys, sums, loaded, tiles, first_key, bounds, scale, group):
    """Fills `sums` [queries, piece + 1] in PSUM with the scores of one piece's blocks.

    keys: view [D, keys of the piece] in HBM. bounds: (last, first) key rows as `visible` wants.
    """
    queries, width = sums.shape
    zeros = made["zeros"]
    nisa.nc_matmul(sums, zeros[:, 0:queries], zeros[:, PARTITIONS : PARTITIONS + width],
                   accumulate=False)  # fmt: skip
    for lot in tiles:
        begin, end = lot[0][0], lot[-1][0] + lot[-1][1]
        parts = []
        for channel, channels in spans(keys.shape[0], PARTITIONS):
            part = nl.ndarray((channels, end - begin), dtype=keys.dtype, buffer=nl.sbuf)
            nisa.dma_copy(part, keys[channel : channel + channels, begin:end])
            parts.append(part)
        for offset, count, column, columns, which in lot:
            stationary = []
            for part in parts:
                stationary.append(part[:, offset - begin : offset - begin + count])
            mask = visible(bounds[0], bounds[1], first_key, offset, count)
            weight = made["weights"][0:count, which, 0:columns]
            target = sums[:, column : column + columns]
            add_tile(target, loaded, stationary, made["ones"], weight, mask, scale, group)


def force_and_hide(scores, ids, sums, carry, marks):
    """Scores of a piece from PSUM, with forced blocks above all others and hidden ones below 0.

    Args:
        scores, ids: float32 [queries, piece]. sums: [queries, piece + 1] in PSUM.
        carry: float32 [queries, 1], what the piece before had for the first block; renewed.
        marks: float32 [queries, 4] tile: own block, first block of the sequence, the block before
            the local ones, the block behind the initial ones.
    """
    queries, piece = scores.shape
    own, base, local, initial = (marks[:, i : i + 1] for i in range(4))
    nisa.scalar_tensor_tensor(scores, ids, nl.greater, local, nl.maximum, sums[:, 0:piece])
    nisa.scalar_tensor_tensor(scores, ids, nl.less, initial, nl.maximum, scores)
    nisa.tensor_tensor(scores[:, 0:1], scores[:, 0:1], carry, nl.add)
    nisa.tensor_copy(carry, sums[:, piece : piece + 1])
    hidden = fp32(queries, piece)
    for compare, bound in ((nl.greater, own), (nl.less, base)):
        nisa.tensor_scalar(hidden, ids, compare, bound, op1=nl.multiply, operand1=-4.0)
        nisa.tensor_tensor(scores, scores, hidden, nl.add)


@nki.jit
def forward(
    q, kt, shift, rows, columns, weights, scale: float, tiles: tuple, piece: int, span: int,
    blocks: tuple, length: int, count: int, width: int, limit: int, packed: bool,
):  # fmt: skip
    """ids int32 [B, S, H, width]; see the module's docstring."""
    batch, queries, _, _ = q.shape
    heads = kt.shape[1]
    group = q.shape[2] // heads
    ids = nl.ndarray((batch, queries, heads, width), dtype=nl.int32, buffer=nl.shared_hbm)
    made = constants(weights, shift, piece)
    starts, length = covering(queries, length)
    first_lane, lanes, steps = my_steps(starts, blocks, batch * heads)
    at_once, heads_at_once = queries_at_once(group)
    for lane in range(first_lane, first_lane + lanes):
        b, head = divmod(lane, heads)
        for start, needed in steps:
            q_tile = q[b, start : start + length, head * group : (head + 1) * group, :]
            shift_tile = shift[:, b, start : start + length, head * group : (head + 1) * group]
            loaded = []
            for first, many in spans(length, at_once):
                for some in spans(group, heads_at_once):
                    found, row = load_queries(q_tile, shift_tile, first, many, some)
                    loaded.append((first, many, some[1], found, row))
            bounds = [fp32(PARTITIONS, length), None]
            nisa.dma_copy(bounds[0], rows[0:1, start : start + length].broadcast(0, PARTITIONS))
            if packed:
                bounds[1] = fp32(PARTITIONS, length)
                view = rows[1:2, start : start + length]
                nisa.dma_copy(bounds[1], view.broadcast(0, PARTITIONS))
            marks = fp32(length, columns.shape[1])
            nisa.dma_copy(marks, columns[start : start + length, :])
            scores, names = fp32(length, count + piece), fp32(length, count + piece)
            start_list(scores, names, count)
            carry, first_key = fp32(length, 1), fp32(PARTITIONS, 1)
            nisa.memset(carry, 0.0)
            nisa.tensor_copy(names[:, count : count + piece], made["block"][0:length, :])
            nisa.tensor_copy(first_key, made["key"])
            for at, left in spans(needed, piece):
                sums = nl.ndarray((length, piece + 1), dtype=nl.float32, buffer=nl.psum)
                keys = kt[b, head, :, at * span : (at + piece) * span]
                score_piece(
                    made, keys, sums, loaded, lots(tiles, left), first_key, bounds, scale, group
                )
                fresh = (scores[:, count : count + piece], names[:, count : count + piece])
                force_and_hide(fresh[0], fresh[1], sums, carry, marks)
                merge(scores, names, count)
                nisa.tensor_scalar(fresh[1], fresh[1], nl.add, float(piece))
                nisa.tensor_scalar(first_key, first_key, nl.add, float(piece * span))
            result = nl.ndarray((length, width), dtype=nl.int32, buffer=nl.sbuf)
            if width > count:
                nisa.memset(result[:, count:width], -1)
            found = chosen_ids(scores, names, marks[:, 1:2], count, limit)
            nisa.tensor_copy(result[:, 0:count], found)
            nisa.dma_copy(ids[b, start : start + length, head, :], result)
    return ids
