"""Tiles of queries whose unions have more blocks than their lists have places.

The pipeline has done their other branches, and has shown by a part of the union that the tile's
shift is safe. So only the selected branch is left, in the same form: P^T with keys on partitions,
the shift as the exponential's bias. A list per part (128 rows: 8 queries of 16 heads), of any
length, is made by one instruction of GpSimd, and `rows` gathers what it lists:

    for each tile:                                                 hardware loop, `flagged`
        flags of each part's union from the tile's masks           VectorE, PE
        a list per part, and how long the longest is               GpSimd
        row numbers for all turns of the next loop, to HBM         PE
        local and initial blocks, of all rows, as pages            PE, ScalarE
        for each 16 blocks of the lists, each part:                hardware loop, `rows`
        o = others + gate / sum * acc

A smaller union has fewer blocks: of 13 random ones per query 32 queries choose 340 at 64K tokens, 8
choose 100, and four times 100 blocks for 128 columns cost PE less than 340 for 512.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.queues import fetch
from nki_kernels.nsa_attention.constants import keep_from
from nki_kernels.nsa_attention.flagged import for_flagged
from nki_kernels.nsa_attention.geometry import AT_ONCE, BLOCK, PIECE, QUERIES
from nki_kernels.nsa_attention.rows import Rows
from nki_kernels.nsa_attention.running import larger, of_tile
from nki_kernels.nsa_attention.work import SELECTED, SMALLEST_SUM

OWN, WITHIN = 3, 3  # columns of `trips` and of `marks`, see `again`
LANE = 16  # partitions apart that nonzero_with_count works on


def do_crowded(geometry, constants, lane, tables, numbers, scale):
    """Does the tiles of a kv head whose flags say so."""
    once = Crowded(geometry, constants, lane, tables, numbers, scale)
    for_flagged(geometry, lane.crowded[:, 0 : geometry.tiles], once.tile)


class Crowded(nl.NKIObject):
    """Tiles of one kv head, by their number in SBUF.

    Attributes:
        flags: [128, pieces, parts * 16] bfloat16: whether block 128 * piece + row is in the union
            of a part, in every 16th column.
        lists: [parts * 16, blocks + 1] int32: blocks of a part's union, 0s, and how many they are,
            in every 16th row.
    """

    def __init__(self, geometry, constants, lane, tables, numbers, scale):
        self.geometry, self.constants, self.lane = geometry, constants, lane
        self.tables, self.numbers, self.scale = tables, numbers, scale
        self.dv = lane.v_win.shape[1] - 1
        self.pieces = geometry.padded // PIECE
        self.flags = sbuf((PIECE, self.pieces, LANE * geometry.parts), nl.bfloat16)
        nisa.memset(self.flags, 0.0)
        self.lists = sbuf((LANE * geometry.parts, geometry.padded + 1), nl.int32)
        nisa.memset(self.lists, 0)

    def tile(self, number, place):
        """Writes o of a tile to the place of a tile."""
        g, lane = self.geometry, self.lane
        masks = sbuf((PIECE, self.pieces, QUERIES), lane.turned.dtype)
        by_piece = lane.turned.reshape_dim(1, (self.pieces, PIECE)).select(0, number)
        fetch(masks, by_piece.permute((1, 0, 2)), "a")
        nisa.dma_copy(
            self.numbers.masks.reshape_dim(0, (self.pieces, PIECE)).permute((1, 0, 2)), masks
        )
        self.list(masks)
        self.load(number)
        self.open()
        for k in range(g.local):
            self.add_page(self.page(k), k == 0)
        for block in range(g.initial):
            page = sbuf((128, lane.pages.shape[3]), lane.pages.dtype)
            nisa.dma_copy(page, lane.pages[0, block])
            self.add_page(page, False)
        self.close()
        self.numbers.spread(self.lists[:, 0 : g.padded], LANE, 0)
        rows = Rows(self, self.numbers)
        nl.fori_loop(0, self.turns(), rows.add)
        result = sbuf((g.rows, g.parts, self.dv), lane.o.dtype)
        for p in range(g.parts):
            acc, factor = self.acc[:, p, :], sbuf((g.rows, 1), nl.float32)
            nisa.tensor_scalar(factor, acc[:, self.dv : self.dv + 1], nl.maximum, SMALLEST_SUM)
            nisa.reciprocal(factor, factor)
            nisa.tensor_tensor(factor, factor, self.gates[:, p, :], nl.multiply)
            nisa.scalar_tensor_tensor(
                result[:, p, :], acc[:, 0 : self.dv], nl.multiply, factor, nl.add,
                self.others[:, p, :],
            )  # fmt: skip
        target = of_tile(lane.o, QUERIES, place)
        fetch(target.reshape_dim(0, (g.parts, g.per_part)).permute((1, 2, 0, 3)), result)

    def load(self, number):
        """Operands of a tile, as `work.Work` has them; `ahead`: first key of its own block less
        first query, [64, 1]; `blocks`: the local ones, [1, local] int32, its own first."""
        g, lane = self.geometry, self.lane
        source = lane.q_t.select(0, number)
        dk = source.shape[0]
        low, self.rest = min(dk, 128), dk - 128
        self.q = [sbuf((low, g.columns), source.dtype)]
        fetch(self.q[0], source[0:low, :])
        if dk > 128:
            both = sbuf((128, g.columns), source.dtype)
            for half in range(2):
                fetch(both[64 * half : 64 * half + dk - 128, :], source[128:dk, :])
            self.q.append(both)
        self.shift = sbuf((128, 1), nl.float32)
        shift = lane.shifts.select(0, number).expand_dim(0)
        fetch(self.shift, shift[:, SELECTED : SELECTED + 1].broadcast(0, 128), "a")
        within = sbuf((BLOCK, 1), nl.float32)
        seen = of_tile(self.tables.marks, QUERIES, number)[0:1, WITHIN : WITHIN + 1]
        fetch(within, seen.broadcast(0, BLOCK), "a")
        self.ahead = sbuf((BLOCK, 1), nl.float32)
        nisa.tensor_scalar(self.ahead, within, nl.multiply, -1.0, op1=nl.add, operand1=1.0)
        trips = sbuf((1, self.tables.trips.shape[1]), nl.int32)
        fetch(trips, self.tables.trips.select(0, number).expand_dim(0))
        self.blocks = sbuf((1, g.local), nl.int32)
        for k in range(g.local):
            nisa.tensor_scalar(
                self.blocks[:, k : k + 1], trips[:, OWN : OWN + 1], nl.subtract, float(k)
            )
        self.gates = sbuf((g.rows, g.parts, 1), nl.float32)
        gates = lane.gates.select(0, number)[:, :, SELECTED : SELECTED + 1]
        fetch(self.gates, gates, "a")
        self.others = sbuf((g.rows, g.parts, self.dv), nl.float32)
        fetch(self.others, lane.others.select(0, number), "a")

    def list(self, masks):
        """Makes `lists`; behind this, PE works on what all queries see while GpSimd does."""
        g = self.geometry
        for p in range(g.parts):
            of_part = masks[:, :, p * g.per_part : (p + 1) * g.per_part]
            nisa.tensor_reduce(self.flags[:, :, LANE * p], nl.maximum, of_part, axis=2)
        lanes = LANE * g.parts
        unions = sbuf((lanes, g.padded), nl.float32)
        for first in range(0, self.pieces, 8):
            some = min(8, self.pieces - first)
            bank = psum((lanes, some, PIECE), nl.bfloat16)
            for i in range(some):
                flags = self.flags[:, first + i, :]
                nisa.nc_transpose(bank[:, i, :], flags, engine=nisa.engine.tensor)
            into = unions[:, first * PIECE : (first + some) * PIECE]
            nisa.tensor_copy(into.reshape_dim(1, (some, PIECE)), bank, engine=nisa.engine.vector)
        nisa.nonzero_with_count(self.lists, unions, index_offset=0, padding_val=0)

    def turns(self):
        """A register with how often AT_ONCE places of the longest list must be visited."""
        lanes, last = self.lists.shape[0], self.geometry.padded
        counts, turned = sbuf((lanes, 1), nl.float32), psum((1, lanes))
        nisa.tensor_copy(counts, self.lists[:, last : last + 1], engine=nisa.engine.vector)
        nisa.nc_transpose(turned, counts, engine=nisa.engine.tensor)
        longest, turns = sbuf((1, 1), nl.float32), sbuf((1, 1), nl.int32)
        nisa.tensor_reduce(longest, nl.maximum, turned, axis=1)
        longest = larger(longest)
        # However it is rounded, there are enough; what is too much finds nothing.
        nisa.tensor_scalar(
            turns, longest, nl.multiply, 1.0 / AT_ONCE, op1=nl.add, operand1=1.0 - 0.5 / AT_ONCE
        )
        many = nisa.register_alloc()
        nisa.register_load(many, turns)
        return many

    def open(self):
        """Sums of P @ [v | 1], made 0; see `work.Work.open`."""
        g, zeros = self.geometry, self.constants.zeros
        self.banks = []
        for p in range(0, g.parts, 2):
            bank = psum((g.rows, min(2, g.parts - p), self.dv + 1))
            self.banks.append(bank)
            nisa.nc_matmul(
                bank, zeros[:, 0 : g.rows], zeros[:, 0 : bank.shape[1] * (self.dv + 1)],
                accumulate=False, tile_position=(0, 0), tile_size=(zeros.shape[0], 128),
            )  # fmt: skip

    def close(self):
        """`acc` [rows, parts, DV + 1]: the sums of pages, from PSUM, to which lists are added."""
        g = self.geometry
        self.acc = sbuf((g.rows, g.parts, self.dv + 1), nl.float32)
        for b in range(len(self.banks)):
            bank = self.banks[b]
            nisa.tensor_copy(
                self.acc[:, 2 * b : 2 * b + bank.shape[1], :], bank, engine=nisa.engine.vector
            )

    def bank(self, part):
        """Sums of a part, [rows, DV + 1]."""
        return self.banks[part // 2][:, part % 2, :]

    def page(self, k):
        """The local block k before the own one, as a page with V on the lower partitions."""
        page = sbuf((128, self.lane.pages.shape[3]), self.lane.pages.dtype)
        fetch(page, self.lane.pages[0].select(0, self.blocks[:, k : k + 1]), ("y", "a")[k % 2])
        return page

    def add_page(self, page, own):
        """Adds a block that all queries see, or the own one, up to each query."""
        g = self.geometry
        scores = psum((BLOCK, g.columns))
        low = self.q[0].shape[0]
        nisa.nc_matmul(scores, page[0:low, 0:BLOCK], self.q[0], accumulate=False)
        for upper in self.q[1:]:
            channels = slice(BLOCK, BLOCK + self.rest)
            nisa.nc_matmul(
                scores, page[channels, BLOCK : 2 * BLOCK], upper[channels, :],
                accumulate=True, tile_position=(BLOCK, 0), tile_size=(BLOCK, BLOCK),
            )  # fmt: skip
        weights = sbuf(scores.shape, self.q[0].dtype)
        nisa.activation(weights, nl.exp, scores, bias=self.shift[0:BLOCK, :], scale=self.scale)
        if own:
            keep_from(weights, self.constants.near, nl.greater_equal, self.ahead)
        values = page[0:BLOCK, BLOCK : BLOCK + self.dv + 1]
        for p in range(g.parts):
            nisa.nc_matmul(
                self.bank(p), weights[:, p * g.rows : (p + 1) * g.rows], values, accumulate=True,
                tile_position=(0, 0), tile_size=(BLOCK, 128),
            )  # fmt: skip
