"""Listed blocks gathered by rows of HBM, for each part of a tile's queries.

A row is 8 tokens of K and V side by side, so that one DMA with 128 row numbers fetches 16 blocks:
lane 8 * j + e holds tokens 8 * e .. 8 * e + 7 of block j. Tokens 8 * e + t of all lanes are a tile
of 128 keys, K as it lies in HBM, so PE transposes it. Parts take turns, each with a buffer, so that
a part's rows arrive behind the products of the others.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.queues import fetch
from nki_kernels.common.spans import spans
from nki_kernels.nsa_attention.choose import HIDDEN
from nki_kernels.nsa_attention.geometry import AT_ONCE, KEYS, QUERIES, TOKENS

TURNS = KEYS // AT_ONCE  # that a column of 128 places is for
TOGETHER = 4  # tiles of keys whose scores are made together
REST = 64  # columns for what K has after 128 channels
BANK = 512  # float32 of a bank of PSUM


class Numbers(nl.NKIObject):
    """What a tile's parts list, in HBM of a core, and how it gets there.

    Attributes:
        rows: [128, turns, parts] int32, row numbers of K and V.
        blocks: [16, turns, parts] int32. masks: [blocks, 32], of the tile.
    """

    def __init__(self, geometry, constants, dtype):
        self.parts, self.constants = geometry.parts, constants
        turns = geometry.padded // AT_ONCE + 1
        shape = (turns, geometry.parts)
        self.rows = nl.ndarray((KEYS, *shape), dtype=nl.int32, buffer=nl.private_hbm)
        self.blocks = nl.ndarray((AT_ONCE, *shape), dtype=nl.int32, buffer=nl.private_hbm)
        self.masks = nl.ndarray((geometry.padded, QUERIES), dtype=dtype, buffer=nl.private_hbm)
        nothing = sbuf((KEYS, 1, geometry.parts), nl.int32)
        nisa.memset(nothing, 0)
        for table in (self.rows, self.blocks):  # a turn more than there can be
            nisa.dma_copy(table[:, turns - 1 : turns, :], nothing[0 : table.shape[0]])

    def spread(self, lists, step):
        """Writes `rows` and `blocks` of all turns but the last.

        lists: int32 [parts * step, places], those of part p in row p * step.
        """
        height, places = lists.shape
        names = sbuf(lists.shape, nl.float32)
        nisa.tensor_copy(names, lists, engine=nisa.engine.vector)
        columns = sbuf((KEYS, places // KEYS, self.parts), nl.float32)
        for first, some in spans(places // KEYS, BANK // height):
            bank = psum((KEYS, some, height))
            for i in range(some):
                part = names[:, (first + i) * KEYS : (first + i + 1) * KEYS]
                nisa.nc_transpose(bank[:, i, :], part, engine=nisa.engine.tensor)
            nisa.tensor_copy(
                columns[:, first : first + some, :], bank[:, :, 0::step], engine=nisa.engine.vector
            )
        for first, some in spans(places // KEYS, BANK // (TURNS * self.parts)):
            moving = columns[:, first : first + some, :]
            by_lane = psum((KEYS, some, TURNS, self.parts))
            by_slot = psum((AT_ONCE, some, TURNS, self.parts))
            for u in range(TURNS):
                of_turn = self.constants.slot_lanes[:, u, :]
                nisa.nc_matmul(by_lane[:, :, u, :], of_turn, moving, accumulate=False)
                nisa.nc_matmul(by_slot[:, :, u, :], of_turn[:, 0::TOKENS], moving, accumulate=False)
            rows, blocks = sbuf(by_lane.shape, nl.int32), sbuf(by_slot.shape, nl.int32)
            self.constants.number_rows(rows, by_lane)
            nisa.tensor_copy(blocks, by_slot, engine=nisa.engine.vector)
            turns = slice(first * TURNS, (first + some) * TURNS)
            shape = (some, TURNS)
            nisa.dma_copy(self.rows[:, turns, :].reshape_dim(1, shape), rows)
            nisa.dma_copy(self.blocks[:, turns, :].reshape_dim(1, shape), blocks)


def turned_rows(buffer, low, wide):
    """K^T of gathered rows [128, TOKENS, columns]: [low, TOKENS, 128]; a list, if K is `wide`, of
    its channels after 128, [128, TOKENS / 2, 128], tiles in turn on either half."""
    bank = psum((low, TOKENS, KEYS), buffer.dtype)
    for t in range(TOKENS):
        nisa.nc_transpose(bank[:, t, :], buffer[:, t, 0:low], engine=nisa.engine.tensor)
    lower = sbuf(bank.shape, bank.dtype)
    nisa.tensor_copy(lower, bank, engine=nisa.engine.vector)
    found = []
    if wide:
        bank = psum((2 * REST, TOKENS // 2, KEYS), buffer.dtype)
        for t in range(0, TOKENS, 2):
            keys = buffer[:, t : t + 2, low : low + REST]
            nisa.nc_transpose(bank[:, t // 2, :], keys, engine=nisa.engine.tensor)
        upper = sbuf(bank.shape, bank.dtype)
        nisa.tensor_copy(upper, bank, engine=nisa.engine.vector)
        found.append(upper)
    return lower, found


class Rows(nl.NKIObject):
    """The parts of a tile against what they list. tile: see `crowded.Crowded`."""

    def __init__(self, tile, numbers):
        self.tile, self.numbers = tile, numbers

    def add(self, turn):
        """Adds 16 blocks of each part; turn: the number of a hardware loop's iteration."""
        rows = sbuf((KEYS, self.numbers.parts), nl.int32)
        blocks = sbuf((AT_ONCE, self.numbers.parts), nl.int32)
        fetch(rows, self.numbers.rows.select(1, turn))
        fetch(blocks, self.numbers.blocks.select(1, turn), "a")
        parts = []
        for p in range(self.numbers.parts):
            parts.append(Part(self.tile, p))
            parts[p].gather(self.numbers, rows[:, p : p + 1], blocks[:, p : p + 1])
        for step in range(len(parts) + 2):
            if step < len(parts):
                parts[step].turn()
            if 0 <= step - 1 < len(parts):
                parts[step - 1].weigh()
            if step >= 2:
                parts[step - 2].add()


