"""gelu(x @ w) five times, each faster than the one before; docs/profiling.md tells the story.

All take x_t [K, M] (x transposed) and w [K, N] and return [M, N]; K and M are multiples of 128, N
of 512. Profile one with

    nsa profile examples/profiling/linear_gelu.py::one_buffer \\
        --arg x_t=randn:1024x512:bf16 --arg w=randn:1024x2048:bf16
"""

import nki
import nki.isa as nisa
import nki.language as nl

P = 128  # partitions: rows of a tile


@nki.jit
def one_buffer(x_t, w):
    """Every tile is loaded where it is needed, always into the same place."""
    (K, M), N = x_t.shape, w.shape[1]
    out = nl.ndarray((M, N), x_t.dtype, buffer=nl.shared_hbm)
    x_tile = nl.ndarray((P, P), x_t.dtype, buffer=nl.sbuf)
    w_tile = nl.ndarray((P, P), w.dtype, buffer=nl.sbuf)
    for m in range(0, M, P):
        for n in range(0, N, P):
            sums = nl.ndarray((P, P), nl.float32, buffer=nl.psum)
            for k in range(0, K, P):
                nisa.dma_copy(x_tile, x_t[k : k + P, m : m + P])
                nisa.dma_copy(w_tile, w[k : k + P, n : n + P])
                nisa.nc_matmul(sums, x_tile, w_tile)
            result = nl.ndarray((P, P), x_t.dtype, buffer=nl.sbuf)
            nisa.activation(result, nl.gelu, sums)
            nisa.dma_copy(out[m : m + P, n : n + P], result)
    return out


@nki.jit
def fresh_buffers(x_t, w):
    """Step 1: new tiles in each iteration, so that loads run ahead of the matmuls."""
    (K, M), N = x_t.shape, w.shape[1]
    out = nl.ndarray((M, N), x_t.dtype, buffer=nl.shared_hbm)
    for m in range(0, M, P):
        for n in range(0, N, P):
            sums = nl.ndarray((P, P), nl.float32, buffer=nl.psum)
            for k in range(0, K, P):
                x_tile = nl.ndarray((P, P), x_t.dtype, buffer=nl.sbuf)
                w_tile = nl.ndarray((P, P), w.dtype, buffer=nl.sbuf)
                nisa.dma_copy(x_tile, x_t[k : k + P, m : m + P])
                nisa.dma_copy(w_tile, w[k : k + P, n : n + P])
                nisa.nc_matmul(sums, x_tile, w_tile)
            result = nl.ndarray((P, P), x_t.dtype, buffer=nl.sbuf)
            nisa.activation(result, nl.gelu, sums)
            nisa.dma_copy(out[m : m + P, n : n + P], result)
    return out


@nki.jit
def loaded_once(x_t, w):
    """Step 2: both operands are loaded once and stay in SBUF, in 128 x 128 tiles."""
    (K, M), N = x_t.shape, w.shape[1]
    out = nl.ndarray((M, N), x_t.dtype, buffer=nl.shared_hbm)
    x_tiles, w_tiles = load_tiles(x_t), load_tiles(w)
    for m in range(0, M, P):
        for n in range(0, N, P):
            sums = nl.ndarray((P, P), nl.float32, buffer=nl.psum)
            for k in range(0, K, P):
                nisa.nc_matmul(sums, x_tiles[k, m], w_tiles[k, n])
            result = nl.ndarray((P, P), x_t.dtype, buffer=nl.sbuf)
            nisa.activation(result, nl.gelu, sums)
            nisa.dma_copy(out[m : m + P, n : n + P], result)
    return out


def load_tiles(source):
    """All 128 x 128 tiles of a matrix, by their first row and column."""
    rows, columns = source.shape
    tiles = {}
    for row in range(0, rows, P):
        for column in range(0, columns, P):
            tile = nl.ndarray((P, P), source.dtype, buffer=nl.sbuf)
            nisa.dma_copy(tile, source[row : row + P, column : column + P])
            tiles[row, column] = tile
    return tiles


@nki.jit
def wide_tiles(x_t, w, width=512):
    """Step 3: a matmul streams 512 columns, a bank of PSUM; one activation and store for all."""
    (K, M), N = x_t.shape, w.shape[1]
    out = nl.ndarray((M, N), x_t.dtype, buffer=nl.shared_hbm)
    x_rows = load_rows(x_t, 0, M)
    w_rows = load_rows(w, 0, N)
    for m in range(0, M, P):
        for n in range(0, N, width):
            sums = nl.ndarray((P, width), nl.float32, buffer=nl.psum)
            for k in range(0, K, P):
                nisa.nc_matmul(sums, x_rows[k][:, m : m + P], w_rows[k][:, n : n + width])
            result = nl.ndarray((P, width), x_t.dtype, buffer=nl.sbuf)
            nisa.activation(result, nl.gelu, sums)
            nisa.dma_copy(out[m : m + P, n : n + width], result)
    return out


def load_rows(source, first, last):
    """Columns first..last of a matrix, 128 rows at a time, by the first row."""
    bands = {}
    for row in range(0, source.shape[0], P):
        bands[row] = nl.ndarray((P, last - first), source.dtype, buffer=nl.sbuf)
        nisa.dma_copy(bands[row], source[row : row + P, first:last])
    return bands


@nki.jit
def in_order_of_use(x_t, w, width=512):
    """Step 4: columns of w are loaded just before their matmuls, so that TensorE starts early."""
    (K, M), N = x_t.shape, w.shape[1]
    out = nl.ndarray((M, N), x_t.dtype, buffer=nl.shared_hbm)
    x_rows = load_rows(x_t, 0, M)
    for n in range(0, N, width):
        w_rows = load_rows(w, n, n + width)
        for m in range(0, M, P):
            sums = nl.ndarray((P, width), nl.float32, buffer=nl.psum)
            for k in range(0, K, P):
                nisa.nc_matmul(sums, x_rows[k][:, m : m + P], w_rows[k])
            result = nl.ndarray((P, width), x_t.dtype, buffer=nl.sbuf)
            nisa.activation(result, nl.gelu, sums)
            nisa.dma_copy(out[m : m + P, n : n + width], result)
    return out
