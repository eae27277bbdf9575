"""One tile of queries: its scores piece by piece, its running best, its ids."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.queues import fetch
from nki_kernels.common.spans import spans
from nki_kernels.select_blocks.best import chosen_ids, fp32, merge, start_list
from nki_kernels.select_blocks.scores import (
    BANK,
    PARTITIONS,
    add_shares,
    head_sums,
    load_queries,
    queries_at_once,
    visible,
)

AHEAD = 3  # steps of logits before their products with the weights


class Call(nl.NKIObject):
    """What all tiles of queries share: geometry, and constants in SBUF that are made once."""

    def __init__(self, weights, shift, joined, scale, group, tiles, piece, span):
        self.joined = joined
        self.scale = scale
        self.group = group
        self.tiles = tiles
        self.piece = piece
        self.span = span
        kinds, _, blocks = weights.shape
        self.weights = nl.ndarray((PARTITIONS, kinds, blocks), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(self.weights, weights.permute((1, 0, 2)))
        self.ones = nl.ndarray((shift.shape[0], PARTITIONS), dtype=shift.dtype, buffer=nl.sbuf)
        nisa.memset(self.ones, 1.0)
        self.zeros = nl.ndarray((1, PARTITIONS + BANK), dtype=nl.bfloat16, buffer=nl.sbuf)
        nisa.memset(self.zeros, 0.0)
        self.block = fp32(PARTITIONS, piece)
        nisa.iota(self.block, [[1, piece]])
        self.key = fp32(PARTITIONS, 1)
        nisa.iota(self.key, [[0, 1]], channel_multiplier=1)

    def choose(self, count, width, limit, initial, packed):
        """What is chosen; arguments as of the kernel."""
        self.count = count
        self.width = width
        self.limit = limit
        self.initial = initial
        self.packed = packed


class Tile(nl.NKIObject):
    """State of a tile of queries.

    `loaded`: as `head_sums` wants. `last`, `first`: as `visible` wants. `marks`: as of
    `mark`. `scores`, `names` [queries, count + piece]: the running best, then the last piece.
    `carry` [queries, 1]: what a piece's last keys add to the next one's first block. `key`
    [128, 1]: the piece's first key + partition.
    """

    def __init__(self, loaded, last, first, marks, scores, names, carry, key):
        self.loaded = loaded
        self.last = last
        self.first = first
        self.marks = marks
        self.scores = scores
        self.names = names
        self.carry = carry
        self.key = key


def start_tile(call, part):
    """Loads a tile's operands and empties its list; `part`: views of q, shift, rows, columns."""
    q, shift, rows, columns = part[0], part[1], part[2], part[3]
    length = q.shape[0]
    at_once, heads_at_once = queries_at_once(call.group)
    loaded = []
    for first, many in spans(length, at_once):
        for some in spans(call.group, heads_at_once):
            found = load_queries(q, shift, first, many, some, call.joined)
            loaded.append((first, many, some[1], found))
    last = fp32(PARTITIONS, length)
    fetch(last, rows[0:1, :].broadcast(0, PARTITIONS))
    first_key = None
    if call.packed:
        first_key = fp32(PARTITIONS, length)
        fetch(first_key, rows[1:2, :].broadcast(0, PARTITIONS))
    marks = fp32(length, columns.shape[1])
    fetch(marks, columns)
    scores, names = fp32(length, call.count + call.piece), fp32(length, call.count + call.piece)
    start_list(scores, names, call.count)
    before = names[:, call.count : call.count + call.piece]
    nisa.tensor_scalar(before, call.block[0:length, :], nl.subtract, float(call.piece))
    carry, key = fp32(length, 1), fp32(PARTITIONS, 1)
    nisa.memset(carry, 0.0)
    nisa.tensor_copy(key, call.key)
    return Tile(loaded, last, first_key, marks, scores, names, carry, key)


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


