"""Keys and values by chunks, and what a core knows of its rows in one number."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf


class Source(nl.NKIObject):
    """Where keys and values come from, by the first key of a chunk."""

    def __init__(self, k_t, v, chunks):
        self.k_t = k_t
        self.v = v
        self.chunks = chunks

    def keys(self, first):
        return self.chunks.turned("k", self.k_t, first)

    def folded_keys(self, first):
        return self.chunks.folded("folded", self.k_t, first)

    def values(self, first):
        return self.chunks.tiles("v", self.v, first, True)


def largest_of(unsafe):
    """The largest count of unsafe rows of a column, float32 [1, 1], of 0s and 1s [128, columns]."""
    columns = unsafe.shape[1]
    ones = sbuf((128, 1), nl.float32)
    nisa.memset(ones, 1.0)
    counted = psum((1, columns), nl.float32)
    nisa.nc_matmul(counted, ones, unsafe, accumulate=False)
    count = sbuf((1, 1), nl.float32)
    nisa.tensor_reduce(count, nl.maximum, counted, axis=1)
    return count
