"""Keys and values of a branch, gathered from pages.

A pool is [units, unit, Hkv, D]: a unit is a page, an equal part of a page, or a selection block,
of at most 128 tokens. One DMA with a run-time address fetches one unit.
"""

import nki.language as nl

from nki_kernels.common.buffers import sbuf
from nki_kernels.common.queues import fetch
from nki_kernels.common.spans import spans

QUEUES = "yga"
"""All three, see `queues.fetch`: ScalarE and GpSimd have little else to do."""

BANK = 512
"""float32 columns of a PSUM bank: most keys of a group."""


class Branch(nl.NKIObject):
    """The units that a branch reads for some kv heads of a sequence.

    Attributes:
        k, v: pools [units, unit, Hkv, D].
        numbers: [1, units] int32; where heads choose for themselves, one head's after another's.
        count: units of a head.
    """

    def __init__(self, k, v, numbers, first_head, heads, shared):
        self.k, self.v, self.numbers = k, v, numbers
        self.ahead, self.keys_ahead = [], []  # tiles that have been asked for already
        self.first_head, self.heads, self.shared = first_head, heads, shared
        self.unit = k.shape[1]
        self.count = numbers.shape[1] // (1 if shared else heads)
        self.keys = self.count * self.unit
        per_tile = max(1, nl.tile_size.pmax // self.unit)
        self.tile = min(per_tile, self.count) * self.unit
        self.group = max(1, BANK // self.tile) * self.tile

    def tiles(self):
        """(first key, keys) of tiles of at most 128 keys."""
        return spans(self.keys, self.tile)

    def groups(self):
        """(first key, keys) of groups of whole tiles of at most 512 keys."""
        return spans(self.keys, self.group)

    def ask(self, pool, most_bytes):
        """Tiles of all keys or values, asked for now; none if they take too much of a partition."""
        item = 4 if pool.dtype == nl.float32 else 2
        found = []
        if len(self.tiles()) * self.heads * pool.shape[3] * item <= most_bytes:
            for first, length in self.tiles():
                found.append(self.load(pool, first, length))
        return found

    def ask_values(self, most_bytes):
        self.ahead = self.ask(self.v, most_bytes)

    def ask_keys(self, most_bytes):
        self.keys_ahead = self.ask(self.k, most_bytes)

    def values(self, first, length):
        """Values of a tile: [keys, heads, DV]."""
        if len(self.ahead) > 0:
            return self.ahead[first // self.tile]
        return self.load(self.v, first, length)

    def load(self, pool, first, length):
        """Keys first .. first + length of k or v: [keys, heads, D]."""
        tile = sbuf((length, self.heads, pool.shape[3]), pool.dtype)
        own = slice(self.first_head, self.first_head + self.heads)
        for start, size in spans(length, self.unit):
            number = (first + start) // self.unit
            target = tile[start : start + size, :, :]
            if self.shared:
                unit = self.numbers[0:1, number : number + 1]
                fetch(target, pool[:, :, own, :].select(0, unit), QUEUES[number % len(QUEUES)])
            else:
                for h in range(self.heads):
                    place = h * self.count + number
                    unit = self.numbers[0:1, place : place + 1]
                    source = pool[:, :, self.first_head + h, :].select(0, unit)
                    fetch(target[:, h, :], source, QUEUES[(number + h) % len(QUEUES)])
        return tile

    def load_keys(self, first, length):
        """Tiles [keys, heads, DK] of the keys of a group."""
        found = []
        for start, size in spans(length, self.tile):
            if len(self.keys_ahead) > 0:
                found.append(self.keys_ahead[(first + start) // self.tile])
            else:
                found.append(self.load(self.k, first + start, size))
        return found


def load_numbers(row):
    """A row of an int32 table [units] as [1, units]."""
    numbers = sbuf((1, row.shape[0]), nl.int32)
    fetch(numbers, row.expand_dim(0))
    return numbers


def load_table(row, pairs):
    """A row of an int32 table [blocks] on each pair's partition, [pairs, blocks]."""
    table = sbuf((pairs, row.shape[0]), nl.int32)
    fetch(table, row.expand_dim(0).broadcast(0, pairs))
    return table
