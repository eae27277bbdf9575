"""Mean of overlapping blocks, forward and backward, by matmuls with 0/1 bands."""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.cores import share
from nki_kernels.common.spans import covering, spans

PARTITIONS = 128
BANDS = 40  # most bands that are kept; more are made anew for each tile


def block_tile(blocks, block, stride):
    """Blocks of a tile: up to 128, but of at most 64 tiles of tokens."""
    return max(1, min(blocks, PARTITIONS, (64 * PARTITIONS - block) // stride + 1))


def band(shape, offset, token_step, block_step, block, dtype):
    """0/1 tile: 1 where a token lies in a block, 0 <= token - first token of the block < block.

    Args:
        shape: (partitions, columns). offset: token minus first token of the block at [0, 0].
        token_step: what a step along (partitions, columns) adds to the token: (1, 0) or (0, 1).
        block_step: what it adds to the block's first token.
    """
    down = token_step[0] - block_step[0]
    right = token_step[1] - block_step[1]
    ones = nl.ndarray(shape, dtype=dtype, buffer=nl.sbuf)
    nisa.memset(ones, 1.0)
    for sign, start in ((1, offset), (-1, block - 1 - offset)):
        nisa.affine_select(
            ones,
            pattern=[[sign * right, shape[1]]],
            channel_multiplier=sign * down,
            on_true_tile=ones,
            on_false_value=0.0,
            cmp_op=nl.greater_equal,
            offset=start,
        )
    return ones


def load_rows(rows):
    """[n, D] of HBM as a list of ([length, D], length) with up to 128 rows a tile.

    All whole tiles come by one DMA.
    """
    count, dim = rows.shape
    whole = count // PARTITIONS
    found = []
    if whole:
        tile = nl.ndarray((PARTITIONS, whole, dim), dtype=rows.dtype, buffer=nl.sbuf)
        source = rows[0 : whole * PARTITIONS, :].reshape((whole, PARTITIONS, dim))
        nisa.dma_copy(tile, source.permute((1, 0, 2)))
        for i in range(whole):
            found.append((tile[:, i, :], PARTITIONS))
    left = count - whole * PARTITIONS
    if left:
        rest = nl.ndarray((left, dim), dtype=rows.dtype, buffer=nl.sbuf)
        nisa.dma_copy(rest, rows[whole * PARTITIONS : count, :])
        found.append((rest, left))
    return found


@nki.jit
def mean_forward(x, pe, block: int, stride: int):
    """mean(x + pe) of every block, [B, N, H, D] in x's dtype; sums in float32, scaled at the end.

    x: [B, T, H, D]. pe: [block, D], [H, block, D] or None.
    """
    batch, tokens, heads, dim = x.shape
    blocks = (tokens - block) // stride + 1
    y = nl.ndarray((batch, blocks, heads, dim), dtype=x.dtype, buffer=nl.shared_hbm)
    starts, length = covering(blocks, block_tile(blocks, block, stride))
    used = (length - 1) * stride + block
    bands = []
    for start, many in spans(used, PARTITIONS):
        bands.append(band((many, length), start, (1, 0), (0, stride), block, x.dtype))
    ones = nl.ndarray((min(block, PARTITIONS), length), dtype=x.dtype, buffer=nl.sbuf)
    nisa.memset(ones, 1.0)
    first, number = share(heads * batch * len(starts))
    encoding = {"head": -1, "rows": []}
    for item in range(first, first + number):
        lane, tile = divmod(item, len(starts))
        head, b = divmod(lane, batch)
        if pe is not None and head != encoding["head"]:
            encoding["head"] = head
            encoding["rows"] = load_rows(pe if len(pe.shape) == 2 else pe[head])
        start = starts[tile]
        sums = nl.ndarray((length, dim), dtype=nl.float32, buffer=nl.psum)
        source = x[b, start * stride : start * stride + used, head, :]
        which = 0
        for rows, _ in load_rows(source):
            nisa.nc_matmul(sums, bands[which], rows, accumulate=which > 0)
            which += 1
        for rows, many in encoding["rows"]:
            nisa.nc_matmul(sums, ones[0:many, :], rows, accumulate=True)
        mean = nl.ndarray((length, dim), dtype=x.dtype, buffer=nl.sbuf)
        nisa.activation(mean, nl.copy, sums, scale=1.0 / block)
        nisa.dma_copy(y[b, start : start + length, head, :], mean)
    return y


@nki.jit
def mean_backward(grad_y, tokens: int, block: int, stride: int):
    """dx [B, tokens, H, D] of `mean_forward`: each token's sum of its blocks' gradients / block.

    grad_y: [B, N, H, D]. A tile of 128 tokens meets one or two tiles of blocks; the band between
    them depends on their distance only.
    """
    batch, blocks, heads, dim = grad_y.shape
    dx = nl.ndarray((batch, tokens, heads, dim), dtype=grad_y.dtype, buffer=nl.shared_hbm)
    length = block_tile(blocks, block, stride)
    block_tiles, token_tiles = spans(blocks, length), spans(tokens, PARTITIONS)
    bands = {}

    def band_of(offset, many_blocks, many_tokens):
        key = f"{offset} {many_blocks} {many_tokens}"
        if key in bands:
            return bands[key]
        made = band((many_blocks, many_tokens), offset, (0, 1), (stride, 0), block, grad_y.dtype)
        if len(bands) < BANDS:
            bands[key] = made
        return made

    first, number = share(heads * batch)
    for lane in range(first, first + number):
        head, b = divmod(lane, batch)
        loaded = {}
        for start, many in token_tiles:
            meeting = []
            for begin, count in block_tiles:
                before = begin * stride >= start + many
                behind = (begin + count - 1) * stride + block <= start
                if not before and not behind:
                    meeting.append((begin, count))
            result = nl.ndarray((many, dim), dtype=grad_y.dtype, buffer=nl.sbuf)
            if meeting:
                sums = nl.ndarray((many, dim), dtype=nl.float32, buffer=nl.psum)
                kept = {}
                opened = False
                for begin, count in meeting:
                    key = f"{begin}"
                    if key not in loaded:
                        rows = nl.ndarray((count, dim), dtype=grad_y.dtype, buffer=nl.sbuf)
                        nisa.dma_copy(rows, grad_y[b, begin : begin + count, head, :])
                        loaded[key] = rows
                    kept[key] = loaded[key]
                    between = band_of(start - begin * stride, count, many)
                    nisa.nc_matmul(sums, between, loaded[key], accumulate=opened)
                    opened = True
                loaded = kept
                nisa.activation(result, nl.copy, sums, scale=1.0 / block)
            else:
                nisa.memset(result, 0.0)
            nisa.dma_copy(dx[b, start : start + many, head, :], result)
    return dx
