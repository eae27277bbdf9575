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
from nki_kernels.nsa_attention.geometry import AT_ONCE, KEYS, QUADRANT, QUERIES, TOKENS

TURNS = KEYS // AT_ONCE  # that a column of 128 places is for
TOGETHER = 4  # tiles of keys whose scores are made together
REST = 64  # columns for what K has after 128 channels
BANK = 512  # float32 of a bank of PSUM


class Numbers(nl.NKIObject):
    """What a tile's parts list, in HBM of a core, and how it gets there.

    Attributes:
        rows: [128, turns, parts] int32, row numbers of K and V.
        blocks: [turns, 16 * parts, 1] int32. masks: [blocks, 32], of the tile.
    """

    def __init__(self, parts, padded, constants, dtype):
        self.parts, self.constants = parts, constants
        turns = padded // AT_ONCE + 1
        listed = AT_ONCE * parts
        self.rows = nl.ndarray((KEYS, turns, self.parts), dtype=nl.int32, buffer=nl.private_hbm)
        self.blocks = nl.ndarray((turns, listed, 1), dtype=nl.int32, buffer=nl.private_hbm)
        self.masks = nl.ndarray((padded, QUERIES), dtype=dtype, buffer=nl.private_hbm)
        nothing = sbuf((KEYS, self.parts), nl.int32)
        nisa.memset(nothing, 0)
        # A turn more than there can be.
        nisa.dma_copy(self.rows[:, turns - 1, :], nothing)
        nisa.dma_copy(self.blocks[turns - 1], nothing[0:listed, 0:1])

    def spread(self, lists, step, start):
        """Writes `rows` and `blocks` of some turns.

        lists: int32 [parts * step, places], those of part p in row p * step, from place `start` on.
        """
        height, places = lists.shape
        turns, before = places // AT_ONCE, start // AT_ONCE
        for p in range(self.parts):
            into = self.blocks[before : before + turns, AT_ONCE * p : AT_ONCE * (p + 1), 0]
            row = lists[step * p : step * p + 1, :].reshape((1, turns, AT_ONCE))
            nisa.dma_copy(into.expand_dim(0), row)
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
            by_lane = psum((KEYS, some, TURNS, self.parts))
            for u in range(TURNS):
                nisa.nc_matmul(
                    by_lane[:, :, u, :], self.constants.slot_lanes[:, u, :],
                    columns[:, first : first + some, :], accumulate=False,
                )  # fmt: skip
            rows = sbuf(by_lane.shape, nl.int32)
            self.constants.number_rows(rows, by_lane)
            turn = before + first * TURNS
            into = self.rows[:, turn : turn + some * TURNS, :]
            nisa.dma_copy(into.reshape_dim(1, (some, TURNS)), rows)


def turned_rows(buffer, low, wide, copies):
    """K^T of gathered rows [128, TOKENS, columns]: [low, TOKENS, 128]; a list, if K is `wide`, of
    its channels after 128, [128, TOKENS / 2, 128], tiles in turn on either half. Engine `copies`
    takes all of it from PSUM."""
    bank = psum((low, TOKENS, KEYS), buffer.dtype)
    for t in range(TOKENS):
        nisa.nc_transpose(bank[:, t, :], buffer[:, t, 0:low], engine=nisa.engine.tensor)
    lower = sbuf(bank.shape, bank.dtype)
    nisa.tensor_copy(lower, bank, engine=copies)
    found = []
    if wide:
        bank = psum((2 * REST, TOKENS // 2, KEYS), buffer.dtype)
        for t in range(0, TOKENS, 2):
            keys = buffer[:, t : t + 2, low : low + REST]
            nisa.nc_transpose(bank[:, t // 2, :], keys, engine=nisa.engine.tensor)
        upper = sbuf(bank.shape, bank.dtype)
        nisa.tensor_copy(upper, bank, engine=copies)
        found.append(upper)
    return lower, found


class Rows(nl.NKIObject):
    """The parts of a tile against what they list. tile: see `crowded.Crowded`."""

    def __init__(self, tile, numbers):
        self.tile, self.numbers = tile, numbers

    def add(self, turn):
        """Adds 16 blocks of each part; turn: the number of a hardware loop's iteration."""
        blocks = sbuf((self.numbers.blocks.shape[1], 1), nl.int32)
        rows = []
        for first, some in spans(self.numbers.parts, 2):
            # Apart, so that the next turn's first ones come while the last ones are in use.
            rows.append(sbuf((KEYS, some), nl.int32))
            table = self.numbers.rows[:, :, first : first + some]
            fetch(rows[len(rows) - 1], table.select(1, turn))
        fetch(blocks, self.numbers.blocks.select(0, turn), "a")
        hidden = sbuf((blocks.shape[0], QUERIES), self.numbers.masks.dtype)
        parts = []
        for p in range(self.numbers.parts):
            if p == self.numbers.parts - 1:
                # There is room for them when all parts of the turn before have been weighed: before
                # that, GpSimd has the rows of the first parts to gather.
                nisa.dma_copy(hidden, self.numbers.masks.vector_select(0, blocks))
            parts.append(Part(self.tile, p, hidden))
            parts[p].gather(rows[p // 2][:, p % 2 : p % 2 + 1])
        for step in range(len(parts) + 2):
            if step < len(parts):
                parts[step].turn()
            if step == 1:
                nisa.tensor_scalar(
                    hidden, hidden, nl.subtract, 1.0, op1=nl.multiply, operand1=HIDDEN
                )
            if 0 <= step - 1 < len(parts):
                parts[step - 1].weigh()
            if step >= 2:
                parts[step - 2].add()


class Part(nl.NKIObject):
    """A part of a tile's rows against 16 blocks.

    Attributes:
        buffer: [128, TOKENS, columns]: K's first 128 channels, REST columns for more, [v | 1].
        hidden: what hides the blocks of all parts, 16 of each, from queries, [16 * parts, 32];
            columns of `queries` are the part's.
    """

    def __init__(self, tile, p, hidden):
        g = tile.geometry
        self.tile, self.p, self.hidden = tile, p, hidden
        self.columns = slice(p * g.rows, (p + 1) * g.rows)
        self.queries = slice(p * g.per_part, (p + 1) * g.per_part)
        self.low = tile.q[0].shape[0]

    def gather(self, rows):
        source = self.tile.lane.rows
        self.buffer = sbuf((KEYS, TOKENS, source.shape[2]), source.dtype)
        nisa.dma_copy(self.buffer, source.vector_select(0, rows))

    def turn(self):
        self.lower, self.upper = turned_rows(
            self.buffer, self.low, len(self.tile.q) > 1, nisa.engine.vector
        )

    def weigh(self):
        """P^T [128, TOKENS, rows of the part]."""
        tile, g = self.tile, self.tile.geometry
        p0, u = divmod(self.p * AT_ONCE, QUADRANT)
        p0 *= QUADRANT
        some = slice(p0, min(p0 + QUADRANT, self.hidden.shape[0]))
        slots = tile.constants.slot_rows[some, u // AT_ONCE, :]
        hidden = self.hidden[some, self.queries]
        by_row = hidden.expand_dim(1).broadcast(1, TOGETHER).expand_dim(3).broadcast(3, g.group)
        self.weights = sbuf((KEYS, TOKENS, g.rows), self.buffer.dtype)
        for first in range(0, TOKENS, TOGETHER):
            scores = psum((KEYS, TOGETHER, g.rows))
            nisa.nc_matmul(
                scores, slots, by_row, accumulate=False, tile_position=(p0, 0),
                tile_size=(QUADRANT, 128),
            )  # fmt: skip
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
