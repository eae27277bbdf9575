"""Decode of one new token of one kv head on a core: the shortest chain of steps.

Dimensions: G query heads <= 128, Dk, Dv <= 256; pools in rows of t tokens, see `caches`: t_cmp a
multiple of m / d, G * t a bank of PSUM at most, chosen blocks in at most 128 rows.
Layout: keys on partitions, see `upright`. A core that has one kv head only cannot fill its
partitions with heads, as `kernel.decode` does, and is bound by the chain of its steps, not by any
engine: DMAs that wait for one another, and engines that hand on.

    index -> gather K_cmp, K_win, V_win, V_cmp
    compressed   S^T = K q by PE, as tiles of 128 rows arrive; hide; less the maximum; exp
    importance   sum over heads and overlapping blocks, on the partition of the keys; the last keys
                 of a partition come to the next one by a matmul with a shifted identity
    selection    turned to one row, the n best by rounds of 8, lowest number on ties
    selected     first rows of chosen blocks from a table in SBUF: partitions compare the numbers
                 with their own, a matmul adds up what one of them finds; gather; S^T, exp
    each branch  o = sum of weights * V by PE; the window and the compressed branch while the chosen
                 keys are on their way
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
from nki_kernels.decode.selection import FORCED, NONE, search
from nki_kernels.decode.upright import Upright, clear

PARTITIONS = 128

WARM_UP = 9
"""Matmuls of 512 columns, 0.43 us each while PE is cold."""

CLEARED = 4
"""Tokens of each row whose values are cleared at a time, 0.33 us."""

APART = 32
"""Partitions from one at which engines begin to read or write to the next such."""

NOWHERE = 1.0e7
"""Added to the number of a block that is none: all its tokens lie behind every query."""


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
    for item in range(first, first + count):
        b, h = item // kv_heads, item % kv_heads
        own = Single(q_t[b, h], index[b], kept[b], gates[b, h], place[b], table[b], scale)
        own.far = Cache(k_cmp, v_cmp, apart[0], h, 1)
        own.chosen = Cache(k_slc, v_slc, apart[1], h, 1)
        own.near = Cache(k_win, v_win, apart[2], h, 1)
        own.set_sizes(near_rows, length, ratio, size, chosen, blocks)
        own.load()
        own.prepare(moves, initial)
        own.score_far()
        worth = own.importance()
        ranked = own.in_a_row(worth)
        own.clear_rest(own.near_pieces)
        own.start_known()
        rows = own.look_up(ranked)
        k, v = own.chosen.gather(k_slc, rows), own.chosen.gather(v_slc, rows)
        own.see(k.shape[0], k.shape[1])
        own.sum_known()
        own.finish(k[:, :, 0, :], v[:, :, 0, :], o[b, h])
    return o


class Single(nl.NKIObject):
    """A kv head of a sequence. Arguments as of `decode_single`, its part of each."""

    def __init__(self, q_t, index, kept, gates, place, table, scale):
        self.given = (index, place, kept, gates, table)
        self.q_t, self.scale, self.dtype = q_t, scale, q_t.dtype
        self.group = q_t.shape[1]

    def set_sizes(self, near_rows, length, ratio, size, chosen, blocks):
        self.near_rows, self.length, self.ratio, self.size = near_rows, length, ratio, size
        self.count, self.blocks = chosen, blocks
        self.tiles = self.given[0].shape[1] - 1
        self.per_row = self.far.tokens // ratio  # blocks
        self.before = length - 1
        # Blocks may be chosen that have no compressed key yet.
        of_tile = PARTITIONS * self.per_row
        self.ranked = max(self.tiles, (blocks + of_tile - 1) // of_tile)
        self.per_block = size // self.chosen.tokens

    def load(self):
        """What is known, and the gathers that hang on it."""
        loaded = []
        for source in self.given:
            target = sbuf(source.shape, source.dtype)
            move(target, source, "" if len(loaded) == 0 else "a")
            loaded.append(target)
        self.index, self.place, self.kept, self.gates, self.table = loaded
        self.columns = load_columns(self.q_t)
        self.warm_up()
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

    def prepare(self, moves, initial):
        """Constants, while keys are on their way."""
        self.shift, self.corner = sbuf((128, 128), nl.float32), sbuf((128, 128), nl.float32)
        fetch(self.shift, moves[0], "a")
        fetch(self.corner, moves[1], "a")
        self.ones = sbuf((PARTITIONS, PARTITIONS), nl.float32)
        nisa.memset(self.ones, 1.0)
        self.unit = sbuf((PARTITIONS, 1), self.dtype)
        nisa.memset(self.unit, 1.0)
        slots = self.table.shape[1]
        self.slots, self.places = counted(slots, 0), counted(self.chosen.tokens, 0)
        self.first_block = counted(1, slots)
        self.shares = sbuf((PARTITIONS, self.ranked, self.before + self.far.tokens), nl.float32)
        nisa.memset(self.shares, 0.0)
        group, of_blocks = self.group, (self.count * self.per_block, self.chosen.tokens)
        self.far_heads = Upright(self.columns, group, PARTITIONS, self.tiles * self.far.tokens)
        self.near_heads = Upright(self.columns, group, self.near_rows, self.near.tokens)
        self.heads = Upright(self.columns, group, of_blocks[0], of_blocks[1])
        self.prefer(initial)

    def prefer(self, initial):
        """`FORCED` for blocks that are chosen anyway, `NONE` for those behind the query's own."""
        shape = (PARTITIONS, self.ranked, self.per_row)
        number, hidden = sbuf(shape, nl.float32), sbuf(shape, nl.float32)
        self.preference = sbuf(shape, nl.float32)
        nisa.iota(
            number, [[PARTITIONS * self.per_row, self.ranked], [1, self.per_row]], offset=0,
            channel_multiplier=self.per_row,
        )  # fmt: skip
        nisa.tensor_scalar(
            self.preference, number, nl.greater, self.place[:, 1:2], op1=nl.multiply,
            operand1=FORCED,
        )  # fmt: skip
        nisa.tensor_scalar(
            hidden, number, nl.greater, self.place[:, 0:1], op1=nl.multiply, operand1=NONE
        )
        nisa.tensor_scalar(
            number, number, nl.less, float(initial), op1=nl.multiply, operand1=FORCED
        )
        nisa.tensor_tensor(self.preference, self.preference, number, nl.maximum)
        nisa.tensor_tensor(self.preference, self.preference, hidden, nl.add)

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

    def share_out(self):
        """What the heads together give each compressed key, behind what the one before it had."""
        group, values, tokens = self.group, self.far_heads.values, self.far.tokens
        shares, sums = sbuf(values.shape, nl.float32), sbuf((PARTITIONS, group), nl.float32)
        nisa.activation(shares, nl.exp, values, scale=self.scale)
        self.use_gap()
        self.use_gap()
        nisa.tensor_reduce(sums, nl.add, shares, axis=2)
        self.use_gap()
        total, inverse = psum((PARTITIONS, group)), sbuf((PARTITIONS, group), nl.float32)
        nisa.nc_matmul(total, self.ones, sums, accumulate=False)
        nisa.reciprocal(inverse, total)
        own = shares[:, :, 0 : self.tiles * tokens]
        nisa.tensor_tensor(own, own, inverse.expand_dim(2).broadcast(2, own.shape[2]), nl.multiply)
        for i in range(self.tiles):
            by_key = own[:, :, i * tokens : (i + 1) * tokens].permute((0, 2, 1))
            nisa.tensor_reduce(self.shares[:, i, self.before :], nl.add, by_key, axis=2)
        if self.before > 0:
            self.fetch_neighbours()

    def fetch_neighbours(self):
        """The last shares of a partition come before those of the next one."""
        halo = psum((PARTITIONS, self.ranked, self.before))
        last = self.shares[:, :, self.far.tokens :]
        nisa.nc_matmul(halo, self.shift, last, accumulate=False)
        if self.ranked > 1:
            nisa.nc_matmul(
                halo[:, 1:, :], self.corner, last[:, 0 : self.ranked - 1, :], accumulate=True
            )
        self.use_gap()
        nisa.tensor_copy(self.shares[:, :, 0 : self.before], halo)

    def importance(self):
        """[128, ..., blocks of a row], with `preference`: overlapping keys count as often as they
        share strides with a block, see `selection.shared_weights`.

        Tiles lie `APART` apart, so that as partitions they are where engines can begin to read.
        """
        self.share_out()
        group = min(self.ranked, PARTITIONS // APART)
        found = []
        for first, count in spans(self.ranked, group):
            tiles = slice(first, first + count)
            apart = sbuf((PARTITIONS, (count - 1) * APART + 1, self.per_row), nl.float32)
            if count > 1:
                nisa.memset(apart, 0.0, engine=nisa.engine.gpsimd)
            own, last = apart[:, 0 : (count - 1) * APART + 1 : APART, :], self.preference[:, tiles]
            for offset in range(1 - self.length, self.ratio):
                times = min(offset + self.length, self.ratio) - max(offset, 0)
                start = offset + self.before
                end = start + self.ratio * (self.per_row - 1) + 1
                part = self.shares[:, tiles, start : end : self.ratio]
                nisa.scalar_tensor_tensor(own, part, nl.multiply, float(times), nl.add, last)
                last = own
            found.append(apart)
        return found

    def in_a_row(self, worth):
        """[1, blocks] of `importance`, exactly."""
        columns, half = PARTITIONS * self.per_row, (self.per_row + 1) // 2
        row = sbuf((1, self.ranked, PARTITIONS, self.per_row), nl.float32)
        first = 0
        for apart in worth:
            # Two banks, which two engines may read at a time.
            for j, count in spans(self.per_row, half):
                bank = psum((apart.shape[1], PARTITIONS, count))
                for i in range(count):
                    part = apart[:, :, j + i]
                    nisa.nc_transpose(bank[:, :, i], part, engine=nisa.engine.tensor)
                self.use_gap()
                engine = nisa.engine.scalar if j == 0 else nisa.engine.vector
                for place in range(0, apart.shape[1], APART):
                    into = row[:, first + place // APART, :, j : j + count]
                    nisa.tensor_copy(into, bank[place : place + 1], engine=engine)
            first += (apart.shape[1] - 1) // APART + 1
        return row.reshape((1, self.ranked * columns))

    def start_known(self):
        """What PE and ScalarE do for the known branches while VectorE ranks."""
        far, tokens = self.far_heads, self.far.tokens
        self.near_heads.score(self.near_k[:, :, 0, :], None, 0, True)
        self.near_heads.drain()
        far.weigh(self.dtype, self.scale)
        far.sum_weights(self.unit)
        for i in range(self.tiles):
            far.add(self.far_v[i][:, :, 0, :], i * tokens)

    def look_up(self, ranked):
        """Rows of the chosen blocks [rows, 1] int32; makes `numbers`, of each row its block's."""
        chosen, slots, rows = self.count, self.table.shape[1], self.count * self.per_block
        numbers, best = search(ranked, chosen)
        at, everywhere = sbuf((1, chosen), nl.float32), psum((PARTITIONS, chosen))
        # A row of NaN matches nothing: its numbers are any, but must be some block's.
        nisa.tensor_scalar(at, numbers, nl.minimum, float(self.blocks - 1))
        nisa.nc_matmul(everywhere, self.ones[0:1, :], at, accumulate=False)
        own = sbuf((PARTITIONS, chosen, slots), nl.float32)
        nisa.scalar_tensor_tensor(
            own, everywhere.expand_dim(2).broadcast(2, slots), nl.subtract, self.first_block,
            nl.equal, self.slots.expand_dim(1).broadcast(1, chosen),
        )  # fmt: skip
        nisa.tensor_tensor(own, own, self.table.expand_dim(1).broadcast(1, chosen), nl.multiply)
        first = sbuf((PARTITIONS, chosen), nl.float32)
        nisa.tensor_reduce(first, nl.add, own, axis=2)
        bank, index = psum((rows, 1)), sbuf((rows, 1), nl.int32)
        nisa.nc_matmul(bank, by_row(first, self.per_block), self.ones[:, 0:1], accumulate=False)
        nisa.tensor_tensor(index, bank, self.place[0:rows, 2:3], nl.add)
        # NOWHERE for what is no block: its tokens lie behind every query.
        there = sbuf((1, chosen), nl.float32)
        nisa.tensor_scalar(there, best, nl.less, 0.0, op1=nl.multiply, operand1=NOWHERE)
        nisa.tensor_tensor(there, there, at, nl.add)
        self.numbers = psum((rows, 1))
        nisa.nc_matmul(
            self.numbers, by_row(there, self.per_block), self.ones[0:1, 0:1], accumulate=False
        )
        return index

    def see(self, rows, tokens):
        """Which tokens of chosen rows the query sees."""
        left = sbuf((rows, 1), nl.float32)
        self.chosen_shown, self.bits = (
            sbuf((rows, tokens), nl.uint8),
            sbuf((rows, tokens), nl.int32),
        )
        nisa.scalar_tensor_tensor(
            left, self.numbers, nl.multiply, -float(self.size), nl.add, self.place[0:rows, 3:4]
        )
        nisa.tensor_scalar(self.chosen_shown, self.places[0:rows, :], nl.less, left)
        nisa.tensor_scalar(self.bits, self.chosen_shown, nl.multiply, -1)

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

    def finish(self, k, v, o):
        """The selected branch, and the result."""
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
        fetch(o, heads.gated([total], o.dtype))


def counted(count, each):
    """0 .. count - 1 on each partition, and `each` times its number: [128, count] float32."""
    found = sbuf((PARTITIONS, count), nl.float32)
    nisa.iota(found, [[1, count]], offset=0, channel_multiplier=each)
    return found


def by_row(x, rows):
    """[P, n] with each column `rows` times."""
    return x.expand_dim(2).broadcast(2, rows)
