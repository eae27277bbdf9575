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
the gates' gradients by VectorE and summed there along DV.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.cores import share


def tiles(rows, rows_per_partition):
    """(first row, partitions, rows per partition) of this core's tiles."""
    first, left = share(rows)
    found = []
    while left > 0:
        per = min(rows_per_partition, max(1, left // nl.tile_size.pmax))
        parts = min(nl.tile_size.pmax, left // per)
        found.append((first, parts, per))
        first += parts * per
        left -= parts * per
    return found


def load(source, tile, dtype):
    """Rows of `source` [rows, D] of a tile as [P, J, D] in SBUF, converted if need be."""
    first, parts, per = tile
    width = source.shape[1]
    view = source[first : first + parts * per, :].reshape((parts, per, width))
    raw = nl.ndarray((parts, per, width), dtype=source.dtype, buffer=nl.sbuf)
    nisa.dma_copy(raw, view)
    if source.dtype == dtype:
        return raw
    converted = nl.ndarray((parts, per, width), dtype=dtype, buffer=nl.sbuf)
    nisa.tensor_copy(converted, raw)
    return converted


def store(target, tile, values):
    """Writes [P, J, D] to the tile's rows of `target` [rows, D]."""
    first, parts, per = tile
    width = target.shape[1]
    nisa.dma_copy(target[first : first + parts * per, :].reshape((parts, per, width)), values)


@nki.jit
def forward(o_cmp, o_slc, o_win, gates, rows_per_partition: int):
    """o [rows, DV] in the branches' dtype; see the module's docstring."""
    rows, dv = o_cmp.shape
    o = nl.ndarray((rows, dv), dtype=o_cmp.dtype, buffer=nl.shared_hbm)
    for tile in tiles(rows, rows_per_partition):
        _, parts, per = tile
        branches = []
        for branch in (o_cmp, o_slc, o_win):
            branches.append(load(branch, tile, branch.dtype))
        gate = load(gates, tile, nl.float32)  # [P, J, 3]
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
        store(o, tile, result)
    return o


@nki.jit
def backward(grad_o, o_cmp, o_slc, o_win, gates, rows_per_partition: int):
    """d_cmp, d_slc, d_win [rows, DV] and d_gates [rows, 3], in the dtypes of the arguments."""
    rows, dv = grad_o.shape
    grads = []
    for branch in (o_cmp, o_slc, o_win, gates):
        grads.append(nl.ndarray(branch.shape, dtype=branch.dtype, buffer=nl.shared_hbm))
    for tile in tiles(rows, rows_per_partition):
        _, parts, per = tile
        grad = load(grad_o, tile, grad_o.dtype)
        gate = load(gates, tile, nl.float32)
        d_gate = nl.ndarray((parts, per, 3), dtype=nl.float32, buffer=nl.sbuf)
        for c, branch in ((0, o_cmp), (1, o_slc), (2, o_win)):
            value = load(branch, tile, branch.dtype)
            scaled = nl.ndarray((parts, per, dv), dtype=branch.dtype, buffer=nl.sbuf)
            for j in range(per):
                nisa.activation(
                    scaled[:, j, :], nl.copy, grad[:, j, :], scale=gate[:, j, c : c + 1]
                )
            store(grads[c], tile, scaled)
            product = nl.ndarray((parts, per, dv), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_tensor(product, grad, value, nl.multiply)
            nisa.tensor_reduce(d_gate[:, :, c], nl.add, product, axis=2)
        rounded = nl.ndarray((parts, per, 3), dtype=gates.dtype, buffer=nl.sbuf)
        nisa.tensor_copy(rounded, d_gate)
        store(grads[3], tile, rounded)
    return grads[0], grads[1], grads[2], grads[3]
