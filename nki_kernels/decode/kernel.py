"""Decode: the newest tokens of each sequence against paged KV caches, all three branches.

Dimensions: B sequences, S new tokens, Hq = G * Hkv heads, Dk, Dv <= 256, S * G <= 128 rows per kv
head. Caches [units, unit, Hkv, D], see `caches`.
Layout: 128 / PITCH kv heads at a time, each on PITCH partitions (32, 64 or 128, at least S * G);
keys along the free axis. So softmax is one reduction per row, a mask one VectorE pass, and the four
kv heads of a 64/4 model with one new token take as long as one.

    per sequence, per group of kv heads:
        compressed   gather units; K turned by PE; S = q K^T; hide; p = exp(scale (S - max))
        window       gather units; S
        selection    importance = sum of p over heads and over overlapping compressed blocks;
                     forced blocks first; the n best by rounds of 8, lowest number on ties
        selected     addresses of the chosen blocks, looked up on the device; gather; S, p
        each branch  o = p V / sum                              (p turned by PE, 128 keys at a time)
        o = sum of gate * branch

Sequences of a body overlap: one's chosen blocks are fetched behind the next one's first loads. Only
DMA has run-time addresses. Lengths are data: bounds of what each row sees come as numbers.
Bound by DMA: at 64K tokens, 64/4/192/128, 14.4 MB per sequence are 41 us of a core's 354 GB/s, but
in 274 gathers of 64 rows, 1.6 us each on three queues: 146 us. Modelled, one core: 233 us for one
sequence; with compressed pages of 128 rows 221 gathers, 201 us for one and 188 each for four, of
which VectorE has 115.
Reading all of a dense cache at full rate would take 474 us. Gathers by rows (one DMA for 128 rows,
14 ns of GpSimd per row) would need 17,400 rows, 244 us of one queue.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.cores import share
from nki_kernels.common.queues import fetch
from nki_kernels.common.spans import spans
from nki_kernels.decode.caches import Branch, load_numbers, load_table
from nki_kernels.decode.lanes import HIDDEN, Lanes, Scores, key_columns, weigh
from nki_kernels.decode.selection import choose, importance, units_of, visible

MOST_PER_BODY = 4
"""Sequences whose instructions stand one after another, so that they overlap."""

AHEAD = 40_000
"""Bytes of a partition for values of a branch that are not needed yet."""


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
    # Sequences are shared by the cores, or kv heads where sequences are odd and heads are not.
    cores = nl.num_programs(0)
    by_heads = batch % cores > 0 and groups % cores == 0
    first, count = (0, batch) if by_heads else share(batch)
    first_group, own_groups = share(groups) if by_heads else (0, groups)

    per = sequences_per_body(count)

    def one_body(i):
        sequences, results = [], []
        for j in range(per):
            for g in range(first_group, first_group + own_groups):
                sequence = Sequence(
                    at(q_t, i, j, per)[g], at(gates, i, j, per)[g], at(o, i, j, per)[g], lanes
                )
                sequence.load(at(bounds, i, j, per), at(place, i, j, per))
                head = g * per_group
                sequence.head = head
                units = load_numbers(at(cmp_units, i, j, per))
                sequence.far = Branch(k_cmp, v_cmp, units, head, per_group, True)
                units = load_numbers(at(win_units, i, j, per))
                sequence.window = Branch(k_win, v_win, units, head, per_group, True)
                sequence.table = load_table(at(slc_blocks, i, j, per), place.shape[1])
                sequence.begin(scale)
                sequence.select(owner, length, ratio, chosen, initial, parts)
                # Behind the next one's first loads, since they must wait for something: the loads
                # of chosen blocks for their selection, results for the sums.
                for before in sequences:
                    store_all(results)
                    results = [before.end(k_slc, v_slc, row_of, within, scale)]
                sequences = [sequence]
        results.append(sequences[0].end(k_slc, v_slc, row_of, within, scale))
        store_all(results)

    nl.fori_loop(first, first + count, one_body, step=per)
    return o


def sequences_per_body(count):
    """How many of `count` sequences a body of the loop takes, so that they overlap."""
    per = min(count, MOST_PER_BODY)
    while count % per > 0:
        per -= 1
    return per


def store_all(results):
    for target, values in results:
        fetch(target, values)


def at(tensor, i, j, per):
    """Item i + j, i a run-time number up to the last but per - 1."""
    return tensor[j : tensor.shape[0] - per + 1 + j].select(0, i)


class Sequence(nl.NKIObject):
    """New tokens of a sequence for some kv heads: rows, and the gated sum of their branches."""

    def __init__(self, q_t, gates, o, lanes):
        dk, rows = q_t.shape
        self.lanes, self.dtype, self.o = lanes, q_t.dtype, o
        self.columns, self.total = [], []
        for first, count in spans(dk, nl.tile_size.pmax):
            tile = sbuf((count, rows), q_t.dtype)
            fetch(tile, q_t[first : first + count, :])
            self.columns.append(tile)
        self.gates = sbuf((rows, 3), nl.float32)
        fetch(self.gates, gates)

    def load(self, bounds, place):
        """What the rows see, and where the queries stand."""
        self.limits, self.place = sbuf(bounds.shape, nl.float32), sbuf(place.shape, nl.float32)
        fetch(self.limits, bounds)
        fetch(self.place, place)

    def begin(self, scale):
        """Asks for everything that needs no selection, and makes the scores of it."""
        self.far_scores = self.scores(self.far, in_range(self.limits[:, 0:2]))
        self.far.ask_values(AHEAD)
        self.window_scores = self.scores(self.window, in_range(self.limits[:, 2:4]))
        self.window.ask_values(AHEAD)
        self.far_scores.normalise(self.far.groups(), scale)

    def select(self, owner, length, ratio, chosen, initial, parts):
        ranks = importance(self.far_scores, owner, length, ratio, self.table.shape[1])
        numbers, real = choose(ranks, self.place, chosen, initial)
        self.addresses, self.names = units_of(numbers, real, self.table, parts)

    def end(self, k_slc, v_slc, row_of, within, scale):
        """The selected branch and all sums: where they go, and they."""
        seen = visible(self.names, row_of, self.limits[:, 4:6], k_slc.shape[1])
        own = Branch(k_slc, v_slc, self.addresses, self.head, self.lanes.heads, False)
        own.ask_keys(AHEAD)
        own.ask_values(AHEAD)
        self.add(self.far_scores, self.far, 0)
        self.window_scores.normalise(self.window.groups(), scale)
        self.add(self.window_scores, self.window, 2)
        own_scores = self.scores(own, in_blocks(seen, within))
        own_scores.normalise(own.groups(), scale)
        self.add(own_scores, own, 1)
        out = sbuf(self.total[0].shape, self.o.dtype)
        nisa.tensor_copy(out, self.total[0])
        return self.o, out

    def scores(self, branch, hide):
        """`Scores` of a branch; `hide` masks a group of logits."""
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
        return scores

    def add(self, scores, branch, which):
        """Adds a branch whose scores are normalised."""
        out = weigh(scores, branch, self.lanes, self.dtype)
        factor = sbuf((self.lanes.rows, 1), nl.float32)
        total = sbuf(out.shape, nl.float32)
        nisa.tensor_tensor(factor, scores.inverse, self.gates[:, which : which + 1], nl.multiply)
        if len(self.total) == 0:
            nisa.tensor_scalar(total, out, nl.multiply, factor)
        else:
            nisa.scalar_tensor_tensor(total, out, nl.multiply, factor, nl.add, self.total[0])
        self.total = [total]


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
