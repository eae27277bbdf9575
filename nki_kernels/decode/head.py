"""One kv head of a sequence: from gathered rows to its result."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import sbuf
from nki_kernels.decode.caches import Cache
from nki_kernels.decode.ranking import Ranking
from nki_kernels.decode.spread import Cleared, Lanes, Spread
from nki_kernels.decode.turned import Turned, gather_keys

PARTITIONS = 128


class Head(nl.NKIObject):
    """A kv head.

    Args:
        sequence: a `single.Sequence`, whose gathers are under way. h: number of the head; number:
            among those of the sequence that this core has.
    """

    def __init__(self, sequence, h, number):
        call, constants = sequence.call, sequence.call.constants
        self.sequence, self.call, self.constants = sequence, call, constants
        self.place, self.number = sequence.place, number
        self.queries, self.gates = sequence.queries[:, number], sequence.gates[:, number]
        self.chosen = Cache(call.slc[0], call.slc[1], call.slc[2], h, 1)
        self.out = sequence.out[h]
        lanes = []
        for tokens in (call.far_tokens, call.near_tokens, call.chosen_tokens):
            lanes.append(Lanes(tokens, call.heads, call.pitch, constants.same, constants.apart))
        self.far = Spread(lanes[0], PARTITIONS, call.tiles, nl.float32)
        self.near = Spread(lanes[1], PARTITIONS, 1, call.dtype)
        self.heads = Spread(lanes[2], call.rows[1], 1, call.dtype)
        self.ranking = Ranking(call.chosen, sequence.of_parts, constants, lanes[0].count)
        self.far_k, self.far_v = [], []
        for i in range(call.tiles):
            self.far_k.append(sequence.far[i].keys(h, number))
            self.far_v.append(sequence.far[i].values(h, number))
        self.near_k = sequence.near.keys(h, number)
        self.near_v = sequence.near.values(h, number)

    def score_far(self):
        """Logits of the compressed branch."""
        far = self.far
        count = far.lanes.count
        for i in range(self.call.tiles):
            self.far_k[i].turn(False)
            bank = far.score(self.far_k[i], self.queries)
            far.hide(i, bank, self.constants.zero[0:count], self.place.seen[0:count, i : i + 1])

    def weigh_far(self):
        """Its weights."""
        self.far.find_top()
        self.far.weigh(self.call.scale)

    def score_near(self):
        """Logits of the window, while VectorE waits for ScalarE."""
        near = self.near
        count = near.lanes.count
        self.near_k.turn(False)
        bank = near.score(self.near_k, self.queries)
        near.hide(0, bank, self.place.low[0:count], self.place.high[0:count])

    def weigh_near(self):
        """Its weights."""
        self.near.find_top()
        self.near.weigh(self.call.scale)

    def add_up(self):
        """What the compressed branch gives blocks."""
        self.far.add_up()
        self.by_row = self.ranking.find_worth(self.far, self.call.length)

    def clear(self):
        """Values that are there already, and the worth of blocks in parts."""
        for i in range(self.call.tiles):
            self.sequence.far[i].clear(self.number)
        self.ranking.in_parts(self.by_row)

    def turn(self):
        """Weights for those values."""
        self.turned = []
        for i in range(self.call.tiles):
            self.turned.append(self.far.turn(i, self.call.dtype, True))

    def find(self):
        """Candidates among the blocks."""
        self.ranking.find_candidates()

    def rank(self):
        """Their ranks."""
        self.ranking.rank()

    def gather(self):
        """Asks for the keys and values of the chosen ones."""
        ranking, cache = self.ranking, self.chosen
        last = cache.k.shape[0] - 1 - cache.first_head * cache.apart
        index = ranking.pick(self.place.later[0 : self.call.rows[1]], last)
        raw = gather_keys(cache, cache.k, index, self.call.by_dma)
        self.k = Turned(cache, raw, index.shape[0], self.call.by_dma)
        self.v = cache.gather(cache.v, index)

    def see(self):
        """Which tokens of the chosen rows the query sees."""
        heads, rows = self.heads, self.call.rows[1]
        lanes, size = heads.lanes, -float(self.call.size)
        numbers, by_row = self.ranking.number(lanes.count)
        before = sbuf((lanes.count, rows), nl.float32)
        nisa.scalar_tensor_tensor(
            before, numbers, nl.multiply, size, nl.add, self.constants.behind[0 : lanes.count, :]
        )
        self.shown = sbuf((lanes.count, rows, lanes.each), nl.uint8)
        nisa.tensor_tensor(
            self.shown, before.expand_dim(2).broadcast(2, lanes.each),
            self.place.token[0 : lanes.count].expand_dim(1).broadcast(1, rows), nl.greater,
        )  # fmt: skip
        left, kept = sbuf((rows, 1), nl.float32), sbuf((rows, lanes.tokens), nl.float32)
        nisa.scalar_tensor_tensor(left, by_row, nl.multiply, size, nl.add, self.place.left[0:rows])
        nisa.tensor_scalar(kept, self.constants.token[0:rows, :], nl.less, left)
        self.cleared = Cleared(self.v, kept, False)

    def add_far(self):
        """The compressed branch, while chosen keys are on their way."""
        near, far = self.near, self.far
        self.sequence.near.clear(self.number)
        for i in range(self.call.tiles):
            far.add(self.turned[i], self.far_v[i])
        near.add_up()
        self.near_turned = near.turn(0, self.call.dtype, True)
        self.so_far = far.gated(self.gates[:, 0:1], [], nl.float32)

    def score(self):
        """Logits of the selected branch."""
        heads = self.heads
        self.k.turn(False)
        bank = heads.score(self.k, self.queries)
        self.near.add(self.near_turned, self.near_v)
        heads.hide_by(0, bank, self.shown.reshape((heads.lanes.count, heads.columns)))

    def weigh(self):
        """Its weights."""
        self.heads.find_top()
        self.heads.weigh(self.call.scale)
        self.cleared.clear()
        self.turned = self.heads.turn(0, self.call.dtype, True)

    def add(self):
        """The result."""
        heads = self.heads
        known = self.near.gated(self.gates[:, 2:3], [self.so_far], nl.float32)
        heads.add_up()
        heads.add(self.turned, self.v[:, :, 0, :])
        nisa.dma_copy(self.out, heads.gated(self.gates[:, 1:2], [known], self.call.dtype))


def run_all(heads):
    """All steps of some heads. Engines work in order: what one head does fills the time for which
    another waits."""
    for own in heads:
        own.score_far()
    for own in heads:
        own.weigh_far()
    for own in heads:
        own.score_near()
    for own in heads:
        own.weigh_near()
    for own in heads:
        own.add_up()
    for own in heads:
        own.clear()
    for own in heads:
        own.turn()
    for own in heads:
        own.find()
    for own in heads:
        own.rank()
    for own in heads:
        own.gather()
    for own in heads:
        own.see()
    for own in heads:
        own.add_far()
    for own in heads:
        own.score()
    for own in heads:
        own.weigh()
    for own in heads:
        own.add()
