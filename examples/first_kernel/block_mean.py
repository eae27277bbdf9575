"""The kernels of docs/first_kernel.md: means of blocks of 32 tokens, three times."""

import nki
import nki.isa as nisa
import nki.language as nl

BLOCK = 32


@nki.jit
def tokens_on_partitions(x):
    """Means of blocks of 32 tokens: x [T, D] -> y [T / 32, D]."""
    tokens, dim = x.shape
    y = nl.ndarray((tokens // BLOCK, dim), x.dtype, buffer=nl.shared_hbm)
    ones = nl.ndarray((BLOCK, 1), x.dtype, buffer=nl.sbuf)
    nisa.memset(ones, 1.0 / BLOCK)
    for i in range(tokens // BLOCK):
        tile = nl.ndarray((BLOCK, dim), x.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile, src=x[i * BLOCK : (i + 1) * BLOCK, :])
        total = nl.ndarray((1, dim), nl.float32, buffer=nl.psum)
        nisa.nc_matmul(total, ones, tile)
        mean = nl.ndarray((1, dim), x.dtype, buffer=nl.sbuf)
        nisa.tensor_copy(mean, total)
        nisa.dma_copy(dst=y[i : i + 1, :], src=mean)
    return y


@nki.jit
def blocks_on_partitions(x):
    """The same; a partition holds a block, so that nothing crosses partitions."""
    tokens, dim = x.shape
    blocks = tokens // BLOCK
    y = nl.ndarray((blocks, dim), x.dtype, buffer=nl.shared_hbm)
    rows = x.reshape((blocks, BLOCK, dim))
    for i in range(0, blocks, 128):
        n = min(128, blocks - i)
        tile = nl.ndarray((n, BLOCK, dim), x.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile, src=rows[i : i + n, :, :])
        total = nl.ndarray((n, dim), nl.float32, buffer=nl.sbuf)
        nisa.tensor_reduce(total, nl.add, tile.permute((0, 2, 1)), axis=2)
        nisa.tensor_scalar(total, total, nl.multiply, 1.0 / BLOCK)
        nisa.dma_copy(dst=y[i : i + n, :], src=total)
    return y


@nki.jit
def halves(x):
    """The same; halves are added to each other, so that every operand is contiguous."""
    tokens, dim = x.shape
    blocks = tokens // BLOCK
    y = nl.ndarray((blocks, dim), x.dtype, buffer=nl.shared_hbm)
    rows = x.reshape((blocks, BLOCK, dim))
    for i in range(0, blocks, 128):
        n = min(128, blocks - i)
        tile = nl.ndarray((n, BLOCK, dim), nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile, src=rows[i : i + n, :, :])
        width = BLOCK
        while width > 1:
            width = width // 2
            low, high = tile[:, 0:width, :], tile[:, width : 2 * width, :]
            nisa.tensor_tensor(low, low, high, nl.add)
        mean = nl.ndarray((n, dim), x.dtype, buffer=nl.sbuf)
        nisa.tensor_scalar(mean, tile[:, 0, :], nl.multiply, 1.0 / BLOCK)
        nisa.dma_copy(dst=y[i : i + n, :], src=mean)
    return y
