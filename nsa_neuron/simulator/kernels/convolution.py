"""3 x 3 convolution as nine shifted matmuls, in the tiling of a published student kernel.

Weights are transposed on TensorE first. Then, for each band of output rows, every output row's
three input rows are loaded (so each input row is loaded three times), and 9 x C_in / 128 matmuls
accumulate per 128 output channels. The published trace shows PSUM leaving through ScalarE and the
bias added on VectorE; the listing's zeroing of tiles that loads overwrite was not executed.
"""

from ..nki import isa as nisa
from ..nki import language as nl

K = 3


def _transposed_weights(w):
    """w [C_out, C_in, 3, 3] -> tiles[i][j][out][in] of [128 in, 128 out]."""
    outs, ins = w.shape[0] // 128, w.shape[1] // 128
    tiles = nl.ndarray((128, K, K, outs, ins, 128), w.dtype)
    for o in range(outs):
        rows = nl.ndarray((128, w.shape[1], K, K), w.dtype)
        nisa.dma_copy(rows, w[o * 128 : (o + 1) * 128])
        for c in range(ins):
            for i in range(K):
                for j in range(K):
                    psum = nl.ndarray((128, 128), w.dtype, buffer=nl.psum)
                    nisa.nc_transpose(psum, rows[:, c * 128 : (c + 1) * 128, i, j])
                    nisa.tensor_copy(tiles[:, i, j, o, c, :], psum, engine=nisa.engine.scalar)
    return tiles


def convolution(x, w, bias, pool=False):
    """x [C_in, H, W] * w [C_out, C_in, 3, 3] + bias [C_out, 1]; optionally 2 x 2 max pool.

    Returns:
        [C_out, H - 2, W - 2], or half of each with `pool`.
    """
    c_in, height, width = x.shape
    outs, ins = w.shape[0] // 128, c_in // 128
    rows, columns = height - K + 1, width - K + 1
    pairs = min(512 // (2 * width), rows // 2)
    weights = _transposed_weights(w)
    biases = nl.ndarray((128, outs), x.dtype)
    for o in range(outs):
        nisa.dma_copy(biases[:, o : o + 1], bias[o * 128 : (o + 1) * 128])
    scale = 2 if pool else 1
    out = nl.ndarray((outs * 128, rows // scale, columns // scale), x.dtype, buffer=nl.shared_hbm)
    for top in range(0, rows, 2 * pairs):
        band = _load_band(x, top, pairs, ins)
        for o in range(outs):
            psum = nl.ndarray((128, pairs, 2, columns), nl.float32, buffer=nl.psum)
            for i in range(K):
                for j in range(K):
                    for c in range(ins):
                        nisa.nc_matmul(
                            psum, weights[:, i, j, o, c, :], band[:, c, i, :, :, j : j + columns]
                        )
            _finish(out, psum, biases[:, o : o + 1], o, top, pool)
    return out


def _load_band(x, top, pairs, ins):
    """The three input rows of each of 2 * pairs output rows."""
    width = x.shape[2]
    band = nl.ndarray((128, ins, K, pairs, 2, width), x.dtype)
    for p in range(pairs):
        for r in range(2):
            for c in range(ins):
                first = top + 2 * p + r
                nisa.dma_copy(
                    band[:, c, :, p, r, :],
                    x[c * 128 : (c + 1) * 128, first : first + K, :],
                )
    return band


def _finish(out, psum, bias, o, top, pool):
    """Add the bias, pool, store."""
    _, pairs, _, columns = psum.shape
    channels = slice(o * 128, (o + 1) * 128)
    tile = nl.ndarray(psum.shape, out.dtype)
    nisa.tensor_copy(tile, psum, engine=nisa.engine.scalar)
    summed = nl.ndarray(psum.shape, out.dtype)
    flat = (128, pairs * 2 * columns)
    nisa.tensor_tensor(summed.reshape(flat), tile.reshape(flat), bias.broadcast(1, flat[1]), nl.add)
    if not pool:
        flat = summed.reshape((128, 2 * pairs, columns))
        nisa.dma_copy(out[channels, top : top + 2 * pairs, :], flat)
        return
    tall = nl.ndarray((128, pairs, columns), out.dtype)
    nisa.tensor_reduce(
        tall, nl.maximum, summed.rearrange(("p", "a", "r", "w"), ("p", "a", "w", "r")), axis=3
    )
    small = nl.ndarray((128, pairs, columns // 2), out.dtype)
    nisa.tensor_reduce(small, nl.maximum, tall.reshape((128, pairs, columns // 2, 2)), axis=3)
    nisa.dma_copy(out[channels, top // 2 : top // 2 + pairs, :], small)
