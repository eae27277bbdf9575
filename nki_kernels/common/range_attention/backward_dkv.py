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

Bound by PE: 0.92 us per 128 rows and 256 keys at 192/128 in bfloat16 are modelled, 0.78 of them
PE's work (a fifth of it transposes); reading the rows' q and dO takes 0.23 us of HBM, VectorE and
ScalarE 0.7 us each. Stages are emitted in turn so that PE never waits for the softmax: loads three
rows ahead of transposes, these one ahead of scores, the softmax one behind, and the sums one more.
Weighed: q^T and dO^T from HBM would save the transposes and double the bytes, which then bind; P in
float32 for dS costs a second exponential and errs no less, since dS is rounded anyway.
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
)

SECTION = 256  # keys whose gradients PSUM holds
LOADED = 3  # rows loaded before they are transposed


def gradients_of_keys(grad_o, q, k_t, v_t, stats, bounds, reach, scale):
    """dk [B, T, Hkv, Dk] and dv [B, T, Hkv, Dv] in q's dtype, in HBM.

    grad_o [B, S, Hq, Dv], q [B, S, Hq, Dk], k_t [B, Hkv, Dk, T], v_t [B, Hkv, Dv, T],
    stats [B, S, Hq, 2] float32 (-lse, finite, and delta), bounds [S, 2]; scale > 0.
    """
    batch, kv_heads, dk_width, keys = k_t.shape
    dk = nl.ndarray((batch, keys, kv_heads, dk_width), dtype=q.dtype, buffer=nl.shared_hbm)
    dv = nl.ndarray((batch, keys, kv_heads, v_t.shape[2]), dtype=q.dtype, buffer=nl.shared_hbm)
    for b in range(batch):
        for h in range(kv_heads):
            for first, count, around in sections(keys):
                rows = []
                for tile in seeing(b, h, q, kv_heads, keys, around, reach):
                    rows.append(Rows(tile))
                section = Section(k_t, v_t, b, h, first, count)
                add_rows(section, rows, Loads(grad_o, q, stats, bounds, around), scale)
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

    def __init__(self, k_t, v_t, batch, head, first, count, queue=""):
        self.batch = batch
        self.head = head
        self.first = first
        self.count = count
        self.k_t = load_turned(k_t, batch, head, first, count, queue)
        self.v_t = load_turned(v_t, batch, head, first, count, queue)
        self.parts = cut(count, 128)
        self.widths = (k_t.shape[2], v_t.shape[2])
        self.open()

    def open(self):
        """Sums of nothing, in new banks of PSUM."""
        self.grad_k = []
        self.grad_v = []
        for _, size in self.parts:
            self.grad_k.append(psum((size, self.widths[0]), nl.float32))
            self.grad_v.append(psum((size, self.widths[1]), nl.float32))
        self.empty = True

    def add(self, rows):
        """dV += P^T dO and dK += dS^T q of up to 128 rows."""
        adding = not self.empty
        for i in range(len(self.parts)):
            k0, size = self.parts[i]
            weights, grad_s = rows.weights[:, k0 : k0 + size], rows.grad_s[:, k0 : k0 + size]
            nisa.nc_matmul(self.grad_v[i], weights, rows.grad, accumulate=adding)
            nisa.nc_matmul(self.grad_k[i], grad_s, rows.q, accumulate=adding)
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


class Rows(nl.NKIObject):
    """Up to 128 rows on their way through the stages."""

    def __init__(self, tile):
        self.tile = tile
        self.q = None
        self.grad = None
        self.stat = None
        self.limits = None
        self.q_t = []
        self.grad_t = []
        self.products = None
        self.weights = None
        self.grad_s = None


def add_rows(section, rows, loads, scale):
    """Adds the gradients of all tiles of rows, in order; each stage is ahead of the next.

    loads: loads them, or None if they are there.
    """
    count = len(rows)
    for i in range(count + LOADED + 4):
        if i < count and loads is not None:
            loads.load(rows[i])
        turned = i - LOADED
        multiplied, weighed, added = turned - 1, turned - 2, turned - 4
        if 0 <= turned < count:
            turn(rows[turned])
        if 0 <= multiplied < count:
            multiply(section, rows[multiplied])
        if 0 <= weighed < count:
            weigh(section, rows[weighed], scale)
        if 0 <= added:
            section.add(rows[added])
            rows[added] = None


class Loads(nl.NKIObject):
    """Where rows come from; `around`: first and last key of the pair of sections."""

    def __init__(self, grad_o, q, stats, bounds, around):
        self.grad_o = grad_o
        self.q = q
        self.stats = stats
        self.bounds = bounds
        self.around = around

    def load(self, rows):
        """q, dO, statistics, and bounds unless all keys are visible."""
        rows.q = load_rows(self.q, rows.tile, 0)
        rows.grad = load_rows(self.grad_o, rows.tile, 0)
        rows.stat = load_rows(self.stats, rows.tile, 0)
        if not rows.tile.sees_all(self.around[0], self.around[1]):
            rows.limits = row_bounds(self.bounds, rows.tile, 0)


def turn(rows):
    """q^T and dO^T by chunks of at most 128 of their dims, through one bank of PSUM."""
    chunks = []
    for source, kept in ((rows.q, rows.q_t), (rows.grad, rows.grad_t)):
        for d0, width in cut(source.shape[1], 128):
            chunks.append((source, kept, d0, width))
    columns = rows.tile.columns
    turned = psum((128, len(chunks), columns), rows.q.dtype)
    for i in range(len(chunks)):
        source, _, d0, width = chunks[i]
        nisa.nc_transpose(
            turned[0:width, i, :], source[:, d0 : d0 + width], engine=nisa.engine.tensor
        )
    for i in range(len(chunks)):
        _, kept, _, width = chunks[i]
        copy = sbuf((width, columns), rows.q.dtype)
        engine = nisa.engine.vector if i == 0 else nisa.engine.scalar
        nisa.tensor_copy(copy, turned[0:width, i, :], engine=engine)
        kept.append(copy)


def multiply(section, rows):
    """S and dP of rows in one bank of PSUM, [rows, 2, keys of the section]."""
    rows.products = psum((rows.tile.columns, 2, section.count), nl.float32)
    for i, rows_t, keys_t in ((0, rows.q_t, section.k_t), (1, rows.grad_t, section.v_t)):
        for c in range(len(rows_t)):
            nisa.nc_matmul(rows.products[:, i, :], rows_t[c], keys_t[c], accumulate=c > 0)


def weigh(section, rows, scale):
    """P and dS (unscaled) of rows, [rows, keys of the section] in the inputs' dtype."""
    shape = (rows.tile.columns, section.count)
    scores, limits = rows.products[:, 0, :], rows.limits
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
    rows.weights = sbuf(shape, rows.q.dtype)
    nisa.activation(rows.weights, nl.exp, scores, bias=rows.stat[:, 0:1], scale=scale)
    rows.grad_s = sbuf(shape, rows.q.dtype)
    nisa.scalar_tensor_tensor(
        rows.grad_s,
        rows.products[:, 1, :],
        nl.subtract,
        rows.stat[:, 1:2],
        nl.multiply,
        rows.weights,
    )