def score_piece(call, tile, keys, tiles, whole):
    """Scores of one piece's blocks, float32 [queries, piece + 1] in PSUM.

    Args:
        keys: view [channels, keys of the piece] in HBM. tiles: as of `lots`.
        whole: every query sees the keys of the piece before this one.
    """
    length = tile.marks.shape[0]
    sums = nl.ndarray((length, call.piece + 1), dtype=nl.float32, buffer=nl.psum)
    row = call.zeros[:, PARTITIONS : PARTITIONS + call.piece + 1]
    nisa.nc_matmul(sums, call.zeros[:, 0:length], row, accumulate=False)
    waiting = []
    for lot in tiles:
        begin, end = lot[0][0], lot[-1][0] + lot[-1][1]
        parts = []
        for channel, channels in spans(keys.shape[0], PARTITIONS):
            part = nl.ndarray((channels, end - begin), dtype=keys.dtype, buffer=nl.sbuf)
            fetch(part, keys[channel : channel + channels, begin:end])
            parts.append(part)
        for offset, count, column, columns, kind in lot:
            stationary = []
            for part in parts:
                stationary.append(part[:, offset - begin : offset - begin + count])
            if not call.joined:
                stationary.append(call.ones[:, 0:count])
            mask = None
            if offset + count > whole:
                mask = visible(tile.last, tile.first, tile.key, offset, count)
            weight = call.weights[0:count, kind, 0:columns]
            target = sums[:, column : column + columns]
            for some in tile.loaded:
                seen = head_sums(some, stationary, mask, call.scale, call.group)
                waiting.append((target, seen, weight, some[0]))
                if len(waiting) > AHEAD:
                    ready = waiting.pop(0)
                    add_shares(ready[0], ready[1], ready[2], ready[3])
    for ready in waiting:
        add_shares(ready[0], ready[1], ready[2], ready[3])
    nisa.tensor_scalar(tile.key, tile.key, nl.add, float(call.piece * call.span))
    return sums


def settle_piece(call, tile, sums, initial, edge):
    """Merges a piece's scores into the running best; `names` become the piece's.

    Args:
        sums: as of `score_piece`. initial: some of its blocks may be forced as initial ones.
        edge: some may be local, hidden, or of another sequence.
    """
    names = tile.names[:, call.count : call.count + call.piece]
    scores = tile.scores[:, call.count : call.count + call.piece]
    # Only now, when GpSimd has long gathered from them for the piece before.
    nisa.tensor_scalar(names, names, nl.add, float(call.piece))
    mark(scores, names, sums[:, 0 : call.piece], tile.marks, initial, edge)
    first = scores[:, 0:1]
    nisa.tensor_tensor(first, first, tile.carry, nl.add)
    nisa.tensor_copy(tile.carry, sums[:, call.piece : call.piece + 1])
    if edge:
        hide(scores, names, tile.marks, call.packed)
    merge(tile.scores, tile.names, call.count)


def mark(scores, names, sums, marks, initial, edge):
    """Scores of a piece from PSUM, 1 for forced blocks, which is above all others.

    Args:
        scores, names: float32 [queries, piece], the latter the blocks' ids. sums: their source.
        marks: float32 [queries, 4]: own block, first block of the sequence, the block before the
            local ones, the block behind the initial ones.
    """
    source = sums
    if edge:
        nisa.scalar_tensor_tensor(scores, names, nl.greater, marks[:, 2:3], nl.maximum, source)
        source = scores
    if initial:
        nisa.scalar_tensor_tensor(scores, names, nl.less, marks[:, 3:4], nl.maximum, source)
    if not edge and not initial:
        nisa.tensor_copy(scores, sums, engine=nisa.engine.vector)


def hide(scores, names, marks, packed):
    """Takes 4 from the scores of blocks that a query must not choose: those after its own and, if
    packed, those before its sequence."""
    hidden = fp32(scores.shape[0], scores.shape[1])
    for compare, bound, needed in ((nl.greater, 0, True), (nl.less, 1, packed)):
        if needed:
            at = marks[:, bound : bound + 1]
            nisa.tensor_scalar(hidden, names, compare, at, op1=nl.multiply, operand1=-4.0)
            nisa.tensor_tensor(scores, scores, hidden, nl.add)


def finish_tile(call, tile, ids):
    """Writes the tile's ids [queries, width] to HBM."""
    length = tile.marks.shape[0]
    result = nl.ndarray((length, call.width), dtype=nl.int32, buffer=nl.sbuf)
    if call.width > call.count:
        nisa.memset(result[:, call.count : call.width], -1)
    found = chosen_ids(tile.scores, tile.names, tile.marks[:, 1:2], call.count, call.limit)
    nisa.tensor_copy(result[:, 0 : call.count], found)
    fetch(ids, result)
