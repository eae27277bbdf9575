"""Tiles of queries and what each of them visits: plain integers."""

import nki.language as nl

QUERIES = 32  # of a tile
KEYS = 128  # of a tile of keys
BLOCK = 64  # tokens of a selection block
TOKENS = 8  # of a row, by which blocks are gathered
AT_ONCE = 16  # blocks that are gathered by rows together
QUADRANT = 32  # rows of PE's array
STRIDE = 16  # tokens between compressed keys
BLOCKS_OF_KEYS = KEYS * STRIDE // BLOCK
CHUNKS = 4  # of the blocks that are ranked, one for every 32 lanes
PIECE = 128  # blocks; a chunk has a whole number of pieces


class Geometry(nl.NKIObject):
    """Sizes of a call.

    Attributes:
        columns: rows (query, head) of a tile, `parts` times `rows`, of `per_part` whole queries.
        first: position of the first tile's first query, a multiple of 32. tiles: of a kv head;
            behind: the place of a tile that nobody wants.
        keys: compressed keys, Nc. blocks: selection blocks. forced: most forced blocks of a tile.
        slots: most blocks that a tile of queries takes from selection, even.
        by_rows: (least tiles of compressed keys, times AT_ONCE blocks that come by rows); the last
            that applies counts.
        padded: blocks of all tiles of keys, in whole pieces of each chunk.
    """

    def __init__(self, group, block, count, initial, local, window, slots, by_rows, past, tokens):
        self.group = group
        self.block = block
        self.count = count
        self.initial = initial
        self.local = local
        self.window = window
        self.slots = slots
        self.by_rows = by_rows
        self.columns = QUERIES * group
        self.rows = min(nl.tile_size.pmax, self.columns)
        self.parts = self.columns // self.rows
        self.per_part = self.rows // group
        self.first = past // QUERIES * QUERIES
        self.tiles = self.behind = (tokens - self.first + QUERIES - 1) // QUERIES
        self.keys = (tokens - block) // STRIDE + 1 if tokens >= block else 0
        self.blocks = (tokens + BLOCK - 1) // BLOCK
        self.forced = initial + local
        most = (self.keys + KEYS - 1) // KEYS * BLOCKS_OF_KEYS
        self.padded = max(1, (most + CHUNKS * PIECE - 1) // (CHUNKS * PIECE)) * CHUNKS * PIECE

    def key_tiles_of_window(self):
        """Most tiles of keys that a tile of queries sees of its window."""
        return (self.window + QUERIES - 2) // KEYS + 2

    def ranked_from(self):
        """The first tile whose blocks are chosen; before, all are taken."""
        if self.count <= self.forced:
            return self.tiles
        position = self.count * BLOCK
        return min(self.tiles, max(0, (position - self.first) // QUERIES))

    def crowded_from(self):
        """The first tile whose queries may choose more blocks than its list has places for."""
        if self.ranked_from() == self.tiles:
            return self.tiles
        position = self.slots * BLOCK
        return min(self.tiles, max(self.ranked_from(), (position - self.first) // QUERIES))


class Tile(nl.NKIObject):
    """Queries t0 .. t0 + 31 with all heads of a kv head; they have one block of their own.

    Attributes:
        own: that block; blocks: how many there are up to it.
        taken: blocks whose places in the list are static, `own` first.
        ranked: whether others are chosen; chosen: how many by a query; listed: places for them.
        crowded: whether there may be too few.
        slots: places of the list. groups: of AT_ONCE blocks that come by rows, in the last places;
            paged: places whose blocks come as pages, which `rows_from` ends.
        key_tiles: tiles of compressed keys that some query sees.
        known: blocks that these have shares in, `pieces` pieces. width: blocks of a chunk.
        first_near, last_near: tiles of keys of the window.
        stream: which ring of window tiles it uses.
    """

    def __init__(self, geometry, number, stream):
        g = geometry
        self.number = number
        self.stream = stream
        self.t0 = g.first + QUERIES * number
        self.own = self.t0 // BLOCK
        self.blocks = self.own + 1
        seen = self.t0 + QUERIES - g.block
        seen = min(g.keys, seen // STRIDE + 1) if seen >= 0 else 0
        self.key_tiles = (seen + KEYS - 1) // KEYS
        self.known = self.key_tiles * BLOCKS_OF_KEYS
        self.pieces = (self.known + PIECE - 1) // PIECE
        self.width = PIECE * ((self.pieces + CHUNKS - 1) // CHUNKS)
        forced = []
        for block in range(self.own, max(-1, self.own - g.local), -1):
            forced.append(block)
        for block in range(min(g.initial, self.own - g.local + 1)):
            forced.append(block)
        self.forced = forced
        self.taken = forced
        self.chosen, self.listed = 0, 0
        self.slots = len(forced)
        if self.blocks <= g.count:
            self.taken = []
            for block in range(self.own, -1, -1):
                self.taken.append(block)
            self.slots = self.blocks
        elif g.count > len(forced):
            self.chosen = g.count - len(forced)
            free = self.blocks - len(forced)
            self.listed = min(g.slots - len(forced), free + (free + len(forced)) % 2)
            self.slots = len(forced) + self.listed
        self.ranked = self.chosen > 0
        self.crowded = number >= g.crowded_from()
        self.groups = 0
        for least, groups in g.by_rows:
            if self.ranked and self.slots == g.slots and self.key_tiles >= least:
                self.groups = min(groups, self.listed // AT_ONCE)
        self.paged = self.rows_from = self.slots - AT_ONCE * self.groups
        self.first_near = max(0, self.t0 - g.window + 1) // KEYS
        self.last_near = (self.t0 + QUERIES - 1) // KEYS


def tiles_of(geometry, paired):
    """All tiles; `paired`: from both ends in turn, so that short and long ones alternate."""
    found = []
    low, high = 0, geometry.tiles - 1
    while low <= high:
        found.append(Tile(geometry, low, 0))
        if paired and low < high:
            found.append(Tile(geometry, high, 1))
            high -= 1
        low += 1
    return found
