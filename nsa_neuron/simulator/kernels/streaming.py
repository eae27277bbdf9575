"""Load, compute, store: vector add, exponential, transpose."""

from ..nki import isa as nisa
from ..nki import language as nl


def vector_add(a, b, free):
    """a + b, [n] each, in tiles of 128 x `free`."""
    columns = a.shape[0] // 128
    a, b = a.reshape((128, columns)), b.reshape((128, columns))
    out = nl.ndarray((128, columns), a.dtype, buffer=nl.shared_hbm)
    for start in range(0, columns, free):
        part = slice(start, start + free)
        tiles = [nl.ndarray((128, free), a.dtype) for _ in range(3)]
        nisa.dma_copy(tiles[0], a[:, part])
        nisa.dma_copy(tiles[1], b[:, part])
        nisa.tensor_tensor(tiles[2], tiles[0], tiles[1], nl.add)
        nisa.dma_copy(out[:, part], tiles[2])
    return out


def vector_add_rows(a, b, rows):
    """a + b, [n] each, in tiles of `rows` x 1."""
    n = a.shape[0]
    a, b = a.reshape((n, 1)), b.reshape((n, 1))
    out = nl.ndarray((n, 1), a.dtype, buffer=nl.shared_hbm)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        tiles = [nl.ndarray((rows, 1), a.dtype) for _ in range(3)]
        nisa.dma_copy(tiles[0], a[part])
        nisa.dma_copy(tiles[1], b[part])
        nisa.tensor_tensor(tiles[2], tiles[0], tiles[1], nl.add)
        nisa.dma_copy(out[part], tiles[2])
    return out


def exponential(x, triggered_by_gpsimd=False):
    """exp(x), [P, N] in one tile; the load's descriptors by software where asked."""
    mode = nisa.dge_mode.swdge if triggered_by_gpsimd else nisa.dge_mode.unknown
    tile, result = nl.ndarray(x.shape, x.dtype), nl.ndarray(x.shape, x.dtype)
    nisa.dma_copy(tile, x, dge_mode=mode)
    nisa.activation(result, nl.exp, tile)
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(out, result, dge_mode=mode)
    return out


def transpose(x):
    """x.T of a square matrix: rows of 128 loaded whole, TensorE transposes, a store per tile."""
    size = x.shape[0]
    out = nl.ndarray((size, size), x.dtype, buffer=nl.shared_hbm)
    for i in range(0, size, 128):
        rows = nl.ndarray((128, size), x.dtype)
        nisa.dma_copy(rows, x[i : i + 128, :])
        for j in range(0, size, 128):
            psum = nl.ndarray((128, 128), x.dtype, buffer=nl.psum)
            nisa.nc_transpose(psum, rows[:, j : j + 128])
            tile = nl.ndarray((128, 128), x.dtype)
            nisa.tensor_copy(tile, psum, engine=nisa.engine.scalar)
            nisa.dma_copy(out[j : j + 128, i : i + 128], tile)
    return out


def clone(x, parts):
    """A copy in HBM, each core its share in so many transfers."""
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    cores = nl.num_programs()
    rows = x.shape[0] // (cores * parts)
    for part in range(parts):
        first = (nl.program_id(0) * parts + part) * rows
        nisa.dma_copy(out[first : first + rows], x[first : first + rows])
    return out
