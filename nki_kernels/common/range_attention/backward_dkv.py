"""Gradients of range attention with respect to k and v. See the package for what is computed.

Layout: a section of up to 256 keys stays in PSUM (dK and dV, one bank per 128 keys each) while the
rows that see it pass by, 128 at a time, rows on partitions. The heads of a group are among those
rows, so dK and dV are summed over the group in program order: no atomics, the same bits each time.

    for each section of keys:
        for each 128 rows (queries x heads):
            q^T, dO^T                                             PE transposes
            S = q k^T;  dP = dO v^T                               PE
            P = exp(scale * S - lse), hidden keys 0               range_select, ScalarE
            dS = P * (dP - delta)                                 VectorE
            dV += P^T dO;  dK += dS^T q                           PE
        dv = dV;  dk = scale * dK

Bound by PE and by bytes alike: per 128 rows and 256 keys PE takes 0.85 us at 192/128 in bfloat16
(a quarter of it transposes), reading the rows' q and dO 0.23 us of HBM; VectorE about 0.9 us.
Three stages are emitted in turn so that PE never waits for the softmax: loads and transposes of
the rows after next, scores of the next, sums of this.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.cores import this_core
from nki_kernels.common.range_attention.geometry import (
    Tile,
    cut,
    head_groups,
    key_range,
    queries_per_part,
)
from nki_kernels.common.range_attention.operands import (
    load_rows,
    load_turned,
    row_bounds,
    transpose_rows,
)

SECTION = 256  # keys whose gradients PSUM holds


def gradients_of_keys(grad_o, q, k_t, v_t, stats, bounds, reach, scale):
    """dk [B, T, Hkv, Dk] and dv [B, T, Hkv, Dv] in q's dtype, in HBM.

    grad_o [B, S, Hq, Dv], q [B, S, Hq, Dk], k_t [B, Hkv, Dk, T], v_t [B, Hkv, Dv, T],
    stats [B, S, Hq, 2] float32 (lse, finite, and delta), bounds [S, 2]; scale > 0.
    """
    batch, kv_heads, dk_width, keys = k_t.shape
    dk = nl.ndarray((batch, keys, kv_heads, dk_width), dtype=q.dtype, buffer=nl.shared_hbm)
    dv = nl.ndarray((batch, keys, kv_heads, v_t.shape[2]), dtype=q.dtype, buffer=nl.shared_hbm)
    for b in range(batch):
        for h in range(kv_heads):
            for first, count, around in sections(keys):
                tiles = seeing(b, h, q, kv_heads, keys, around, reach)
                section = Section(k_t, v_t, b, h, first, count)
                add_rows(section, tiles, grad_o, q, stats, bounds, around, scale)
                section.store(dk, dv, scale)
    return dk, dv


def sections(keys):
    """(first key, keys, (first, last) of the pair) of this core's sections.

    Sections come in pairs that the same rows pass by, one for each of two cores; one core does
    both. The second of an odd pair starts earlier, so that both are equally long.
    """
    core, cores = this_core()
    found = []
    for first, count in cut(keys, 2 * SECTION):
        half = (count + 1) // 2
        around = (first, first + count)
        if core == 0:
            found.append((first, half, around))
        if core == 1 or (cores == 1 and count > 1):
            found.append((first + count - half, half, around))
    return found


def seeing(batch, kv_head, q, kv_heads, keys, around, reach):
    """Tiles of one part each, of the queries that may see keys of a pair of sections."""
    hi_add, lo_add, step, _ = reach
    queries, group = q.shape[1], q.shape[2] // kv_heads
    first = max(0, (around[0] + 1) * step - hi_add)
    last = min(queries, around[1] * step - lo_add)
    found = []
    for g0, heads in head_groups(group):
        for t0, count in cut(max(0, last - first), queries_per_part(heads)):
            start = first + t0
            span = key_range(start, start + count, keys, reach)
            found.append(
                Tile(batch, kv_head, kv_head * group + g0, heads, start, count, span, reach)
            )
    return found


class Section(nl.NKIObject):
    """Keys of one kv head with their gradients: `parts` of up to 128 keys, dK and dV in PSUM."""

    def __init__(self, k_t, v_t, batch, head, first, count):
        self.batch = batch
        self.head = head
        self.first = first
        self.count = count
        self.k_t = load_turned(k_t, batch, head, first, count)
        self.v_t = load_turned(v_t, batch, head, first, count)
        self.parts = cut(count, 128)
        self.grad_k = []
        self.grad_v = []
        for _, size in self.parts:
            self.grad_k.append(psum((size, k_t.shape[2]), nl.float32))
            self.grad_v.append(psum((size, v_t.shape[2]), nl.float32))
        self.empty = True

    def add(self, rows, weights, grad_s):
        """dV += P^T dO and dK += dS^T q of up to 128 rows."""
        q_rows, grad_rows = rows
        for i in range(len(self.parts)):
            k0, size = self.parts[i]
            nisa.nc_matmul(
                self.grad_v[i], weights[:, k0 : k0 + size], grad_rows, accumulate=not self.empty
            )
            nisa.nc_matmul(
                self.grad_k[i], grad_s[:, k0 : k0 + size], q_rows, accumulate=not self.empty
            )
        self.empty = False

    def store(self, dk, dv, scale):
        """Writes the section's gradients; keys that nobody sees have none."""
        for i in range(len(self.parts)):
            k0, size = self.parts[i]
            key0 = self.first + k0
            for target, summed, factor in ((dk, self.grad_k[i], scale), (dv, self.grad_v[i], 1.0)):
                result = sbuf((size, target.shape[3]), target.dtype)
                if self.empty:
                    nisa.memset(result, 0.0)
                else:
                    nisa.tensor_scalar(result, summed, nl.multiply, factor)
                nisa.dma_copy(target[self.batch, key0 : key0 + size, self.head, :], result)


