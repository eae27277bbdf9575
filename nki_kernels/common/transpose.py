"""Rows of HBM into SBUF with their channels on the partitions."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.spans import spans

PARTITIONS = 128
BANK_BYTES = 2048


def chunk_tiles(chunks, stride):
    """Tiles of at most 128 tokens of `chunks` chunks of `stride` tokens, none across an edge of
    chunks that it does not end at: (first token, tokens)."""
    if stride <= PARTITIONS:
        return spans(chunks * stride, PARTITIONS // stride * stride)
    tiles = []
    for chunk in range(chunks):
        for start, length in spans(stride, PARTITIONS):
            tiles.append((chunk * stride + start, length))
    return tiles


def runs(tiles, limit):
    """Neighbouring tiles of one length in lists of at most `limit`."""
    found = []
    for tile in tiles:
        if found and len(found[-1]) < limit and found[-1][0][1] == tile[1]:
            found[-1].append(tile)
        else:
            found.append([tile])
    return found


def load_transposed(rows, stride):
    """Transposes tokens by TensorE, exactly, and sorts them by their place within a chunk.

    Args:
        rows: view in HBM, [tokens, D]; tokens = C * stride.
        stride: d, tokens of a chunk.

    Returns:
        One tile [Dc, stride, C] in SBUF per 128 channels of D: token c * stride + s is [:, s, c],
        so that the tokens which are the s-th of their chunks are contiguous.
    """
    tokens, dim = rows.shape
    chunks = tokens // stride
    size = 4 if rows.dtype == nl.float32 else 2
    results = []
    for _, width in spans(dim, PARTITIONS):
        results.append(nl.ndarray((width, stride, chunks), dtype=rows.dtype, buffer=nl.sbuf))
    for run in runs(chunk_tiles(chunks, stride), BANK_BYTES // size // PARTITIONS):
        first, length, many = run[0][0], run[0][1], len(run)
        natural = nl.ndarray((length, many, dim), dtype=rows.dtype, buffer=nl.sbuf)
        source = rows[first : first + many * length, :].reshape((many, length, dim))
        nisa.dma_copy(natural, source.permute((1, 0, 2)))
        for which in range(len(results)):
            column, width = spans(dim, PARTITIONS)[which]
            turned = nl.ndarray((width, many, length), dtype=rows.dtype, buffer=nl.psum)
            for tile in range(many):
                nisa.nc_transpose(
                    turned[:, tile, :],
                    natural[:, tile, column : column + width],
                    engine=nisa.engine.tensor,
                )
            _sort(results[which], turned, first, stride)
    return results


def _sort(target, turned, first, stride):
    """Copies [Dc, tiles, tokens] of tokens from `first` on to their places in [Dc, stride, C]."""
    width, many, length = turned.shape
    if stride <= PARTITIONS:
        start, count = first // stride, many * length // stride
        nisa.tensor_copy(
            target[:, :, start : start + count],
            turned.reshape((width, count, stride)).permute((0, 2, 1)),
        )
        return
    for tile in range(many):
        chunk, place = divmod(first + tile * length, stride)
        nisa.tensor_copy(target[:, place : place + length, chunk], turned[:, tile, :])
