"""Gradients of a product of flattened blocks with a weight."""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.cores import share
from nki_kernels.common.spans import covering, spans
from nki_kernels.common.transpose import load_transposed
from nki_kernels.compress.linear import BANK, PARTITIONS, item_bytes, of_head

ACCUMULATOR_BANKS = 6  # of PSUM's 8, for sums that stay while all of x passes by


@nki.jit
def input_gradient(
    grad_y, w, tokens: int, block: int, stride: int, out_bytes: int, weight_bytes: int
):
    """dx [B, tokens, H, D]: token c * stride + s gets sum_a grad_y[c - a] @ w[a * stride + s]^T.

    Args:
        grad_y: [B, N, H, F]. w: the weight transposed, [F, block * D] or [H, F, block * D].
        out_bytes: SBUF of a partition for the tokens of a tile of chunks.
        weight_bytes: SBUF of a partition up to which the weight stays.
    """
    batch, _, heads, width = grad_y.shape
    dim, ahead = w.shape[-1] // block, block // stride
    dx = nl.ndarray((batch, tokens, heads, dim), dtype=grad_y.dtype, buffer=nl.shared_hbm)
    chunks = (tokens + stride - 1) // stride
    size = item_bytes(grad_y.dtype)
    starts, length = covering(chunks, PARTITIONS)
    features = spans(width, PARTITIONS)
    resident = len(features) * block * dim * size <= weight_bytes
    row_bytes = len(features) * dim * size  # of the weight, for one token
    group = max(1, min(stride, out_bytes // (dim * size)))
    shifts = [(0, ahead)]
    if not resident:
        group = max(1, min(group, weight_bytes // (ahead * row_bytes)))
        shifts = spans(ahead, max(1, weight_bytes // row_bytes))
    if len(shifts) > 1:
        group = 1
    state = {"head": -1, "w": None}

    def load_weight(head, some, places):
        """w's columns of the tokens a * stride + s, a in some, s in places: [Fc, a, s, D] each."""
        view = of_head(w, head, 2).reshape((width, ahead, stride, dim))
        tiles = []
        for start, count in features:
            tile = nl.ndarray((count, some[1], places[1], dim), dtype=w.dtype, buffer=nl.sbuf)
            part = view[start : start + count, some[0] : some[0] + some[1], :, :]
            nisa.dma_copy(tile, part[:, :, places[0] : places[0] + places[1], :])
            tiles.append(tile)
        return tiles

    first, number = share(heads * batch * len(starts))
    for item in range(first, first + number):
        lane, tile = divmod(item, len(starts))
        head, b = divmod(lane, batch)
        if resident and (state["head"] < 0 or (head != state["head"] and len(w.shape) == 3)):
            state["head"], state["w"] = head, load_weight(head, (0, ahead), (0, stride))
        chunk = starts[tile]
        turned = turned_gradient(grad_y, b, head, chunk - ahead + 1, length + ahead - 1)
        for places in spans(stride, group):
            out = nl.ndarray((length, places[1], dim), dtype=dx.dtype, buffer=nl.sbuf)
            base = places[0] if resident else 0
            totals = [None] * places[1]
            for some in shifts:
                weight = state["w"] if resident else load_weight(head, some, places)
                for s in range(places[1]):
                    if some[0] == 0:
                        totals[s] = nl.ndarray((length, dim), dtype=nl.float32, buffer=nl.psum)
                    for a in range(some[1]):
                        at = ahead - 1 - some[0] - a
                        for f in range(len(features)):
                            nisa.nc_matmul(
                                totals[s],
                                turned[f][:, at : at + length],
                                weight[f][:, a, base + s, :],
                                accumulate=some[0] + a + f > 0,
                            )
                    if some[0] + some[1] == ahead:
                        nisa.tensor_copy(out[:, s, :], totals[s])
            store_chunks(dx[b, :, head, :], out, chunk, places, stride)
    return dx


def turned_gradient(grad_y, b, head, first, count):
    """grad_y's blocks first .. first + count - 1 as [Fc, count] per 128 features; 0 outside."""
    _, blocks, _, width = grad_y.shape
    low, high = max(0, first), min(blocks, first + count)
    tiles = []
    for _, features in spans(width, PARTITIONS):
        tile = nl.ndarray((features, count), dtype=grad_y.dtype, buffer=nl.sbuf)
        if high - low < count:
            nisa.memset(tile, 0.0)
        tiles.append(tile)
    if low < high:
        turned = load_transposed(grad_y[b, low:high, head, :], 1)  # [Fc, 1, blocks] each
        for f in range(len(tiles)):
            nisa.tensor_copy(tiles[f][:, low - first : high - first], turned[f][:, 0, :])
    return tiles


def store_chunks(dx, out, chunk, places, stride):
    """Writes [chunks, places, D] to dx [T, D]; the last chunk may be incomplete."""
    tokens, dim = dx.shape
    length = out.shape[0]
    first, many = places
    whole = min(length, tokens // stride - chunk)
    if whole > 0:
        view = dx[chunk * stride : (chunk + whole) * stride, :].reshape((whole, stride, dim))
        nisa.dma_copy(view[:, first : first + many, :], out[0:whole, :, :])
    left = min(many, tokens % stride - first)
    if whole < length and left > 0:
        begin = (chunk + whole) * stride + first
        view = dx[begin : begin + left, :].reshape((1, left, dim))
        nisa.dma_copy(view, out[whole : whole + 1, 0:left, :])


@nki.jit
def weight_gradient(x, grad_y, pe, sums, per_head: bool, block: int, stride: int):
    """dw [block * D, F] (per head [H, ...]) in x's dtype: the blocks' tokens times their gradients.

    Row (r, c) is sum_i (x[i * stride + r, c] + pe[r, c]) * grad_y[i]. Tokens a * stride + s of all
    blocks i are tokens s of the chunks i + a, so a pass over x serves all shifts a of some places
    s: x is read once, grad_y once per pass and shift.

    Args:
        x: [B, T, H, D]. grad_y: [B, N, H, F]. pe: [block, D], [H, block, D] or None.
        sums: float32 [H, F], grad_y summed over batch and blocks; read only where pe is.
    """
    batch, _, heads, dim = x.shape
    blocks, width = grad_y.shape[1], grad_y.shape[3]
    lead = (heads,) if per_head else ()
    dw = nl.ndarray((*lead, block * dim, width), dtype=x.dtype, buffer=nl.shared_hbm)
    channels, ahead = spans(dim, PARTITIONS), block // stride
    column_starts, column_count = covering(width, BANK)
    bank_room = max(1, BANK // column_count)
    room = ACCUMULATOR_BANKS * bank_room
    # A unit is (head or -1, first column, place s, shift a and channels) whose sums fit into PSUM.
    # Equal units, because two cores must run equal programs.
    units = []
    channel_starts, channel_count = covering(len(channels), room)
    shift_starts, shift_count = covering(ahead, max(1, room // channel_count))
    place_starts, place_count = covering(stride, max(1, room // channel_count // shift_count))
    for head in range(heads) if per_head else (-1,):
        for column in column_starts:
            for channel_start in channel_starts:
                for shift in shift_starts:
                    for place in place_starts:
                        units.append((head, column, place, shift, channel_start))
    first, number = share(len(units))
    for head, column, place, shift, channel_start in units[first : first + number]:
        part = (column, column_count)
        places, shifts = (place, place_count), (shift, shift_count)
        wanted = channels[channel_start : channel_start + channel_count]
        targets = open_sums(places[1] * shifts[1] * len(wanted), bank_room, part[1])
        among = (head,) if per_head else range(heads)
        for h in among:
            for b in range(batch):
                for chunk, many in spans(blocks + ahead - 1, PARTITIONS):
                    add_products(
                        targets, x[b, :, h, :], grad_y[b, :, h, :], chunk, many, places, shifts,
                        wanted, part, stride,
                    )  # fmt: skip
            if pe is not None:
                encoding = pe if len(pe.shape) == 2 else pe[h]
                add_encoding(targets, encoding, sums[h], places, shifts, wanted, part, stride)
        rows = dw[head] if per_head else dw
        at = 0
        for s in range(places[1]):
            for a in range(shifts[1]):
                r = (shifts[0] + a) * stride + places[0] + s
                for channel, count in wanted:
                    done = nl.ndarray((count, part[1]), dtype=dw.dtype, buffer=nl.sbuf)
                    nisa.tensor_copy(done, targets[at][0:count, :])
                    begin = r * dim + channel
                    into = rows[begin : begin + count, part[0] : part[0] + part[1]]
                    nisa.dma_copy(into, done)
                    at += 1
    return dw


def open_sums(count, bank_room, width):
    """`count` float32 sums [128, width] in PSUM, opened with zeros, `bank_room` to a bank."""
    zeros = nl.ndarray((1, PARTITIONS), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.memset(zeros, 0.0)
    row = nl.ndarray((1, BANK), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.memset(row, 0.0)
    found = []
    for _, many in spans(count, bank_room):
        bank = nl.ndarray((PARTITIONS, many * width), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(bank, zeros, row[:, 0 : many * width], accumulate=False)
        for i in range(many):
            found.append(bank[:, i * width : (i + 1) * width])
    return found


def add_products(targets, x, grad_y, chunk, many, places, shifts, channels, part, stride):
    """Adds x^T grad_y of the chunks chunk .. chunk + many - 1 to every target.

    x: [T, D], grad_y: [N, F] of one head. A shift a pairs chunk c with the gradient of block c - a.
    """
    blocks = grad_y.shape[0]
    view = x[chunk * stride : (chunk + many) * stride, :].reshape((many, stride, x.shape[1]))
    tile = nl.ndarray((many, places[1], x.shape[1]), dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(tile, view[:, places[0] : places[0] + places[1], :])
    gradients = []
    for a in range(shifts[0], shifts[0] + shifts[1]):
        low, high = max(0, chunk - a), min(blocks, chunk - a + many)
        rows = nl.ndarray((many, part[1]), dtype=grad_y.dtype, buffer=nl.sbuf)
        if high - low < many:
            nisa.memset(rows, 0.0)
        if low < high:
            at = low - (chunk - a)
            columns = grad_y[low:high, part[0] : part[0] + part[1]]
            nisa.dma_copy(rows[at : at + high - low, :], columns)
        gradients.append(rows)
    at = 0
    for s in range(places[1]):
        for rows in gradients:
            for channel, count in channels:
                stationary = tile[:, s, channel : channel + count]
                nisa.nc_matmul(targets[at][0:count, :], stationary, rows, accumulate=True)
                at += 1


def add_encoding(targets, pe, sums, places, shifts, channels, part, stride):
    """Adds pe[r]^T sums to every target; `sums` float32 [F]."""
    whole = nl.ndarray((1, part[1]), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(whole, sums.reshape((1, sums.shape[0]))[:, part[0] : part[0] + part[1]])
    pieces = exact_pieces(whole, pe.dtype)
    at = 0
    for s in range(places[1]):
        for a in range(shifts[1]):
            r = (shifts[0] + a) * stride + places[0] + s
            row = nl.ndarray((1, pe.shape[1]), dtype=pe.dtype, buffer=nl.sbuf)
            nisa.dma_copy(row, pe[r : r + 1, :])
            for channel, count in channels:
                for piece in pieces:
                    nisa.nc_matmul(
                        targets[at][0:count, :],
                        row[:, channel : channel + count],
                        piece,
                        accumulate=True,
                    )
                at += 1


def exact_pieces(whole, dtype):
    """A float32 tile as tiles that may meet `dtype` in a matmul and add up to it.

    float32 meets float32 only; 16-bit operands get the tile as two bfloat16 pieces (16 bits of
    mantissa), whose range is float32's.
    """
    if dtype == nl.float32:
        return [whole]
    high = nl.ndarray(whole.shape, dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.tensor_copy(high, whole)
    low = nl.ndarray(whole.shape, dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.tensor_tensor(low, whole, high, nl.subtract)
    return [high, low]


@nki.jit
def column_sum(grad_y):
    """grad_y [B, N, H, F] summed over batch and blocks, float32 [H, F]."""
    batch, blocks, heads, width = grad_y.shape
    total = nl.ndarray((heads, width), dtype=nl.float32, buffer=nl.shared_hbm)
    ones = nl.ndarray((PARTITIONS, 1), dtype=grad_y.dtype, buffer=nl.sbuf)
    nisa.memset(ones, 1.0)
    first, number = share(heads)
    for head in range(first, first + number):
        for start, many in spans(width, BANK):
            sums = nl.ndarray((1, many), dtype=nl.float32, buffer=nl.psum)
            opened = False
            for b in range(batch):
                for block, count in spans(blocks, PARTITIONS):
                    rows = nl.ndarray((count, many), dtype=grad_y.dtype, buffer=nl.sbuf)
                    source = grad_y[b, block : block + count, head, start : start + many]
                    nisa.dma_copy(rows, source)
                    nisa.nc_matmul(sums, ones[0:count, :], rows, accumulate=opened)
                    opened = True
            kept = nl.ndarray((1, many), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_copy(kept, sums)
            nisa.dma_copy(total[head : head + 1, start : start + many], kept)
    return total


@nki.jit
def encoding_gradient(w, sums):
    """dpe float32 [H, block * D]: what the position encoding of each head adds to all its blocks.

    w: the weight transposed, [F, block * D] or [H, F, block * D]. sums: float32 [H, F], the
    gradient of the layer's output summed over batch and blocks.
    """
    heads, width = sums.shape
    rows = w.shape[-1]
    grad = nl.ndarray((heads, rows), dtype=nl.float32, buffer=nl.shared_hbm)
    first, number = share(heads)
    for head in range(first, first + number):
        pieces = []
        for start, many in spans(width, PARTITIONS):
            column = nl.ndarray((many, 1), dtype=nl.float32, buffer=nl.sbuf)
            nisa.dma_copy(column, sums[head, start : start + many].reshape((many, 1)))
            pieces.append((start, many, exact_pieces(column, w.dtype)))
        weight = of_head(w, head, 2)
        for at, columns in spans(rows, BANK):
            total = nl.ndarray((1, columns), dtype=nl.float32, buffer=nl.psum)
            opened = False
            for start, many, parts in pieces:
                tile = nl.ndarray((many, columns), dtype=w.dtype, buffer=nl.sbuf)
                nisa.dma_copy(tile, weight[start : start + many, at : at + columns])
                for part in parts:
                    nisa.nc_matmul(total, part, tile, accumulate=opened)
                    opened = True
            kept = nl.ndarray((1, columns), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_copy(kept, total)
            nisa.dma_copy(grad[head : head + 1, at : at + columns], kept)
    return grad
