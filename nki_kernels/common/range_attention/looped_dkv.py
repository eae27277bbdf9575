"""Gradients with respect to k and v in hardware loops.

    for each kv head, each section of 256 keys:                     hardware loop
        for each chunk of queries that may see it:                  three hardware loops
            for each 128 rows:                                      as in `backward_dkv`
            acc_k += dS^T q, acc_v += P^T dO                        from PSUM to SBUF, VectorE
        dk = scale * acc_k, dv = acc_v

Sections come in pairs with equal trip counts, one for each of two cores. A chunk of queries is a
pair of the groups of `loops`: those at the edges are masked, those between see the whole section.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import sbuf
from nki_kernels.common.cores import this_core
from nki_kernels.common.queues import fetch
from nki_kernels.common.range_attention.backward_dkv import (
    SECTION,
    Rows,
    Section,
    add_rows,
)
from nki_kernels.common.range_attention.geometry import Tile, queries_per_part
from nki_kernels.common.range_attention.loops import PARTS, by_part, lanes, of_group
from nki_kernels.common.spans import spans

AT_ONCE = 8  # parts of 128 rows in one load


def gradients_of_keys(grad_o, q, k_t, v_t, stats, bounds, trips, scale, looped):
    """dk and dv as of `backward_dkv.gradients_of_keys`, S a whole number of pairs of groups, T of
    pairs of sections.

    trips: int32 [sections, 4], bounds of the loops over chunks of queries: those that see some of
    the keys of a pair of sections, all of them, and some again. looped: as of `loops.Loops`; here
    its tiles count.
    """
    batch, kv_heads, dk_width, keys = k_t.shape
    heads = q.shape[2]
    dk = nl.ndarray((batch, keys, kv_heads, dk_width), dtype=q.dtype, buffer=nl.shared_hbm)
    dv = nl.ndarray((batch, keys, kv_heads, v_t.shape[2]), dtype=q.dtype, buffer=nl.shared_hbm)
    group = heads // kv_heads
    for b in range(batch):
        for h in range(kv_heads):
            parts = []
            for _, _, h0, own in lanes(1, 1, group):
                part = slice(h * group + h0, h * group + h0 + own)
                parts.append((q[b, :, part, :], grad_o[b, :, part, :], stats[b, :, part, :]))
            targets = (dk[b, :, h, :], dv[b, :, h, :])
            all_sections(parts, (k_t[b, h], v_t[b, h]), targets, bounds, trips, looped[0], scale)
    return dk, dv


def all_sections(parts, keys, targets, bounds, trips, tiles, scale):
    """dk and dv of a kv head, of this core's sections.

    parts: (q, grad_o, stats) of up to 128 of its query heads each; keys: k^T and v^T.
    """
    core, cores = this_core()
    base = sbuf((128, 1), nl.float32)  # first key of the section
    nisa.memset(base, float(core * SECTION))

    def one_section(i):
        gradients = Gradients(keys[0], keys[1], i)
        for rows in parts:
            gradients.add(rows, bounds, of_group(trips, 1, i)[0], base, tiles, scale)
        gradients.store(targets[0], targets[1], i, scale)
        nisa.tensor_scalar(base, base, nl.add, float(cores * SECTION))

    nl.fori_loop(0, keys[0].shape[1] // (cores * SECTION), one_section)


class Gradients(nl.NKIObject):
    """A section with its sums in SBUF, float32."""

    def __init__(self, k_t, v_t, i):
        columns = []
        for source in (k_t, v_t):
            own = of_keys(source, i)
            columns.append(own.expand_dim(0).expand_dim(0))
        self.section = Section(columns[0], columns[1], 0, 0, 0, SECTION, "y")
        parts = len(self.section.parts)
        self.acc_k = sbuf((128, parts, k_t.shape[0]), nl.float32)
        self.acc_v = sbuf((128, parts, v_t.shape[0]), nl.float32)
        nisa.memset(self.acc_k, 0.0)
        nisa.memset(self.acc_v, 0.0)

    def add(self, rows, bounds, trips, base, tiles, scale):
        """Adds what the queries give that see the section, of up to 128 heads."""
        heads = rows[0].shape[1]
        size = 2 * tiles * PARTS * queries_per_part(heads)
        count = rows[0].shape[0] // size
        at = []
        for k in range(4):
            bound = nisa.register_alloc()
            nisa.register_load(bound, trips[k : k + 1])
            at.append(bound)

        def chunk(j, edge):
            views = []
            for view in rows:
                views.append(view.reshape_dim(0, (count, size)).select(0, j))
            limits = bounds.reshape_dim(0, (count, size)).select(0, j) if edge else None
            self.add_chunk(views, limits, base, scale)

        def edge(j):
            chunk(j, True)

        def seen(j):
            chunk(j, False)

        nl.fori_loop(at[0], at[1], edge)
        nl.fori_loop(at[1], at[2], seen)
        nl.fori_loop(at[2], at[3], edge)

    def add_chunk(self, views, limits, base, scale):
        """Adds a chunk of queries; limits: bounds of its queries, or None if all see all keys."""
        rows = prepared(views, limits, base)
        section = self.section
        section.open()
        add_rows(section, rows, None, scale)
        for i in range(len(section.parts)):
            for acc, sums in ((self.acc_k, section.grad_k), (self.acc_v, section.grad_v)):
                nisa.tensor_tensor(acc[:, i, :], acc[:, i, :], sums[i], nl.add)

    def store(self, dk, dv, i, scale):
        """Writes both gradients."""
        for target, acc, factor in ((dk, self.acc_k, scale), (dv, self.acc_v, 1.0)):
            result = sbuf(acc.shape, target.dtype)
            nisa.tensor_scalar(result, acc, nl.multiply, factor)
            own = of_group(target, SECTION, i).reshape_dim(0, (acc.shape[1], 128))
            fetch(own.permute((1, 0, 2)), result, "a")


def of_keys(source, i):
    """This core's i-th section of [D, T] in HBM."""
    core, cores = this_core()
    pairs = source.shape[1] // (2 * SECTION)
    if cores == 1:
        return source.reshape_dim(1, (2 * pairs, SECTION)).select(1, i)
    return source.reshape_dim(1, (pairs, 2, SECTION)).select(1, i).select(1, core)


def prepared(views, limits, base):
    """`Rows` of a chunk, loaded AT_ONCE parts at a time; views: q, grad_o, stats."""
    queries, heads, _ = views[0].shape
    per_part = queries_per_part(heads)
    found = []
    for first, count in spans(queries // per_part, AT_ONCE):
        loaded = []
        for view in views:
            part = view[first * per_part : (first + count) * per_part]
            columns = sbuf((per_part * heads, count, view.shape[2]), view.dtype)
            fetch(columns, by_part(part, per_part))
            loaded.append(columns)
        relative = None
        if limits is not None:
            relative = sbuf((per_part * heads, count, 2), nl.float32)
            own = limits[first * per_part : (first + count) * per_part]
            own = own.reshape_dim(0, (count, per_part)).permute((1, 0, 2))
            fetch(relative, own.expand_dim(1).broadcast(1, heads))
            nisa.tensor_scalar(relative, relative, nl.subtract, base[0 : per_part * heads, :])
        for p in range(count):
            rows = Rows(Tile(0, 0, 0, heads, 0, per_part, (0, 0, 0, 0, True), (0, 0, 1, False)))
            rows.q, rows.grad, rows.stat = (
                loaded[0][:, p, :],
                loaded[1][:, p, :],
                loaded[2][:, p, :],
            )
            if relative is not None:
                rows.limits = relative[:, p, :]
            found.append(rows)
    return found
