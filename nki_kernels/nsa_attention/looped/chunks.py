"""The compressed branch of a pair of tiles: an inner hardware loop over chunks of keys.

A turn has CHUNK tiles of keys against two tiles of queries, 16 jobs as in `compressed`. Keys and
values come by GRANULE tiles, packed so that each run-time address moves much; the products of the
last jobs of a turn are made in the next one, from tensors that both share, so that PE does not wait
at the loop's edge. Sums of P @ [v | 1] are those of a turn in PSUM, of all in SBUF. Shares go to
HBM, where they wait until the rows' sums are known; beside them the shares of the pair before are
read, summed over heads and written as scores (`scores`).
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.queues import fetch
from nki_kernels.nsa_attention.choose import HIDDEN
from nki_kernels.nsa_attention.compressed import upper_halves
from nki_kernels.nsa_attention.geometry import KEYS, QUERIES, STRIDE
from nki_kernels.nsa_attention.looped.sizes import (
    CHUNK,
    GRANULE,
    GRANULES,
    PAIR,
    SHARES,
)
from nki_kernels.nsa_attention.work import COMPRESSED, multiply_keys

LAG = 2  # jobs between the scores of a tile of keys and its product with values
JOBS = PAIR * CHUNK


class Chunks(nl.NKIObject):
    """The inner loop.

    Attributes:
        granules: keys and values [128, columns] of the halves of a chunk.
        carried: (P^T float32, its lower halves bfloat16) of the last LAG jobs of a turn.
        stages: shares [rows, pair, parts, GRANULE, SHARES] of either half of a chunk.
        row_sums: [rows, pair, parts] float32. sums: [rows, parts, DV + 1] float32 of each tile.
        hide: bfloat16 [32, CHUNK * 128] of each tile: what is added where a query sees no key.
    """

    def __init__(self, geometry, constants, lane, scale):
        g = self.geometry = geometry
        self.constants, self.lane, self.scale = constants, lane, scale
        dtype = lane.chunks.dtype
        self.dv = lane.v_win.shape[1] - 1
        self.wide = lane.q_t.shape[1] > 128
        self.granules, self.stages, self.hide = [], [], []
        for _ in range(GRANULES):
            self.granules.append(sbuf((KEYS, lane.chunks.shape[3]), dtype))
            stage = sbuf((g.rows, PAIR, g.parts, GRANULE, SHARES), nl.float32)
            nisa.memset(stage, 0.0)
            self.stages.append(stage)
        nisa.memset(self.granules[GRANULES - 1], 0.0)
        self.carried = []
        for _ in range(LAG):
            weights = sbuf((KEYS, g.columns), nl.float32)
            self.carried.append([weights, sbuf((KEYS, g.columns), nl.bfloat16)])
        self.row_sums = sbuf((g.rows, PAIR, g.parts), nl.float32)
        self.sums = []
        for _ in range(PAIR):
            self.sums.append(sbuf((g.rows, g.parts, self.dv + 1), nl.float32))
        for _ in range(PAIR):
            self.hide.append(sbuf((QUERIES, CHUNK * KEYS), nl.bfloat16))
        self.keys = sbuf((QUERIES, CHUNK * KEYS), nl.float32)
        nisa.iota(self.keys, [[STRIDE, CHUNK * KEYS]], offset=0, channel_multiplier=0)
        self.same = sbuf((QUERIES, QUERIES), nl.bfloat16)
        nisa.tensor_copy(self.same, constants.same[0:QUERIES, :])
        # What a query sees: keys whose STRIDE * number is at most its position + 1 - l.
        self.place = sbuf((QUERIES, PAIR), nl.float32)
        nisa.iota(self.place, [[QUERIES, PAIR]], offset=1 - g.block, channel_multiplier=1)
        self.limit = sbuf((QUERIES, PAIR), nl.float32)

    def clear(self, works):
        """Behind the pair before, for the next one's first turn, by GpSimd."""
        last = self.stages[GRANULES - 1][:, :, :, :, SHARES - 1]
        for tensor in (*self.carried[0], *self.carried[1], *self.sums, self.row_sums, last):
            nisa.memset(tensor, 0.0, engine=nisa.engine.gpsimd)
        nisa.dma_copy(self.granules[0], self.lane.chunks[0, 0])

    def begin(self, start):
        """The same; start: float32 [32, 1], the pair's first position less that of the first key of
        the first chunk with masks."""
        nisa.tensor_scalar(self.limit, self.place, nl.add, start)
        self.mask()

    def turn(self, j, works, shares, scores, masked):
        """Chunk j; shares: tensors in HBM that the pair's go to; scores: see `scores.Scores`."""
        waiting = []
        for k in range(LAG):
            waiting.append((PAIR * CHUNK - LAG + k, self.carried[k]))
        for k in range(JOBS):
            if k < JOBS - LAG:
                weights = [
                    sbuf((KEYS, self.geometry.columns), nl.float32),
                    sbuf((KEYS, self.geometry.columns), nl.bfloat16),
                ]
            else:
                weights = self.carried[k - (JOBS - LAG)]
            self.weigh(works, k, weights, masked)
            waiting.append((k, weights))
            done, found = waiting.pop(0)
            if k < PAIR:
                self.open(works[k])
            self.add(works, done, found)
            if k >= JOBS - PAIR:
                self.keep(works, done % PAIR)
            if k == LAG - 1:
                fetch(self.granules[1], self.lane.chunks.select(0, j)[1])
                fetch(shares[1].select(0, j), self.stages[1])
                scores.load(j)
            if k == JOBS // 2 + LAG - 1:
                fetch(self.granules[0], self.lane.chunks[1:].select(0, j)[0])
                fetch(shares[0].select(0, j), self.stages[0])
            if k == JOBS - PAIR:
                scores.sum(j)
        if masked:
            self.mask()

    def open(self, work):
        """A tile's sums in PSUM for what follows."""
        work.open(self.geometry, self.constants.zeros, self.dv)

    def keep(self, works, u):
        """Adds them to those in SBUF."""
        keep_sums(works[u], self.sums[u])

    def finish(self, works, shares, last):
        """After the last turn; last: int32 [1, 1] in SBUF, how many chunks there were."""
        for k in range(LAG):
            self.open(works[k % PAIR])
            self.add(works, JOBS - LAG + k, self.carried[k])
        fetch(shares[1].select(0, last), self.stages[1])
        for u in range(PAIR):
            self.keep(works, u)
            works[u].banks = banks_of(self.sums[u])

    def mask(self):
        """`hide` of a chunk, and the limits of the next one."""
        for u in range(PAIR):
            limit = self.limit[:, u : u + 1]
            nisa.tensor_scalar(
                self.hide[u], self.keys, nl.greater, limit, op1=nl.multiply, operand1=-HIDDEN
            )
        nisa.tensor_scalar(self.limit, self.limit, nl.subtract, float(STRIDE * KEYS * CHUNK))

    def weigh(self, works, k, weights, masked):
        """P^T of job k, in float32, and its lower halves."""
        x, u = divmod(k, PAIR)
        granule, at = self.granules[x // GRANULE], x % GRANULE
        work = works[u]
        scores = psum((KEYS, self.geometry.columns))
        low = work.q[0].shape[0]
        lower, upper = granule[0:low, at * KEYS : (at + 1) * KEYS], []
        if self.wide:
            p0, first = 64 * (at % 2), (GRANULE + at // 2) * KEYS
            upper.append(granule[p0 : p0 + work.rest, first : first + KEYS])
        if masked:
            hide = self.hide[u][:, x * KEYS : (x + 1) * KEYS]
            by_row = self.same.expand_dim(2).broadcast(2, self.geometry.group)
            nisa.nc_matmul(
                scores, hide, by_row, accumulate=False, tile_position=(0, 0),
                tile_size=(QUERIES, KEYS),
            )  # fmt: skip
        multiply_keys(scores, work, lower, upper, at % 2, masked)
        bias = work.shifts[:, COMPRESSED : COMPRESSED + 1]
        nisa.activation(weights[0], nl.exp, scores, bias=bias, scale=self.scale)
        nisa.tensor_tensor(weights[1], weights[0], upper_halves(weights[0]), nl.subtract)

    def add(self, works, k, weights):
        """Adds job k to P @ [v | 1]; its shares; behind the last job of a granule its row sums."""
        g = self.geometry
        x, u = divmod(k, PAIR)
        granule, at = self.granules[x // GRANULE], x % GRANULE
        width = self.dv + 1
        first = granule.shape[1] - (GRANULE - at) * width
        values = granule[:, first : first + width]
        if u == 0:
            self.bank = psum((g.rows, PAIR, g.parts, SHARES))
        for p in range(g.parts):
            some = slice(p * g.rows, (p + 1) * g.rows)
            upper = upper_halves(weights[0])[:, some]
            nisa.nc_matmul(works[u].bank(p), upper, values, accumulate=True)
            target = self.bank[:, u, p, :]
            nisa.nc_matmul(target, upper, self.constants.weights, accumulate=False)
            nisa.nc_matmul(target, weights[1][:, some], self.constants.weights, accumulate=True)
        stage = self.stages[x // GRANULE]
        if u == PAIR - 1:
            nisa.tensor_copy(stage[:, :, :, at, :], self.bank, engine=nisa.engine.scalar)
            if at == GRANULE - 1:
                part = sbuf(self.row_sums.shape, nl.float32)
                nisa.tensor_reduce(part, nl.add, stage[:, :, :, :, SHARES - 1], axis=3)
                nisa.tensor_tensor(self.row_sums, self.row_sums, part, nl.add)


def keep_sums(work, sums):
    """Adds a tile's P @ [v | 1] from PSUM to [rows, parts, DV + 1]."""
    banks = banks_of(sums)
    for b in range(len(banks)):
        nisa.tensor_tensor(banks[b], banks[b], work.banks[b], nl.add)


def banks_of(sums):
    """Sums in SBUF as `work.Work.banks`."""
    found = []
    for p in range(0, sums.shape[1], 2):
        found.append(sums[:, p : min(p + 2, sums.shape[1]), :])
    return found
