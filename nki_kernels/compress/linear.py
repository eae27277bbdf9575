"""Products of flattened blocks with a weight: the layers of `linear` and `mlp`."""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.cores import share
from nki_kernels.common.spans import covering, spans
from nki_kernels.common.transpose import load_transposed

PARTITIONS = 128
BANK = 512


def item_bytes(dtype):
    """Bytes of an element of the dtypes that the kernels take."""
    return 4 if dtype == nl.float32 else 2


def of_head(x, head, shared_rank):
    """The head's part of a weight, which all heads share where it has `shared_rank` dims."""
    return x if len(x.shape) == shared_rank else x[head]


def load_weight(w, block, dim, rows, columns):
    """Rows r of `w` [block * dim, F], r in `rows`, as one [Dc, rows, columns] per 128 channels."""
    first, count = rows
    start, width = columns
    view = w.reshape((block, dim, w.shape[1]))
    tiles = []
    for channel, channels in spans(dim, PARTITIONS):
        tile = nl.ndarray((channels, count, width), dtype=w.dtype, buffer=nl.sbuf)
        part = view[first : first + count, channel : channel + channels, start : start + width]
        nisa.dma_copy(tile, part.permute((1, 0, 2)))
        tiles.append(tile)
    return tiles


def offset_rows(bias, pe, weight_of, block, pieces, columns):
    """What bias and position encoding add to every row: float32 [128, columns], or None.

    The encoding of token r meets the weight's rows of token r with one column of it repeated as
    the stationary operand, so that the sum stands on all partitions.
    """
    if bias is None and pe is None:
        return None
    start, width = columns
    total = nl.ndarray((PARTITIONS, width), dtype=nl.float32, buffer=nl.psum)
    opened = False
    if bias is not None:
        ones = nl.ndarray((1, PARTITIONS), dtype=bias.dtype, buffer=nl.sbuf)
        nisa.memset(ones, 1.0)
        row = nl.ndarray((1, width), dtype=bias.dtype, buffer=nl.sbuf)
        nisa.dma_copy(row, bias.reshape((1, bias.shape[-1]))[:, start : start + width])
        nisa.nc_matmul(total, ones, row, accumulate=False)
        opened = True
    if pe is not None:
        turned = load_transposed(pe, block)  # [Dc, block, 1] each
        for rows in pieces:
            weight = weight_of(rows, columns)
            for r in range(rows[1]):
                for channel in range(len(turned)):
                    column = turned[channel][:, rows[0] + r, :].broadcast(1, PARTITIONS)
                    nisa.nc_matmul(total, column, weight[channel][:, r, :], accumulate=opened)
                    opened = True
    kept = nl.ndarray((PARTITIONS, width), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(kept, total)
    return kept


def products(x, w, bias, pe, block, stride, tile_bytes, weight_bytes, finish):
    """Calls `finish(place, columns, sums, offset)` with float32 sums [blocks, columns] in PSUM.

    Args:
        x: [B, T, H, D]; w: [block * D, F], [H, ...] if per head; bias, pe: the same or None.
        tile_bytes: SBUF of a partition for the transposed tokens of a tile.
        weight_bytes: SBUF of a partition up to which the weight stays; a larger one is read again
            for every tile.
        finish: place is (batch, first block, blocks, head); offset as of `offset_rows`.
    """
    batch, tokens, heads, dim = x.shape
    width, ahead = w.shape[-1], block // stride
    blocks = (tokens - block) // stride + 1
    size, parts = item_bytes(x.dtype), (dim + PARTITIONS - 1) // PARTITIONS
    fitting = tile_bytes // (size * parts * stride) - ahead + 1
    starts, length = covering(blocks, max(1, min(BANK, fitting)))
    columns = spans(width, BANK)
    row_bytes = size * parts * min(width, BANK)
    pieces = spans(block, max(1, weight_bytes // row_bytes))
    resident = len(pieces) == 1 and len(columns) == 1
    per_head = {"head": -1, "kept": None, "offsets": []}

    def weight_of(rows, part):
        """Rows of the head's weight, read as they are needed or kept."""
        if per_head["kept"] is not None:
            return per_head["kept"]
        return load_weight(per_head["w"], block, dim, rows, part)

    def enter(head):
        """Weight and offsets of a head."""
        per_head["head"], per_head["kept"] = head, None
        per_head["w"] = of_head(w, head, 2)
        if resident:
            per_head["kept"] = weight_of(pieces[0], columns[0])
        per_head["offsets"] = []
        row = None if bias is None else of_head(bias, head, 1)
        encoding = None if pe is None else of_head(pe, head, 2)
        for part in columns:
            offset = offset_rows(row, encoding, weight_of, block, pieces, part)
            per_head["offsets"].append(offset)

    shared = len(w.shape) == 2 and (bias is None or len(bias.shape) == 1)
    shared = shared and (pe is None or len(pe.shape) == 2)
    first, number = share(heads * batch * len(starts))
    for item in range(first, first + number):
        lane, tile = divmod(item, len(starts))
        head, b = divmod(lane, batch)
        if per_head["head"] < 0 or (head != per_head["head"] and not shared):
            enter(head)
        start = starts[tile]
        rows = x[b, start * stride : (start + length - 1 + ahead) * stride, head, :]
        turned = load_transposed(rows, stride)
        for which in range(len(columns)):
            part = columns[which]
            subtiles = []
            for place, many in spans(length, PARTITIONS):
                sums = nl.ndarray((many, part[1]), dtype=nl.float32, buffer=nl.psum)
                subtiles.append((place, many, sums))
            for piece in pieces:
                weight = weight_of(piece, part)
                for r in range(piece[0], piece[0] + piece[1]):
                    shift, place_in_chunk = divmod(r, stride)
                    for channel in range(parts):
                        source = turned[channel][:, place_in_chunk, shift : shift + length]
                        for place, many, sums in subtiles:
                            nisa.nc_matmul(
                                sums,
                                source[:, place : place + many],
                                weight[channel][:, r - piece[0], :],
                                accumulate=r + channel > 0,
                            )
            for place, many, sums in subtiles:
                finish((b, start + place, many, head), part, sums, per_head["offsets"][which])


def with_offset(sums, offset):
    """sums + offset as float32 in SBUF, or the sums themselves where there is no offset."""
    if offset is None:
        return sums
    total = nl.ndarray(sums.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(total, sums, offset[0 : sums.shape[0], :], nl.add)
    return total


def part_of(y, place, columns):
    """Rows and columns of `y` [B, N, H, F] that a call of `finish` makes."""
    b, first, many, head = place
    return y[b, first : first + many, head, columns[0] : columns[0] + columns[1]]


@nki.jit
def linear_forward(
    x, w, bias, pe, block: int, stride: int, gelu: bool, wide: bool, tile_bytes: int,
    weight_bytes: int,
):  # fmt: skip
    """flatten(x + pe) @ w + bias, [B, N, H, F], gelu of it if asked, float32 if `wide`."""
    batch, tokens, heads, _ = x.shape
    dtype = nl.float32 if wide else x.dtype
    shape = (batch, (tokens - block) // stride + 1, heads, w.shape[-1])
    y = nl.ndarray(shape, dtype=dtype, buffer=nl.shared_hbm)

    def finish(place, columns, sums, offset):
        total = with_offset(sums, offset)
        rounded = nl.ndarray(sums.shape, dtype=dtype, buffer=nl.sbuf)
        if gelu:
            nisa.activation(rounded, nl.gelu, total)
        else:
            nisa.tensor_copy(rounded, total)
        nisa.dma_copy(part_of(y, place, columns), rounded)

    products(x, w, bias, pe, block, stride, tile_bytes, weight_bytes, finish)
    return y


@nki.jit
def hidden_backward(grad_y, w, hidden, tile_bytes: int, weight_bytes: int):
    """What lies between the two layers of the mlp.

    Args:
        grad_y: [B, N, H, D]. w: transposed second weight [D, F] or [H, D, F].
        hidden: float32 [B, N, H, F], the first layer before gelu.

    Returns:
        gelu(hidden) and the gradient of hidden, grad_y @ w * gelu'(hidden), in grad_y's dtype.
    """
    acts = nl.ndarray(hidden.shape, dtype=grad_y.dtype, buffer=nl.shared_hbm)
    grads = nl.ndarray(hidden.shape, dtype=grad_y.dtype, buffer=nl.shared_hbm)

    def finish(place, columns, sums, offset):
        before = nl.ndarray(sums.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(before, part_of(hidden, place, columns))
        act = nl.ndarray(sums.shape, dtype=acts.dtype, buffer=nl.sbuf)
        nisa.activation(act, nl.gelu, before)
        nisa.dma_copy(part_of(acts, place, columns), act)
        slope = nl.ndarray(sums.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.activation(slope, nl.gelu_dx, before)
        grad = nl.ndarray(sums.shape, dtype=grads.dtype, buffer=nl.sbuf)
        nisa.tensor_tensor(grad, sums, slope, nl.multiply)
        nisa.dma_copy(part_of(grads, place, columns), grad)

    products(grad_y, w, None, None, 1, 1, tile_bytes, weight_bytes, finish)
    return acts, grads
