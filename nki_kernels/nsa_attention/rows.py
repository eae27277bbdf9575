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
from nki_kernels.nsa_attention.geometry import KEYS, QUERIES

TOKENS = 8  # of a row
AT_ONCE = 16  # blocks of a turn
TURNS = KEYS // AT_ONCE  # that a column of 128 places is for
TOGETHER = 4  # tiles of keys whose scores are made together
REST = 64  # columns for what K has after 128 channels
BANK = 512  # float32 of a bank of PSUM


class Numbers(nl.NKIObject):
    """What a tile's parts list, in HBM of a core, and how it gets there.

    Attributes:
        rows: [128, turns, parts] int32, row numbers of K and V.
        blocks: [16, turns, parts] int32. masks: [blocks, 32], of the tile.
        lanes: [128, TURNS, 128] float32, 1 where place = 16 * turn + lane // 8.
        slots: [16, 128] bfloat16, the same of the first turn's places.
        within: [128, 1] float32, lane % 8.
    """

    def __init__(self, geometry, slot_lanes, dtype):
        self.parts = geometry.parts
        turns = geometry.padded // AT_ONCE + 1
        shape = (turns, geometry.parts)
        self.rows = nl.ndarray((KEYS, *shape), dtype=nl.int32, buffer=nl.private_hbm)
        self.blocks = nl.ndarray((AT_ONCE, *shape), dtype=nl.int32, buffer=nl.private_hbm)
        self.masks = nl.ndarray((geometry.padded, QUERIES), dtype=dtype, buffer=nl.private_hbm)
        nothing = sbuf((KEYS, 1, geometry.parts), nl.int32)
        nisa.memset(nothing, 0)
        for table in (self.rows, self.blocks):  # a turn more than there can be
            nisa.dma_copy(table[:, turns - 1 : turns, :], nothing[0 : table.shape[0]])
        self.lanes = sbuf(slot_lanes.shape, nl.float32)
        nisa.dma_copy(self.lanes, slot_lanes)
        self.slots = sbuf((AT_ONCE, KEYS), dtype)
        nisa.tensor_copy(self.slots, self.lanes[0:AT_ONCE, 0, :], engine=nisa.engine.vector)
        lane, slot = sbuf((KEYS, 1), nl.float32), psum((KEYS, 1))
        nisa.iota(lane, [[1, 1]], offset=0, channel_multiplier=1)
        nisa.nc_matmul(slot, self.lanes[:, 0, :], lane, accumulate=False)
        self.within = sbuf((KEYS, 1), nl.float32)
        nisa.scalar_tensor_tensor(self.within, slot, nl.multiply, -float(TOKENS), nl.add, lane)

    def spread(self, lists, step):
        """Writes `rows` and `blocks` of all turns but the last; lists: int32 [parts * step, places],
        those of part p in row p * step."""
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
                of_turn = self.lanes[:, u, :]
                nisa.nc_matmul(by_lane[:, :, u, :], of_turn, moving, accumulate=False)
                nisa.nc_matmul(by_slot[:, :, u, :], of_turn[:, 0::TOKENS], moving, accumulate=False)
            rows, blocks = sbuf(by_lane.shape, nl.int32), sbuf(by_slot.shape, nl.int32)
            nisa.tensor_scalar(
                rows, by_lane, nl.multiply, float(TOKENS), op1=nl.add, operand1=self.within
            )
            nisa.tensor_copy(blocks, by_slot, engine=nisa.engine.vector)
            turns = slice(first * TURNS, (first + some) * TURNS)
            shape = (some, TURNS)
            nisa.dma_copy(self.rows[:, turns, :].reshape_dim(1, shape), rows)
            nisa.dma_copy(self.blocks[:, turns, :].reshape_dim(1, shape), blocks)


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
                parts[step - 1].weigh(self.numbers.slots)
            if step >= 2:
                parts[step - 2].add()


class Part(nl.NKIObject):
    """A part of a tile's rows against 16 blocks.

    Attributes:
        buffer: [128, TOKENS, columns]: K's first 128 channels, REST columns if it has more, [v | 1].
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
        """K^T: `lower` [<= 128, TOKENS, 128]; `upper` [128, TOKENS / 2, 128], tiles in turn on
        either half."""
        bank = psum((self.low, TOKENS, KEYS), self.buffer.dtype)
        for t in range(TOKENS):
            keys = self.buffer[:, t, 0 : self.low]
            nisa.nc_transpose(bank[:, t, :], keys, engine=nisa.engine.tensor)
        self.lower = sbuf(bank.shape, bank.dtype)
        nisa.tensor_copy(self.lower, bank, engine=nisa.engine.vector)
        self.upper = []
        if len(self.tile.q) > 1:
            bank = psum((2 * REST, TOKENS // 2, KEYS), self.buffer.dtype)
            for t in range(0, TOKENS, 2):
                keys = self.buffer[:, t : t + 2, self.low : self.low + REST]
                nisa.nc_transpose(bank[:, t // 2, :], keys, engine=nisa.engine.tensor)
            upper = sbuf(bank.shape, bank.dtype)
            nisa.tensor_copy(upper, bank, engine=nisa.engine.vector)
            self.upper.append(upper)

    def weigh(self, slots):
        """P^T [128, TOKENS, rows of the part]."""
        tile, g = self.tile, self.tile.geometry
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
                    half = slice(REST * (t % 2), REST * (t % 2 + 1))
                    nisa.nc_matmul(
                        into, upper[half, t // 2, :], tile.q[1][half, self.columns],
                        accumulate=True, tile_position=(half.start, 0), tile_size=(REST, 128),
                    )  # fmt: skip
            nisa.activation(
                self.weights[:, first : first + TOGETHER, :], nl.exp, scores, bias=tile.shift,
                scale=tile.scale,
            )  # fmt: skip

    def add(self):
        """Adds the blocks to the part's P @ [v | 1]."""
        last = self.buffer.shape[2]
        for t in range(TOKENS):
            values = self.buffer[:, t, last - self.tile.dv - 1 : last]
            nisa.nc_matmul(self.tile.bank(self.p), self.weights[:, t, :], values, accumulate=True)
