"""Blocks of keys and values, fetched by run-time addresses into static tiles.

A page [m, W] holds the m <= 128 tokens of a block, keys and values side by side, so that one DMA
fetches a block.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.queues import fetch
from nki_kernels.common.spans import spans

BANK = 512
"""float32 columns of a PSUM bank."""


class Blocks(nl.NKIObject):
    """Gathered blocks: tiles [keys, W] of whole blocks, all alike.

    Attributes:
        count: blocks. tokens: m. size: keys of a tile. keys: of all.
    """

    def __init__(self, pages, numbers, queues):
        """numbers: [1, count] int32 in SBUF, as many as fill whole tiles."""
        _, self.tokens, width = pages.shape
        self.count = numbers.shape[1]
        per_tile = nl.tile_size.pmax // self.tokens
        self.size = per_tile * self.tokens
        self.keys = self.count * self.tokens
        self.tiles = []
        for start in range(0, self.count, per_tile):
            tile = sbuf((self.size, width), pages.dtype)
            for b in range(per_tile):
                number = start + b
                page = pages.select(0, numbers[0:1, number : number + 1])
                target = tile[b * self.tokens : (b + 1) * self.tokens, :]
                fetch(target, page, queues[number % len(queues)])
            self.tiles.append(tile)

    def turned(self, first, last, spare=0):
        """Columns first .. last - 1 of all keys, transposed: [<= 128, keys] tiles in SBUF.

        spare: partitions behind the last tile's rows, for the caller to write.
        """
        dtype, found = self.tiles[0].dtype, []
        for start, length in spans(last - first, nl.tile_size.pmax):
            left = first + start
            out = sbuf((length + (spare if left + length == last else 0), self.keys), dtype)
            per_bank = tiles_per_bank(dtype)
            for t, some in spans(len(self.tiles), per_bank):
                bank = psum((length, some, nl.tile_size.pmax), dtype)
                for i in range(some):
                    source = self.tiles[t + i][:, left : left + length]
                    nisa.nc_transpose(bank[:, i, 0 : self.size], source, engine=nisa.engine.tensor)
                into = out[0:length, t * self.size : (t + some) * self.size]
                nisa.tensor_copy(
                    into.reshape_dim(1, (some, self.size)),
                    bank[:, :, 0 : self.size],
                    engine=nisa.engine.scalar,
                )
            found.append(out)
        return found


def tiles_per_bank(dtype):
    """Tiles of 128 columns that a PSUM bank holds."""
    return 4 if dtype == nl.float32 else 8
