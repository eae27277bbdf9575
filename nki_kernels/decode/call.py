"""What the sequences of a launch share."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import sbuf
from nki_kernels.common.spans import spans
from nki_kernels.decode.lanes import Lanes


class Call(nl.NKIObject):
    """What all sequences of a launch share.

    Attributes:
        per_block: rows of a block; block_rows: of a tile of chosen rows.
        within: [rows, t, rows of a block] float32, each token's place in its block.
    """

    def __init__(self, lanes_rows, per_group, tokens, spread, apart, rows):
        self.lanes = Lanes(per_group, lanes_rows // per_group)
        self.apart, self.rows, self.tokens = apart, rows, tokens
        self.per_block = spread[1] // spread[0]
        self.block_rows = nl.tile_size.pmax // self.per_block * self.per_block
        self.chosen_rows = spread[1]

    def keep_constants(self, owners, rows_of, spread, steps):
        self.owners, self.rows_of = sbuf(owners.shape, nl.float32), sbuf(rows_of.shape, nl.float32)
        self.steps = sbuf(steps.shape, nl.float32)
        for target, source in ((self.owners, owners), (self.rows_of, rows_of), (self.steps, steps)):
            nisa.dma_copy(target, source)
        self.spread = []
        for first, count in spans(spread.shape[0], nl.tile_size.pmax):
            part = sbuf((count, spread.shape[1]), nl.float32)
            nisa.dma_copy(part, spread[first : first + count, :])
            self.spread.append(part)
        shape = (self.lanes.rows, self.tokens, self.per_block)
        self.within = sbuf(shape, nl.float32)
        nisa.iota(
            self.within, [[1, self.tokens], [self.tokens, self.per_block]], offset=0,
            channel_multiplier=0,
        )  # fmt: skip
        self.counted = sbuf((nl.tile_size.pmax, self.tokens), nl.float32)
        nisa.iota(self.counted, [[1, self.tokens]], offset=0, channel_multiplier=0)

    def set_scalars(self, length, ratio, chosen, initial, scale, step):
        self.step = step
        self.length, self.ratio, self.chosen = length, ratio, chosen
        self.initial, self.scale = initial, scale
