"""Which tiles of queries are not right: a row's sum is too small, or a list has too few places."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.nsa_attention.work import SAFE_SUM

LATEST = 64  # tiles of a stream whose flags are written together


class Flags(nl.NKIObject):
    """Attributes:
    unsafe, crowded: [1, tiles] float32 in HBM, 1 where a row's sum is too small; 1 where a union is
        longer than its list and no row is unsafe.
    lists: see `unite.Unions`.
    lowest: [rows, streams, LATEST] float32, smallest row sums of the latest tiles, by number.
    latest: of each stream, (first column, number of its tile, columns).
    """

    def __init__(self, geometry, unsafe, crowded, lists):
        self.geometry, self.lists = geometry, lists
        self.unsafe, self.crowded = unsafe, crowded
        self.lowest = sbuf((geometry.rows, 2, LATEST), nl.float32)
        self.latest = [(0, 0, 0), (LATEST, 0, 0)]

    def keep(self, tile, sums):
        """A tile is done; sums: [rows, branches, parts] float32."""
        first, number, count = self.latest[tile.stream]
        if tile.stream == 0:  # numbers ascend
            column = count
            number = tile.number - count
        else:
            first = column = first - 1
            number = tile.number
        self.latest[tile.stream] = (first, number, count + 1)
        lowest = self.lowest[:, tile.stream, column : column + 1]
        nisa.tensor_reduce(lowest, nl.minimum, sums, axis=(1, 2))
        if count + 1 == LATEST:
            self.write(tile.stream)

    def write(self, stream):
        """Writes the flags of a stream's latest tiles, if any."""
        column, number, count = self.latest[stream]
        self.latest[stream] = (LATEST * stream, 0, 0)
        if count == 0:
            return
        g = self.geometry
        unsafe = sbuf((g.rows, count), nl.bfloat16)
        lowest = self.lowest[:, stream, column : column + count]
        # NaN counts as unsafe: `less` would let it pass.
        nisa.tensor_scalar(unsafe, lowest, nl.greater_equal, SAFE_SUM)
        nisa.tensor_scalar(unsafe, unsafe, nl.multiply, -1.0, op1=nl.add, operand1=1.0)
        ones = sbuf((g.rows, 1), nl.bfloat16)
        nisa.memset(ones, 1.0)
        counts = psum((1, count))
        nisa.nc_matmul(counts, ones, unsafe, accumulate=False)
        flags = sbuf((1, count), nl.float32)
        nisa.tensor_copy(flags, counts, engine=nisa.engine.vector)
        nisa.tensor_scalar(flags, flags, nl.minimum, 1.0)
        nisa.dma_copy(self.unsafe[:, number : number + count], flags)
        late = sbuf((1, count), nl.float32)
        nisa.memset(late, 0.0)
        first = max(number, g.crowded_from())
        if first < number + count:
            beyond = sbuf((1, number + count - first), nl.int32)
            last = g.slots - g.forced
            column = self.lists[first : number + count, last : last + 1]
            nisa.dma_copy(beyond, column.reshape(beyond.shape))
            # Sums of part of a union are at most its own: where these are safe, so are those.
            some, safe = late[:, first - number :], flags[:, first - number :]
            nisa.scalar_tensor_tensor(some, beyond, nl.greater, 0.0, nl.greater, safe)
        nisa.dma_copy(self.crowded[:, number : number + count], late)
