"""Decode: the newest tokens of each sequence against paged KV caches, all three branches.

Dimensions: B sequences, S new tokens, Hq = G * Hkv heads, Dk, Dv <= 256, S * G <= 128 rows per kv
head. Caches [units, unit, Hkv, D], see `caches`.
Layout: 128 / PITCH kv heads at a time, each on PITCH partitions (32, 64 or 128, at least S * G);
keys along the free axis. So softmax is one reduction per row, a mask one VectorE pass, and the four
kv heads of a 64/4 model with one new token take as long as one.

    per sequence, per group of kv heads:
        compressed   gather units; K turned by PE; S = q K^T; hide; p = exp(scale (S - max))
                     o = p V / sum                              (p turned by PE, 128 keys at a time)
        selection    importance = sum of p over heads and over overlapping compressed blocks;
                     forced blocks first; the n best by rounds of 8, lowest number on ties
        selected     addresses of the chosen blocks, looked up on the device; as above
        window       as above
        o = sum of gate * branch

Only DMA has run-time addresses. Lengths are data: bounds of what each row sees come as numbers.
Bound by DMA: at 64K tokens, 64/4/192/128, 14.4 MB per sequence (41 us of a core's 354 GB/s), in 128
+ 128 + 16 gathers of 64 tokens and more than that in small ones; see docs for modelled times.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.cores import share
from nki_kernels.common.spans import spans
from nki_kernels.decode.caches import Branch, load_numbers
from nki_kernels.decode.lanes import HIDDEN, Lanes, Scores, key_columns, weigh
from nki_kernels.decode.selection import choose, importance, units_of, visible


@nki.jit
def decode(
    q_t, gates, bounds, place, cmp_units, slc_blocks, win_units, owners, rows_of, k_cmp, v_cmp,
    k_slc, v_slc, k_win, v_win, length: int, ratio: int, parts: int, chosen: int, initial: int,
    scale: float,
):  # fmt: skip
    """o [B, groups of kv heads, rows, DV] in q's dtype; see the module's docstring.

    Args:
        q_t: [B, groups, DK, rows], zero where a partition has no row.
        gates: [B, groups, rows, 3] float32.
        bounds: [B, rows, 6] float32: first and last visible compressed block, first and last
            visible key of the window's units, 1 + own unit, tokens of that up to the query.
        place: [B, pairs, 2] float32, see `selection.choose`; pairs = kv heads of a group * S.
        cmp_units, win_units: [B, units] int32. slc_blocks: [B, blocks] int32, in blocks.
        owners: [rows, pairs], rows_of: [pairs, S, rows] float32, see `selection`.
        k_cmp, ...: pools [units, unit, Hkv, D]; units of k_slc are parts of blocks.
        length, ratio: l / d and m / d. parts: units of a block. chosen: n.
    """
    batch, groups, _, rows = q_t.shape
    per_group = k_cmp.shape[2] // groups
    o = nl.ndarray((batch, groups, rows, v_cmp.shape[3]), dtype=q_t.dtype, buffer=nl.shared_hbm)
    lanes = Lanes(per_group, rows // per_group)
    owner, row_of = sbuf(owners.shape, nl.float32), sbuf(rows_of.shape, nl.float32)
    nisa.dma_copy(owner, owners)
    nisa.dma_copy(row_of, rows_of)
    within = sbuf((rows, k_slc.shape[1]), nl.float32)
    nisa.iota(within, [[1, k_slc.shape[1]]], offset=0, channel_multiplier=0)
    first, count = share(batch)

    def one_sequence(b):
        limits, pairs = sbuf((rows, 6), nl.float32), sbuf(place.shape[1:], nl.float32)
        nisa.dma_copy(limits, bounds.select(0, b))
        nisa.dma_copy(pairs, place.select(0, b))
        table = sbuf((place.shape[1], slc_blocks.shape[1]), nl.int32)
        blocks = slc_blocks.select(0, b).expand_dim(0)
        nisa.dma_copy(table, blocks.broadcast(0, place.shape[1]))
        compressed, near = load_numbers(cmp_units, b), load_numbers(win_units, b)
        for g in range(groups):
            head = g * per_group
            query = Query(q_t.select(0, b), gates.select(0, b), g, lanes, scale)
            far = Branch(k_cmp, v_cmp, compressed, head, per_group, True)
            scores = query.attend(far, in_range(limits[:, 0:2]), 0)
            ranks = importance(scores, owner, length, ratio, table.shape[1])
            numbers, real = choose(ranks, pairs, chosen, initial)
            addresses, names = units_of(numbers, real, table, parts)
            seen = visible(names, row_of, limits[:, 4:6], k_slc.shape[1])
            own = Branch(k_slc, v_slc, addresses, head, per_group, False)
            query.attend(own, in_blocks(seen, within), 1)
            window = Branch(k_win, v_win, near, head, per_group, True)
            query.attend(window, in_range(limits[:, 2:4]), 2)
            query.store(o.select(0, b), g)

    nl.fori_loop(first, first + count, one_sequence)
    return o


class Query(nl.NKIObject):
    """Rows of some kv heads of a sequence, and the gated sum of their branches so far."""

    def __init__(self, q_t, gates, group, lanes, scale):
        _, dk, rows = q_t.shape
        self.lanes, self.scale = lanes, scale
        self.dtype = q_t.dtype
        self.columns = []
        for first, count in spans(dk, nl.tile_size.pmax):
            tile = sbuf((count, rows), q_t.dtype)
            nisa.dma_copy(tile, q_t[group, first : first + count, :])
            self.columns.append(tile)
        self.gates = sbuf((rows, 3), nl.float32)
        nisa.dma_copy(self.gates, gates[group])
        self.total = []

    def attend(self, branch, hide, which):
        """Adds a branch; `hide` masks a group of logits. Returns its `Scores`, normalised."""
        lanes = self.lanes
        groups = branch.groups()
        scores = Scores(lanes, len(groups), branch.keys)
        for i in range(len(groups)):
            first, count = groups[i]
            keys = key_columns(branch.load_keys(first, count), lanes)
            logits = psum((lanes.rows, count))
            for h in range(lanes.heads):
                for c in range(len(keys)):
                    own = self.columns[c][:, lanes.of(h)]
                    lanes.matmul(logits, own, keys[c][:, h, :], h, c > 0)
            hide(scores.values[:, first : first + count], logits, scores.top[:, i : i + 1], first)
        scores.normalise(groups, self.scale)
        out = weigh(scores, branch, lanes, self.dtype)
        factor = sbuf((lanes.rows, 1), nl.float32)
        total = sbuf(out.shape, nl.float32)
        nisa.tensor_tensor(factor, scores.inverse, self.gates[:, which : which + 1], nl.multiply)
        if len(self.total) == 0:
            nisa.tensor_scalar(total, out, nl.multiply, factor)
        else:
            nisa.scalar_tensor_tensor(total, out, nl.multiply, factor, nl.add, self.total[0])
        self.total = [total]
        return scores

    def store(self, o, group):
        out = sbuf(self.total[0].shape, o.dtype)
        nisa.tensor_copy(out, self.total[0])
        nisa.dma_copy(o[group], out)


def in_range(bounds):
    """Hides keys outside bounds [rows, 2], first and last visible key."""

    def hide(values, logits, top, first):
        nisa.range_select(
            values, logits, nl.greater_equal, nl.less_equal, bounds[:, 0:1], bounds[:, 1:2],
            reduce_res=top, range_start=first,
        )  # fmt: skip

    return hide


def in_blocks(seen, within):
    """Hides what lies behind the first `seen` [rows, S, units] tokens of each unit."""
    rows, unit = within.shape
    units = seen.reshape((rows, seen.shape[1] * seen.shape[2]))

    def hide(values, logits, top, first):
        count = logits.shape[1] // unit
        shown = sbuf((rows, count, unit), nl.uint8)
        some = units[:, first // unit : first // unit + count]
        nisa.tensor_tensor(
            shown,
            within.expand_dim(1).broadcast(1, count),
            some.expand_dim(2).broadcast(2, unit),
            nl.less,
        )
        nisa.select_reduce(
            values, shown.reshape((rows, count * unit)), logits, HIDDEN, reduce_res=top,
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )  # fmt: skip

    return hide
