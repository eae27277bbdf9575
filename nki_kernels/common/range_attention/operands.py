"""Operands of the attention kernels: loads, transposes, row shifts, masks.

Rows are (query, head) pairs. "Column" form has rows on partitions, "row" form along the free dim.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.queues import move
from nki_kernels.common.range_attention.geometry import cut

SMALLEST_SUM = 1e-18  # what log takes, with room; below it a sum counts as nothing


class Constants(nl.NKIObject):
    """Tensors that every tile uses, made once.

    `ones` [3, 128] adds shift rows to every key; `key_index` [128, 1] float32 counts partitions;
    `one_row` [1, 128], `one_column` and `minus_infinity` [128, 1] float32.
    """

    def __init__(self, dtype):
        self.shift_dtype = nl.float32 if dtype == nl.float32 else nl.bfloat16
        self.pieces = 1 if dtype == nl.float32 else 3
        self.ones = sbuf((self.pieces, 128), self.shift_dtype)
        nisa.memset(self.ones, 1.0)
        self.key_index = sbuf((128, 1), nl.float32)
        nisa.iota(self.key_index, [[0, 1]], offset=0, channel_multiplier=1)
        self.one_row = sbuf((1, 128), nl.float32)
        nisa.memset(self.one_row, 1.0)
        self.one_column = sbuf((128, 1), nl.float32)
        nisa.memset(self.one_column, 1.0)
        self.minus_infinity = sbuf((128, 1), nl.float32)
        nisa.memset(self.minus_infinity, float("-inf"))
        self.positions = {}

    def position(self, key0):
        """key0 + partition, float32 [128, 1]."""
        if key0 not in self.positions:
            moved = sbuf((128, 1), nl.float32)
            nisa.tensor_scalar(moved, self.key_index, nl.add, float(key0))
            return moved
        return self.positions[key0]

    def keep_positions(self, keys):
        """Makes the positions of the tiles of a chunk of `keys` keys, once."""
        for key0 in range(0, keys, 128):
            self.positions[key0] = self.position(key0)


def load_rows(source, tile, p):
    """Part p of `source` [B, S, Hq, D] as [rows, D]."""
    first, rows = tile.part(p)
    queries = rows // tile.heads
    t0 = tile.t0 + first // tile.heads
    loaded = sbuf((rows, source.shape[3]), source.dtype)
    h1 = tile.h0 + tile.heads
    nisa.dma_copy(loaded, source[tile.batch, t0 : t0 + queries, tile.h0 : h1, :])
    return loaded


def store_rows(target, tile, p, values):
    """Writes [rows, D] to part p of `target` [B, S, Hq, D]."""
    first, rows = tile.part(p)
    t0 = tile.t0 + first // tile.heads
    t1 = t0 + rows // tile.heads
    nisa.dma_copy(target[tile.batch, t0:t1, tile.h0 : tile.h0 + tile.heads, :], values)


def transpose_rows(parts, tile, fold=False):
    """Row tiles [rows, D] of a tile's parts -> chunks of at most 128 of D, [D chunk, columns].

    With `fold` a second chunk of at most 64 lies on both halves of the partitions, see
    `Chunks.folded`.
    """
    found = []
    dtype = parts[0].dtype
    for d0, width in cut(parts[0].shape[1], 128):
        turned = psum((width, tile.columns), dtype)
        for p in range(tile.parts):
            first, rows = tile.part(p)
            nisa.nc_transpose(
                turned[:, first : first + rows],
                parts[p][:, d0 : d0 + width],
                engine=nisa.engine.tensor,
            )
        twice = fold and d0 > 0 and width <= 64
        kept = sbuf((128 if twice else width, tile.columns), dtype)
        nisa.tensor_copy(kept[0:width, :], turned, engine=nisa.engine.scalar)
        if twice:
            nisa.tensor_copy(kept[64 : 64 + width, :], turned, engine=nisa.engine.scalar)
        found.append(kept)
    return found


def row_bounds(bounds, tile, p):
    """lo and hi of part p's rows in column form, [rows, 2]."""
    first, rows = tile.part(p)
    t0 = tile.t0 + first // tile.heads
    loaded = sbuf((rows, 2), nl.float32)
    per_row = bounds[t0 : t0 + rows // tile.heads, :].expand_dim(1).broadcast(1, tile.heads)
    nisa.dma_copy(loaded, per_row)
    return loaded


def query_bounds(bounds, tile):
    """lo and hi of a tile's queries in row form on every partition, [128, queries, 2]."""
    loaded = sbuf((128, tile.count, 2), nl.float32)
    rows = bounds[tile.t0 : tile.t0 + tile.count, :]
    nisa.dma_copy(loaded, rows.expand_dim(0).broadcast(0, 128))
    return loaded


def shift_rows(values, tile, constants):
    """Minus one float32 per row, from column form [rows of a part, parts] to row form.

    The result [pieces, columns] is added to score tiles by a matmul with `constants.ones`. With
    16-bit inputs a value is the sum of three bfloat16 pieces, which is the float32 itself.
    """
    rows = values.shape[0]
    rest = sbuf((rows, tile.parts), nl.float32)
    nisa.tensor_scalar(rest, values, nl.multiply, -1.0)
    pieces = sbuf((rows, tile.parts, constants.pieces), constants.shift_dtype)
    for i in range(constants.pieces):
        nisa.tensor_copy(pieces[:, :, i], rest, engine=nisa.engine.vector)
        if i + 1 < constants.pieces:
            nisa.tensor_tensor(rest, rest, pieces[:, :, i], nl.subtract)
    turned = psum((constants.pieces, tile.columns), constants.shift_dtype)
    for p in range(tile.parts):
        first, count = tile.part(p)
        nisa.nc_transpose(
            turned[:, first : first + count], pieces[0:count, p, :], engine=nisa.engine.tensor
        )
    kept = sbuf((constants.pieces, tile.columns), constants.shift_dtype)
    nisa.tensor_copy(kept, turned, engine=nisa.engine.vector)
    return kept


def visible(limits, tile, constants, key0, keys):
    """Which of the keys key0 .. key0 + keys each query sees, uint16 [keys, queries]."""
    seen = sbuf((keys, tile.count), nl.uint16)
    position = constants.position(key0)[0:keys, :]
    nisa.tensor_scalar(seen, limits[0:keys, :, 1], nl.greater, position)
    if not tile.from_start:
        nisa.scalar_tensor_tensor(
            seen, limits[0:keys, :, 0], nl.less_equal, position, nl.multiply, seen
        )
    return seen


def hide(scores, seen, tile):
    """Zeroes [keys, columns] where a query does not see a key; infinities there vanish too."""
    keys = scores.shape[0]
    by_head = scores.reshape((keys, tile.count, tile.heads))
    predicate = seen.expand_dim(2).broadcast(2, tile.heads)
    nisa.select_reduce(by_head, predicate, by_head, 0.0)


class Chunks(nl.NKIObject):
    """Key-like tensors of one kv head, by chunks of `size` keys.

    All chunks are kept if `keys` <= `resident`, else the latest of each tensor. queue: of loads
    with run-time addresses, see `queues.fetch`.
    """

    def __init__(self, size, keys, resident, queue=""):
        self.queue = queue
        self.size = size
        self.keys = keys
        self.keep = keys <= resident
        self.batch = -1
        self.head = -1
        self.kept = {}
        self.latest = {}

    def select(self, batch, head):
        """Makes a kv head the current one."""
        if self.batch != batch or self.head != head:
            self.batch = batch
            self.head = head
            self.kept = {}
            self.latest = {}

    def of(self, first, count):
        """(chunk's first key, first key in it, keys) that keys first .. first + count touch."""
        found = []
        for start in range(first // self.size * self.size, first + count, self.size):
            skipped = max(first, start) - start
            found.append((start, skipped, min(start + self.size, first + count) - start - skipped))
        return found

    def turned(self, name, source, first):
        """Keys of a chunk along the free dim, from source [B, Hkv, D, T].

        Returns:
            [D chunk, keys] for each chunk of at most 128 of D.
        """
        key = name + str(first)
        if key in self.kept:
            return self.kept[key]
        found = load_turned(source, self.batch, self.head, first, self._count(first), self.queue)
        self._keep(name, key, found)
        return found

    def folded(self, name, source, first):
        """As `turned`, but what is left of D after 128, if at most 64, lies [128, pairs, 128]:
        tiles of 128 keys in turn on the lower and the upper half of the partitions, so that PE
        multiplies two of them at a time, each on half of its rows."""
        key = name + str(first)
        if key in self.kept:
            return self.kept[key]
        width = source.shape[2] - 128
        if not 0 < width <= 64:
            return self.turned(name, source, first)
        count = self._count(first)
        part = source[self.batch, self.head, :, first : first + count]
        lower = sbuf((128, count), source.dtype)
        self.fetch(lower, part[0:128, :])
        pairs, rest = count // 256, count % 256
        rest_of_d = sbuf((128, pairs + (1 if rest > 0 else 0), 128), source.dtype)
        for half in range(2):
            p0 = 64 * half
            if pairs > 0:
                by_tile = part[128:, 0 : pairs * 256].reshape_dim(1, (pairs, 2, 128))
                self.fetch(rest_of_d[p0 : p0 + width, 0:pairs, :], by_tile[:, :, half, :])
            left = min(128, rest - 128 * half)
            if left > 0:
                first_key = pairs * 256 + 128 * half
                self.fetch(
                    rest_of_d[p0 : p0 + width, pairs, 0:left],
                    part[128:, first_key : first_key + left],
                )
        self._keep(name, key, [lower, rest_of_d])
        return [lower, rest_of_d]

    def tiles(self, name, source, first, ones):
        """Keys of a chunk on partitions, from source [B, T, Hkv, D].

        Returns:
            [128, tiles, D], 128 keys a tile; with `ones` [128, tiles, D + 1], the last column 1,
            so that P @ it sums P as well.
        """
        key = name + str(first)
        if key in self.kept:
            return self.kept[key]
        count, width = self._count(first), source.shape[3]
        chunk = sbuf((128, (count + 127) // 128, width + (1 if ones else 0)), source.dtype)
        if ones:
            nisa.memset(chunk[:, :, width : width + 1], 1.0)
        whole, rest = count // 128, count % 128
        rows = source[self.batch, first : first + count, self.head, :]
        if whole > 0:
            by_tile = rows[0 : whole * 128, :].reshape_dim(0, (whole, 128)).permute((1, 0, 2))
            self.fetch(chunk[:, 0:whole, 0:width], by_tile)
        if rest > 0:
            self.fetch(chunk[0:rest, whole, 0:width], rows[whole * 128 : count, :])
        self._keep(name, key, chunk)
        return chunk

    def fetch(self, target, source):
        move(target, source, self.queue)

    def _keep(self, name, key, loaded):
        if not self.keep:
            if name in self.latest:
                self.kept.pop(self.latest[name])
            self.latest[name] = key
        self.kept[key] = loaded

    def _count(self, first):
        return min(self.size, self.keys - first)


def load_turned(source, batch, head, first, count, queue=""):
    """Keys first .. first + count of source [B, Hkv, D, T], by chunks of at most 128 of D."""
    found = []
    for d0, width in cut(source.shape[2], 128):
        part = sbuf((width, count), source.dtype)
        move(part, source[batch, head, d0 : d0 + width, first : first + count], queue)
        found.append(part)
    return found