def add_rows(section, tiles, grad_o, q, stats, bounds, around, scale):
    """Adds the gradients of all tiles of rows, in order."""
    loaded, scored = [], []
    for i in range(len(tiles) + 2):
        if i < len(tiles):
            loaded.append(load(tiles[i], grad_o, q, stats, bounds, around))
        if 1 <= i <= len(tiles):
            tile, operands = tiles[i - 1], loaded[i - 1]
            scored.append(weights_and_gradients(section, tile, operands, scale))
        if i >= 2:
            weights, grad_s = scored[i - 2]
            section.add(loaded[i - 2][0], weights, grad_s)


def load(tile, grad_o, q, stats, bounds, around):
    """((q, dO), q^T, dO^T, statistics, bounds or None if all is visible) of a tile of one part."""
    rows = load_rows(q, tile, 0), load_rows(grad_o, tile, 0)
    limits = None
    if not tile.sees_all(around[0], around[1]):
        limits = row_bounds(bounds, tile, 0)
    return (
        rows,
        transpose_rows([rows[0]], tile),
        transpose_rows([rows[1]], tile),
        load_rows(stats, tile, 0),
        limits,
    )


def weights_and_gradients(section, tile, operands, scale):
    """P and dS (unscaled) of a tile's rows, [rows, keys of the section] in the inputs' dtype."""
    _, q_t, grad_t, stat, limits = operands
    shape = (tile.columns, section.count)
    scores = product(q_t, section.k_t, shape)
    bias = sbuf((tile.columns, 1), nl.float32)
    nisa.tensor_scalar(bias, stat[:, 0:1], nl.multiply, -1.0)
    if limits is not None:
        seen = sbuf(shape, nl.float32)
        nisa.range_select(
            seen,
            scores,
            nl.greater_equal,
            nl.less,
            limits[:, 0:1],
            limits[:, 1:2],
            range_start=section.first,
        )
        scores = seen
    exact = sbuf(shape, nl.float32)
    nisa.activation(exact, nl.exp, scores, bias=bias, scale=scale)
    weights = exact
    if q_t[0].dtype != nl.float32:
        weights = sbuf(shape, q_t[0].dtype)
        nisa.activation(weights, nl.exp, scores, bias=bias, scale=scale)
    products = product(grad_t, section.v_t, shape)
    grad_s = sbuf(shape, q_t[0].dtype)
    nisa.scalar_tensor_tensor(grad_s, products, nl.subtract, stat[:, 1:2], nl.multiply, exact)
    return weights, grad_s


def product(rows_t, keys_t, shape):
    """rows @ keys^T [rows, keys] in PSUM, from both transposed, over chunks of the contraction."""
    result = psum(shape, nl.float32)
    for c in range(len(rows_t)):
        nisa.nc_matmul(result, rows_t[c], keys_t[c], accumulate=c > 0)
    return result
