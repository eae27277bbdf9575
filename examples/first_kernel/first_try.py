"""What does not work: see docs/first_kernel.md."""

import nki
import nki.isa as nisa
import nki.language as nl

BLOCK = 32


@nki.jit
def one_tile(x):
    """Means of blocks of 32 tokens: x [T, D] -> y [T / 32, D]."""
    tokens, dim = x.shape
    y = nl.ndarray((tokens // BLOCK, dim), x.dtype, buffer=nl.shared_hbm)
    tile = nl.ndarray((tokens, dim), x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    total = nl.ndarray((tokens // BLOCK, dim), nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(total, nl.add, tile, axis=1)
    nisa.dma_copy(dst=y, src=total)
    return y