class Part(nl.NKIObject):
    """A part of a tile's rows against 16 blocks.

    Attributes:
        buffer: [128, TOKENS, columns]: K's first 128 channels, REST columns for more, [v | 1].
        hidden: what hides blocks from queries, [16, 32]; columns of `queries` are the part's.
    """

    def __init__(self, tile, p):
        g = tile.geometry
        self.tile, self.p = tile, p
        self.columns = slice(p * g.rows, (p + 1) * g.rows)
        self.queries = slice(p * g.per_part, (p + 1) * g.per_part)
        self.low = tile.q[0].shape[0]

    def gather(self, numbers, rows, blocks):
        source = self.tile.lane.rows
        self.buffer = sbuf((KEYS, TOKENS, source.shape[2]), source.dtype)
        nisa.dma_copy(self.buffer, source.vector_select(0, rows))
        self.hidden = sbuf((AT_ONCE, QUERIES), source.dtype)
        nisa.dma_copy(self.hidden, numbers.masks.vector_select(0, blocks))

    def turn(self):
        self.lower, self.upper = turned_rows(self.buffer, self.low, len(self.tile.q) > 1)

    def weigh(self):
        """P^T [128, TOKENS, rows of the part]."""
        tile, g = self.tile, self.tile.geometry
        slots = tile.constants.slot_rows[0:AT_ONCE, 0, :]
        hidden = self.hidden[:, self.queries]
        nisa.tensor_scalar(hidden, hidden, nl.subtract, 1.0, op1=nl.multiply, operand1=HIDDEN)
        by_row = hidden.expand_dim(1).broadcast(1, TOGETHER).expand_dim(3).broadcast(3, g.group)
        self.weights = sbuf((KEYS, TOKENS, g.rows), self.buffer.dtype)
        for first in range(0, TOKENS, TOGETHER):
            scores = psum((KEYS, TOGETHER, g.rows))
            nisa.nc_matmul(
                scores, slots, by_row, accumulate=False, tile_position=(0, 0), tile_size=(32, 128)
            )
            for i in range(TOGETHER):
                t, into = first + i, scores[:, i, :]
                nisa.nc_matmul(
                    into, self.lower[:, t, :], tile.q[0][:, self.columns], accumulate=True
                )
                for upper in self.upper:
                    p0 = REST * (t % 2)
                    channels = slice(p0, p0 + tile.rest)
                    nisa.nc_matmul(
                        into, upper[channels, t // 2, :], tile.q[1][channels, self.columns],
                        accumulate=True, tile_position=(p0, 0), tile_size=(REST, 128),
                    )  # fmt: skip
            nisa.activation(
                self.weights[:, first : first + TOGETHER, :], nl.exp, scores, bias=tile.shift,
                scale=tile.scale,
            )  # fmt: skip

    def add(self):
        """Adds the blocks to the part's P @ [v | 1]."""
        acc, last = self.tile.acc[:, self.p, :], self.buffer.shape[2]
        sums = psum(acc.shape)
        for t in range(TOKENS):
            values = self.buffer[:, t, last - acc.shape[1] : last]
            nisa.nc_matmul(sums, self.weights[:, t, :], values, accumulate=t > 0)
        nisa.tensor_tensor(acc, acc, sums, nl.add)
