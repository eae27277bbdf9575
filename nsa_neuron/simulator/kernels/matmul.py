"""fp32 matmul in three tilings of AWS's kernel-optimization tutorial: lhs_t [K, M], rhs [K, N]."""

from ..nki import isa as nisa
from ..nki import language as nl

TILE_K, TILE_M, TILE_N = 128, 128, 512


def _load(source, row, rows, column, columns):
    tile = nl.ndarray((rows, columns), source.dtype)
    nisa.dma_copy(tile, source[row : row + rows, column : column + columns])
    return tile


def _evict(result, psum, m, n):
    """PSUM tile -> SBUF -> result rows m.., columns n.. ."""
    tile = nl.ndarray(psum.shape, result.dtype)
    nisa.tensor_copy(tile, psum)
    nisa.dma_copy(result[m : m + TILE_M, n : n + TILE_N], tile)


def loads_inside(lhs_t, rhs):
    """Both operands loaded in the innermost loop (the tutorial's second version)."""
    (k_size, m_size), n_size = lhs_t.shape, rhs.shape[1]
    result = nl.ndarray((m_size, n_size), lhs_t.dtype, buffer=nl.shared_hbm)
    for m in range(0, m_size, TILE_M):
        for n in range(0, n_size, TILE_N):
            psum = nl.ndarray((TILE_M, TILE_N), nl.float32, buffer=nl.psum)
            for k in range(0, k_size, TILE_K):
                stationary = _load(lhs_t, k, TILE_K, m, TILE_M)
                moving = _load(rhs, k, TILE_K, n, TILE_N)
                nisa.nc_matmul(psum, stationary, moving)
            _evict(result, psum, m, n)
    return result


def loads_hoisted(lhs_t, rhs):
    """A column of lhs_t loaded once per row of results, a column of rhs per result (third)."""
    (k_size, m_size), n_size = lhs_t.shape, rhs.shape[1]
    result = nl.ndarray((m_size, n_size), lhs_t.dtype, buffer=nl.shared_hbm)
    steps = range(0, k_size, TILE_K)
    for m in range(0, m_size, TILE_M):
        stationary = [_load(lhs_t, k, TILE_K, m, TILE_M) for k in steps]
        for n in range(0, n_size, TILE_N):
            moving = [_load(rhs, k, TILE_K, n, TILE_N) for k in steps]
            psum = nl.ndarray((TILE_M, TILE_N), nl.float32, buffer=nl.psum)
            for a, b in zip(stationary, moving, strict=True):
                nisa.nc_matmul(psum, a, b)
            _evict(result, psum, m, n)
    return result


def blocked(lhs_t, rhs, block_m=16, block_n=2, block_k=8):
    """All three dims in blocks, results accumulated in SBUF (fifth); blocks count tiles."""
    (k_size, m_size), n_size = lhs_t.shape, rhs.shape[1]
    wide_m, wide_n = block_m * TILE_M, block_n * TILE_N
    result = nl.ndarray((m_size, n_size), lhs_t.dtype, buffer=nl.shared_hbm)
    for n in range(0, n_size, wide_n):
        sums = []
        for _ in range(m_size // TILE_M):
            tile = nl.ndarray((TILE_M, block_n, TILE_N), result.dtype)
            nisa.memset(tile, 0.0)
            sums.append(tile)
        for k in range(0, k_size, block_k * TILE_K):
            moving = _load_block(rhs, k, block_k, n, wide_n)
            for m in range(0, m_size, wide_m):
                stationary = _load_block(lhs_t, k, block_k, m, wide_m)
                for j in range(block_n):
                    for i in range(block_m):
                        _accumulate(sums[m // TILE_M + i], stationary, moving, i, j, block_k)
        for i, tile in enumerate(sums):
            rows = slice(i * TILE_M, (i + 1) * TILE_M)
            nisa.dma_copy(result[rows, n : n + wide_n], tile.reshape((TILE_M, wide_n)))
    return result


def _load_block(source, k, block_k, column, columns):
    block = nl.ndarray((TILE_K, block_k, columns), source.dtype)
    for b in range(block_k):
        row = k + b * TILE_K
        nisa.dma_copy(block[:, b, :], source[row : row + TILE_K, column : column + columns])
    return block


def _accumulate(total, stationary, moving, i, j, block_k):
    """total[:, j] += stationary block column i times moving block column j."""
    psum = nl.ndarray((TILE_M, TILE_N), nl.float32, buffer=nl.psum)
    for b in range(block_k):
        nisa.nc_matmul(
            psum,
            stationary[:, b, i * TILE_M : (i + 1) * TILE_M],
            moving[:, b, j * TILE_N : (j + 1) * TILE_N],
        )
    nisa.tensor_tensor(total[:, j, :], total[:, j, :], psum, nl.add)
