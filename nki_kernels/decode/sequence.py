"""A sequence of decode: its branches, what its blocks are worth, and the gated sum."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import sbuf
from nki_kernels.common.queues import fetch
from nki_kernels.common.spans import spans
from nki_kernels.decode.branch import Branch
from nki_kernels.decode.caches import Cache
from nki_kernels.decode.chosen import Chosen
from nki_kernels.decode.lanes import load_columns
from nki_kernels.decode.selection import BANK, importance, preference, shared_weights
from nki_kernels.decode.turned import load_chunks, may_turn

AHEAD = 52_000
"""Bytes of a partition for keys, or values, of a branch that are not needed yet."""


class Sequence(nl.NKIObject):
    """New tokens of a sequence for some kv heads: rows, and the gated sum of their branches.

    own: q^T, numbers, o, index, kept, place of it.
    """

    def __init__(self, call, own, head):
        self.call, self.own, self.head = call, own, head
        self.total = []

    def cache(self, which):
        """The pools of a branch: 0 compressed, 1 selected, 2 window."""
        call = self.call
        k, v = call.pools[2 * which], call.pools[2 * which + 1]
        return Cache(k, v, call.apart[which], self.head, call.lanes.heads)

    def load(self):
        """What is known of the sequence."""
        q_t, numbers, _, index, kept, place = self.own
        self.index, self.kept = sbuf(index.shape, nl.int32), sbuf(kept.shape, kept.dtype)
        self.numbers, self.place = sbuf(numbers.shape, nl.float32), sbuf(place.shape, nl.float32)
        fetch(self.index, index)
        self.by_dma = may_turn((self.cache(0), self.cache(1), self.cache(2)))
        for _, rows in spans(self.call.chosen_rows, self.call.block_rows):
            self.by_dma = self.by_dma and rows % 16 == 0
        self.columns = load_chunks(q_t) if self.by_dma else load_columns(q_t)
        fetch(self.numbers, numbers)
        fetch(self.place, place)
        fetch(self.kept, kept)
        self.far = Branch(self, self.cache(0), 0, 0, 0, self.call.rows[0])
        tiles, tokens = len(self.far.tiles), self.far.cache.tokens
        self.near = Branch(
            self, self.cache(2), tiles, tiles * tokens, 2 * tokens, self.call.rows[1]
        )
        self.chosen = Chosen(self, self.cache(1))
        self.ranked = preference(self.place, self.call.blocks, self.call.initial)

    def gather_keys(self):
        self.far.gather_keys(AHEAD)
        self.near.gather_keys(AHEAD)

    def gather_values(self):
        self.far.gather_values(AHEAD)
        self.near.gather_values(AHEAD)

    def score_near(self):
        self.near.score(0, len(self.near.tiles))
        self.far.flush()
        self.near.flush()

    def start_ranking(self):
        """Room for exponentials of the compressed branch in the order of its keys."""
        call = self.call
        keys = self.far.keys
        before, columns = call.length - 1, max(keys, call.ratio * call.blocks)
        self.ordered = sbuf((call.lanes.rows, before + columns), nl.float32)
        if before > 0:
            nisa.memset(self.ordered[:, 0:before], 0.0, engine=nisa.engine.gpsimd)
        if columns > keys:
            nisa.memset(self.ordered[:, before + keys :], 0.0, engine=nisa.engine.gpsimd)
        self.far.scores.shift_by_maximum(call.scale)

    def order(self, i):
        """Exponentials of tile i of the compressed branch, in the order of its keys."""
        before = self.call.length - 1
        ordered = self.ordered[:, before : before + self.far.keys]
        self.far.order(i, ordered, self.call.scale)

    def exponentiate(self):
        """Weights of the compressed branch and the window."""
        dtype, scale = self.own[0].dtype, self.call.scale
        for i in range(len(self.far.tiles)):
            self.far.scores.weigh(i, dtype, scale, False)
        self.exponentiate_near()

    def exponentiate_near(self):
        near = self.near.scores
        near.shift_by_maximum(self.call.scale)
        for i in range(len(self.near.tiles)):
            near.weigh(i, self.own[0].dtype, self.call.scale, True)
        near.invert()

    def rank(self):
        """What blocks are worth."""
        call = self.call
        self.far.scores.invert()
        shares = shared_weights(call.owners, self.far.scores.inverse, call.length, call.ratio)
        for first, count in spans(call.blocks, BANK):
            found = importance(shares, self.ordered, 1 - call.length, first, count, call.ratio)
            part = self.ranked[:, first : first + count]
            nisa.tensor_tensor(part, part, found, nl.add)
        self.ordered = None

    def clear_values(self):
        """Of the compressed branch and the window."""
        self.far.clear_values()
        self.near.clear_values()

    def weigh_far(self, first_tile, count):
        """Some tiles of the compressed branch."""
        self.far.sum_values(first_tile, count)
        if count > 0 and first_tile + count == len(self.far.tiles):
            self.far_sum = self.far.sum.finish()

    def weigh_near(self):
        """The window."""
        self.near.sum_values(0, len(self.near.tiles))
        self.near_sum = self.near.sum.finish()

    def add_known(self):
        """The gated sum of both."""
        self.add(self.far.scores, self.far_sum, 0)
        self.add(self.near.scores, self.near_sum, 2)

    def add(self, scores, out, which):
        """Adds a branch whose exponentials are made and whose values are summed."""
        factor = sbuf((self.call.lanes.rows, 1), nl.float32)
        total = sbuf(out.shape, nl.float32)
        gate = self.numbers[:, which : which + 1]
        nisa.tensor_tensor(factor, scores.inverse, gate, nl.multiply)
        if len(self.total) == 0:
            nisa.tensor_scalar(total, out, nl.multiply, factor)
        else:
            nisa.scalar_tensor_tensor(total, out, nl.multiply, factor, nl.add, self.total[0])
        self.total = [total]

    def store(self):
        """Adds the selected branch, and writes the result."""
        self.add(self.chosen.scores, self.chosen.sum, 1)
        out = sbuf(self.total[0].shape, self.own[2].dtype)
        nisa.tensor_copy(out, self.total[0])
        fetch(self.own[2], out)
