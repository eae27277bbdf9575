"""Gated sum of the three branches, `o = sum_c gates[c] * o_c`, and its gradients.

Dimensions: rows = B * S * Hq, DV columns; all tensors [rows, DV], gates [rows, 3].
Layout: consecutive rows lie on one partition, J of them ([P, J, DV]), so that every DMA moves
J * DV contiguous elements per partition; each row's gates are (P, 1) scalars of one instruction.

    per tile of 128 * J rows:
        load o_cmp, o_slc, o_win, gates                     DMA
        for each of the J rows of a partition:
            t = o_cmp * g0                                  ScalarE
            t = o_slc * g1 + t;  o = o_win * g2 + t         VectorE, float32 inside
        store o                                             DMA

Bound by bytes: forward moves 4 tensors. At 64K tokens, 64 heads of 128, bfloat16, that is 4.3 GB:
12.1 ms of a core's 354 GB/s of HBM, against 8.7 ms of VectorE (two passes). Backward reads four
and writes three, 7.5 GB and 21 ms: its gradients of branches are made by ScalarE, the products for
the gates' gradients by VectorE and summed there along DV. Modelled for 64K tokens in hardware
loops of 2 tiles with J = 32: 16.6 ms and 27.4 ms; unrolled tiles with J = 8 take 18.5 and 30.6.
A program has at most 500 instructions forward and 600 backward, whatever the length.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.cores import share
from nki_kernels.common.queues import move

BODY = 2  # tiles of an iteration


def tiles(rows, rows_per_partition):
    """(first row, partitions, rows per partition) of tiles that cover `rows` rows."""
    found, first = [], 0
    while first < rows:
        left = rows - first
        per = min(rows_per_partition, max(1, left // nl.tile_size.pmax))
        parts = min(nl.tile_size.pmax, left // per)
        found.append((first, parts, per))
        first += parts * per
    return found


def for_all_rows(tensors, rows_per_partition, looped_rows, work):
    """Calls work(views, tile, whether addresses are run-time ones) until this core's share of the
    rows of `tensors` is done.

    As many as fill some bodies go in a hardware loop, BODY tiles of `looped_rows` rows per
    partition to each, so that one's loads come behind another's sums. A row hangs on nothing else,
    so neither do its bits.
    """
    first, count = share(tensors[0].shape[0])
    size = BODY * nl.tile_size.pmax * looped_rows
    turns = count // size
    end, left = first + turns * size, count - turns * size
    looped, rest = [], []
    for tensor in tensors:
        if turns > 0:
            looped.append(tensor[first:end, :].reshape_dim(0, (turns, size)))
        if left > 0:
            rest.append(tensor[end : end + left, :])

    def body(i):
        views = []
        for tensor in looped:
            views.append(tensor.select(0, i))
        for tile in tiles(size, looped_rows):
            work(views, tile, True)

    if turns > 0:
        nl.fori_loop(0, turns, body)
    for tile in tiles(left, rows_per_partition):
        work(rest, tile, False)


def load(source, tile, dtype, looped):
    """Rows of `source` [rows, D] of a tile as [P, J, D] in SBUF, converted if need be."""
    first, parts, per = tile
    width = source.shape[1]
    view = source[first : first + parts * per, :].reshape((parts, per, width))
    raw = nl.ndarray((parts, per, width), dtype=source.dtype, buffer=nl.sbuf)
    move(raw, view, "y" if looped else "")
    if source.dtype == dtype:
        return raw
    converted = nl.ndarray((parts, per, width), dtype=dtype, buffer=nl.sbuf)
    nisa.tensor_copy(converted, raw)
    return converted


def store(target, tile, values, looped):
    """Writes [P, J, D] to the tile's rows of `target` [rows, D]."""
    first, parts, per = tile
    width = target.shape[1]
    rows = target[first : first + parts * per, :].reshape((parts, per, width))
    move(rows, values, "g" if looped else "")


@nki.jit
def forward(o_cmp, o_slc, o_win, gates, rows_per_partition: int, looped_rows: int):
    """o [rows, DV] in the branches' dtype; see the module's docstring."""
    rows, dv = o_cmp.shape
    o = nl.ndarray((rows, dv), dtype=o_cmp.dtype, buffer=nl.shared_hbm)

    def work(views, tile, looped):
        _, parts, per = tile
        branches = []
        for branch in views[0:3]:
            branches.append(load(branch, tile, branch.dtype, looped))
        gate = load(views[3], tile, nl.float32, looped)  # [P, J, 3]
        total = nl.ndarray((parts, per, dv), dtype=nl.float32, buffer=nl.sbuf)
        result = nl.ndarray((parts, per, dv), dtype=o.dtype, buffer=nl.sbuf)
        for j in range(per):
            now = total[:, j, :]
            nisa.activation(now, nl.copy, branches[0][:, j, :], scale=gate[:, j, 0:1])
            nisa.scalar_tensor_tensor(
                now, branches[1][:, j, :], nl.multiply, gate[:, j, 1:2], nl.add, now
            )
            nisa.scalar_tensor_tensor(
                result[:, j, :], branches[2][:, j, :], nl.multiply, gate[:, j, 2:3], nl.add, now
            )
        store(views[4], tile, result, looped)

    for_all_rows((o_cmp, o_slc, o_win, gates, o), rows_per_partition, looped_rows, work)
    return o


@nki.jit
def backward(grad_o, o_cmp, o_slc, o_win, gates, rows_per_partition: int, looped_rows: int):
    """d_cmp, d_slc, d_win [rows, DV] and d_gates [rows, 3], in the dtypes of the arguments."""
    dv = grad_o.shape[1]
    grads = []
    for branch in (o_cmp, o_slc, o_win, gates):
        grads.append(nl.ndarray(branch.shape, dtype=branch.dtype, buffer=nl.shared_hbm))

    def work(views, tile, looped):
        _, parts, per = tile
        grad = load(views[0], tile, grad_o.dtype, looped)
        gate = load(views[4], tile, nl.float32, looped)
        d_gate = nl.ndarray((parts, per, 3), dtype=nl.float32, buffer=nl.sbuf)
        for c in range(3):
            branch = views[1 + c]
            value = load(branch, tile, branch.dtype, looped)
            scaled = nl.ndarray((parts, per, dv), dtype=branch.dtype, buffer=nl.sbuf)
            for j in range(per):
                nisa.activation(
                    scaled[:, j, :], nl.copy, grad[:, j, :], scale=gate[:, j, c : c + 1]
                )
            store(views[5 + c], tile, scaled, looped)
            product = nl.ndarray((parts, per, dv), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_tensor(product, grad, value, nl.multiply)
            nisa.tensor_reduce(d_gate[:, :, c], nl.add, product, axis=2)
        rounded = nl.ndarray((parts, per, 3), dtype=gates.dtype, buffer=nl.sbuf)
        nisa.tensor_copy(rounded, d_gate)
        store(views[8], tile, rounded, looped)

    tensors = (grad_o, o_cmp, o_slc, o_win, gates, grads[0], grads[1], grads[2], grads[3])
    for_all_rows(tensors, rows_per_partition, looped_rows, work)
    return grads[0], grads[1], grads[2], grads[3]
