"""Decode of one new token of one kv head on a core: the shortest chain of steps.

Dimensions: G query heads <= 128, Dk, Dv <= 256; pools in rows of t tokens, see `caches`: t_cmp a
multiple of m / d, G * t a bank of PSUM at most, chosen blocks in at most 128 rows.
Layout: keys on partitions, see `upright`. A core that has one kv head only cannot fill its
partitions with heads, as `kernel.decode` does.

    index -> gather K_cmp, K_win, V_win, V_cmp
    compressed   S^T = K q by PE, as tiles of 128 rows arrive; hide; less the maximum; exp
    importance   sum over heads and overlapping blocks, on the partition of the keys; the last keys
                 of a partition come to the next one by a matmul with a shifted identity
    selection    turned to one row, the n best by rounds of 8, lowest number on ties
    selected     first rows of chosen blocks from a table in SBUF: partitions compare the numbers
                 with their own, a matmul adds up what one of them finds; gather; S^T, exp
    each branch  o = sum of weights * V by PE; the window and the compressed branch while the chosen
                 keys are on their way; their values are cleared in gaps of VectorE

Bound by the chain of its steps, not by an engine: of 36 us at 64K tokens (modelled, 64/4/192/128,
bfloat16, one of four kv heads on a core) VectorE works 27, PE 19, ScalarE 7, and bytes take 10. The
chain, us: the index 0.9, the second half of the compressed keys 5.8 (GpSimd makes descriptors of
the first before), their logits 3.7, the maximum 2.4, shares and importance 5.5, a row of it 1.4,
four searches of 1024 for eight 4.9, rows of blocks 2.1, chosen keys 3.3, their logits and maximum
2.9, weights and values 1.6, the result 1.2. Weighed: heads on the partitions, 70 us; PE not warmed
up meanwhile, 37.5; eight tokens a row, four gathers, 38.7; values cleared in larger pieces, 36.9.
Two cores for a head would save about 4 us, and meet twice, 2 us each.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.cores import share
from nki_kernels.common.queues import fetch, move
from nki_kernels.common.spans import spans
from nki_kernels.decode.caches import Cache
from nki_kernels.decode.lanes import load_columns
from nki_kernels.decode.selection import search
from nki_kernels.decode.table import Table
from nki_kernels.decode.upright import Upright, clear
from nki_kernels.decode.worth import Worth

PARTITIONS = 128

WARM_UP = 9
"""Matmuls of 512 columns, 0.43 us each while PE is cold."""

CLEARED = 4
"""Tokens of each row whose values are cleared at a time, 0.33 us."""


@nki.jit
def decode_single(
    q_t, index, kept, gates, place, table, moves, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win,
    apart: tuple, near_rows: int, length: int, ratio: int, size: int, chosen: int, blocks: int,
    initial: int, scale: float,
):  # fmt: skip
    """o [B, Hkv, G, DV] in q's dtype; see the module's docstring.

    Args:
        q_t: [B, Hkv, DK, G].
        index: [B, 128, tiles + 1] int32: row of the pool on each partition, for each 128 rows of
            the compressed branch, then for the window. kept: [B, 128, tiles * t + t] int32,
            -1 for tokens that the query sees, else 0, of both alike.
        gates: [B, Hkv, G, 3] float32.
        place: [B, 128, 4] float32, on each partition: the query's own block (negative: none), last
            block before the local ones; of the chosen row there, which part of its block it is,
            times the rows to the block's next, and 1 + the query's position less the tokens of the
            block before it.
        table: [B, 128, slots] float32, first rows in k_slc of `slots` neighbouring blocks.
        moves: [2, 128, 128] float32: 1 at [p, p + 1], and at [127, 0].
        k_cmp, ...: pools, see `caches`; apart: of cmp, slc and win.
        near_rows: of the window. length, ratio: l / d and m / d. size: m. chosen: n.
        blocks: of a table.
    """
    batch, kv_heads, _, group = q_t.shape
    o = nl.ndarray((batch, kv_heads, group, v_cmp.shape[-1]), q_t.dtype, buffer=nl.shared_hbm)
    first, count = share(batch * kv_heads)
    items = []
    for item in range(first, first + count):
        b, h = item // kv_heads, item % kv_heads
        own = Single(q_t[b, h], index[b], kept[b], gates[b, h], place[b], table[b], scale)
        own.far = Cache(k_cmp, v_cmp, apart[0], h, 1)
        own.chosen = Cache(k_slc, v_slc, apart[1], h, 1)
        own.near = Cache(k_win, v_win, apart[2], h, 1)
        own.near_rows, own.count, own.tiles = near_rows, chosen, index.shape[2] - 1
        own.worth = Worth(own.tiles, own.far.tokens, length, ratio, blocks)
        if len(items) == 0:
            own.warm_up()
        own.load()
        own.prepare(moves, initial, blocks, size)
        own.out = o[b, h]
        items.append(own)
    for own in items:
        own.score_far()
        own.rank()
        own.gather()
        own.sum_known()
        own.finish()
    return o


class Single(nl.NKIObject):
    """A kv head of a sequence. Arguments as of `decode_single`, its part of each."""

    def __init__(self, q_t, index, kept, gates, place, table, scale):
        self.given = (index, place, kept, gates, table)
        self.q_t, self.scale, self.dtype = q_t, scale, q_t.dtype
        self.group = q_t.shape[1]

    def load(self):
        """What is known, and the gathers that hang on it."""
        loaded = []
        for source in self.given:
            target = sbuf(source.shape, source.dtype)
            move(target, source, "" if len(loaded) == 0 else "a")
            loaded.append(target)
        self.index, self.place, self.kept, self.gates, self.first_rows = loaded
        self.columns = load_columns(self.q_t)
        self.far_k, self.far_v = [], []
        near = self.index[0 : self.near_rows, self.tiles : self.tiles + 1]
        for i in range(self.tiles):
            self.far_k.append(self.far.gather(self.far.k, self.index[:, i : i + 1]))
        self.near_k = self.near.gather(self.near.k, near)
        for i in range(self.tiles):
            self.far_v.append(self.far.gather(self.far.v, self.index[:, i : i + 1]))
        self.near_v = self.near.gather(self.near.v, near)
        self.shown = sbuf(self.kept.shape, nl.uint8)
        nisa.tensor_scalar(self.shown, self.kept, nl.not_equal, 0)
        self.uncleared, tokens = [], self.far.tokens
        for i in range(self.tiles):
            self.leave(self.far_v[i][:, :, 0, :], self.kept[:, i * tokens : (i + 1) * tokens])
        bits = self.kept[0 : self.near_rows, self.tiles * tokens :]
        before = len(self.uncleared)
        self.leave(self.near_v[:, :, 0, :], bits)
        self.near_pieces = len(self.uncleared) - before

    def warm_up(self):
        """PE runs at half its rate until it has been busy for 4.6 us: it multiplies something while
        keys are on their way."""
        some = sbuf((PARTITIONS, 512), self.dtype)
        nisa.memset(some, 0.0)
        for _ in range(WARM_UP // (2 if self.dtype == nl.float32 else 1)):
            nisa.nc_matmul(psum((PARTITIONS, 512)), some[:, 0:PARTITIONS], some, accumulate=False)

    def prepare(self, moves, initial, blocks, size):
        """What hangs on no key, while keys are on their way."""
        self.ones, self.unit = sbuf((128, 128), nl.float32), sbuf((PARTITIONS, 1), self.dtype)
        nisa.memset(self.ones, 1.0)
        nisa.memset(self.unit, 1.0)
        zeros = sbuf((PARTITIONS, 512), nl.bfloat16)
        nisa.memset(zeros, 0.0)
        tokens, group = self.chosen.tokens, self.group
        self.table = Table(self.first_rows, blocks, size, tokens, self.place, self.ones)
        rows = self.count * self.table.per_block
        self.far_heads = Upright(
            self.columns, group, PARTITIONS, self.tiles * self.far.tokens, zeros
        )
        self.near_heads = Upright(self.columns, group, self.near_rows, self.near.tokens, zeros)
        self.heads = Upright(self.columns, group, rows, tokens, zeros)
        self.worth.prepare(self.place, moves, initial)

    def score_far(self):
        """Logits of the compressed branch, less the largest."""
        tokens = self.far.tokens
        for i in range(self.tiles):
            shown = self.shown[:, i * tokens : (i + 1) * tokens]
            self.far_heads.score(self.far_k[i][:, :, 0, :], shown, i * tokens, False)
        self.far_heads.drain()
        self.far_heads.find_tops()
        self.use_gap()
        self.far_heads.shift(self.use_gap)

    def use_gap(self):
        """VectorE has to wait for another engine: it clears some of the known values meanwhile."""
        if len(self.uncleared) > 0:
            v, bits = self.uncleared[0]
            clear(v, bits)
            self.uncleared = self.uncleared[1:]

    def leave(self, v, bits):
        """Values [rows, t, DV] are cleared by and by."""
        for first, count in spans(v.shape[1], CLEARED):
            tokens = slice(first, first + count)
            self.uncleared.append((v[:, tokens], bits[:, tokens]))

    def clear_rest(self, kept):
        """All but the last `kept` pieces."""
        while len(self.uncleared) > kept:
            self.use_gap()

    def rank(self):
        """What blocks are worth, in a row; PE then has the known branches to do."""
        values = self.far_heads.values
        self.ranks = self.worth.find(values, self.scale, self.ones, self.use_gap)
        self.clear_rest(self.near_pieces)
        self.start_known()

    def start_known(self):
        """What PE and ScalarE do for the known branches while VectorE ranks."""
        far, tokens = self.far_heads, self.far.tokens
        self.near_heads.score(self.near_k[:, :, 0, :], None, 0, True)
        self.near_heads.drain()
        far.weigh(self.dtype, self.scale)
        far.sum_weights(self.unit)
        for i in range(self.tiles):
            far.add(self.far_v[i][:, :, 0, :], i * tokens)

    def gather(self):
        """Asks for the keys and values of the blocks that are worth most."""
        numbers, best = search(self.ranks, self.count)
        index = self.table.look_up(numbers, best)
        self.k = self.chosen.gather(self.chosen.k, index)
        self.v = self.chosen.gather(self.chosen.v, index)
        self.chosen_shown, self.bits = self.table.seen()

    def sum_known(self):
        """The compressed branch and the window, while chosen keys are on their way."""
        near, far = self.near_heads, self.far_heads
        shown = self.shown[0 : self.near_rows, self.tiles * self.far.tokens :]
        near.hide(near.bank, shown, 0)
        near.find_tops()
        self.use_gap()
        far.find_factor(self.gates[:, 0:1])
        self.known = far.gated([], nl.float32)
        near.shift(self.use_gap)
        self.clear_rest(0)
        near.weigh(self.dtype, self.scale)

    def finish(self):
        """The selected branch, and the result."""
        k, v = self.k[:, :, 0, :], self.v[:, :, 0, :]
        heads, near = self.heads, self.near_heads
        self.leave(v, self.bits)
        heads.score(k, self.chosen_shown, 0, False)
        heads.drain()
        heads.find_tops()
        self.use_gap()
        heads.shift(self.use_gap)
        near.sum_weights(self.unit)
        near.add(self.near_v[:, :, 0, :], 0)
        heads.weigh(self.dtype, self.scale)
        self.clear_rest(0)
        near.find_factor(self.gates[:, 2:3])
        heads.sum_weights(self.unit)
        heads.add(v, 0)
        total = near.gated([self.known], nl.float32)
        heads.find_factor(self.gates[:, 1:2])
        fetch(self.out, heads.gated([total], self.dtype))
