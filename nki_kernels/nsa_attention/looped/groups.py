"""The hardware loop over groups of four tiles of queries, a software pipeline of pairs of tiles.

    for each group:                                                        hardware loop
        for each of its two pairs p:
            compressed branch of p, and scores of p - 1                    `chunks`, an inner loop
            what p - 1 takes next comes from HBM
            window and selected branch of p - 2, beside the choice of p - 1   `rest`, `lists`
            rows that p - 1 chose are gathered

What a pair leaves for the next ones is in tensors of the half of a group that it is, so all
addresses of compute engines are static. A turn more ends it; what the first and the last turn do of
tiles that are not there goes nowhere, or to rows before the first tile.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.queues import fetch
from nki_kernels.nsa_attention.geometry import QUERIES
from nki_kernels.nsa_attention.looped.chunks import Chunks
from nki_kernels.nsa_attention.looped.lists import Chosen, Lists
from nki_kernels.nsa_attention.looped.rest import Rest, tiles_of
from nki_kernels.nsa_attention.looped.scores import Scores, Scratch
from nki_kernels.nsa_attention.looped.sizes import GROUP, HALVES, PAIR, Place, Queries, of_turn
from nki_kernels.nsa_attention.work import COMPRESSED, SAFE_SUM, Work


class Kept(nl.NKIObject):
    """HBM of a core, for one kv head after the other; `clear` once before the first."""

    def __init__(self, geometry, chunks):
        self.halves = []
        for _ in range(HALVES):
            scratch = Scratch(geometry, chunks)
            scratch.clear()
            self.halves.append(scratch)


class Groups(nl.NKIObject):
    """All groups of a kv head.

    Attributes:
        ahead, behind: `Queries` of either half's pair: of its compressed branch, and of the rest.
        first: tiles before the first group. turns: groups.
        lowest: [rows, GROUP] float32, smallest row sums of a group's tiles.
    """

    def __init__(self, geometry, constants, lane, scale, kept, group, first, turns):
        self.geometry, self.lane, self.kept = geometry, lane, kept
        self.first, self.turns = first, turns
        self.ahead, self.behind, self.works, self.rest_works, self.chosen = [], [], [], [], []
        for half in range(HALVES):
            self.ahead.append(Queries(geometry, lane))
            self.behind.append(Queries(geometry, lane))
            ahead, behind = [], []
            for u in range(PAIR):
                place = Place(geometry, half, u)
                ahead.append(work_of(place, self.ahead[half]))
                behind.append(work_of(place, self.behind[half]))
            self.works.append(ahead)
            self.rest_works.append(behind)
            self.chosen.append(Chosen(geometry, constants, lane.q_t.dtype))
        self.chunks = Chunks(geometry, constants, lane, scale)
        self.scores = Scores(geometry, constants)
        self.lists = Lists(geometry, constants, lane, self.scores, lane.q_t.dtype)
        self.rest = Rest(geometry, constants, lane, scale, self.rest_works[0], group)
        self.lowest = sbuf((geometry.rows, GROUP), nl.float32)
        nisa.memset(self.lowest, 1.0)
        self.ones = sbuf((geometry.rows, 1), nl.bfloat16)
        nisa.memset(self.ones, 1.0)

    def run(self):
        """Everything."""
        self.start()
        nl.fori_loop(0, self.turns + 1, self.turn)
        self.judge(self.turns)
        flags, target = self.flags(), self.lane.before_unsafe
        nisa.dma_copy(target[:, GROUP * (self.turns + 1) : GROUP * (self.turns + 2)], flags)

    def start(self):
        """What the first turn expects of those before it."""
        lane, first = self.lane, self.first
        self.chunks.clear([])
        start = sbuf((QUERIES, 1), nl.float32)
        last = lane.starts.shape[0] - 1
        nisa.dma_copy(start, lane.starts[last:, 0:1].broadcast(0, QUERIES))
        self.chunks.begin(start)
        for half in range(HALVES):
            tiles = slice(first + PAIR * half, first + PAIR * (half + 1))
            for queries in (self.ahead[half], self.behind[half]):
                copy_all(queries.operands(), self.sources(tiles, lane), nisa.dma_copy)
                nisa.memset(queries.total, 0.0)
                nisa.memset(queries.sums, 1.0)
        for i in range(len(self.rest.near)):
            number = self.rest.first - 1 + i + 1 - len(self.rest.near)
            nisa.dma_copy(self.rest.near[i], lane.near[number])
        for slot in range(self.geometry.local):
            page = lane.pages[slot % 2, 2 * (self.rest.first - 1) - slot]
            nisa.dma_copy(self.rest.pages[0][:, slot, :], page)

    def sources(self, tiles, lane):
        """Where `Queries.operands` of some tiles come from; tiles: a slice."""
        return sources_of(
            lane.q_t[tiles], lane.gates[tiles], lane.shifts[tiles], self.ahead[0]
        )  # fmt: skip

    def turn(self, r):
        """Group r."""
        turns = sbuf((1, 2 * HALVES), nl.int32)
        fetch(turns, self.lane.turns.select(0, r).expand_dim(0))
        starts = sbuf((128, 2 * HALVES), nl.float32)
        fetch(starts, self.lane.starts.select(0, r).expand_dim(0).broadcast(0, 128), "a")
        for half in range(HALVES):
            self.pair(r, half, turns, starts)

    def pair(self, r, half, turns, starts):
        """A half of group r; turns: of the inner loop, without masks, and in all."""
        other, works = 1 - half, self.works[half]
        scratch = self.kept.halves[half]
        self.scores.scratch = self.kept.halves[other]
        self.lists.scratch, self.lists.chosen = self.kept.halves[other], self.chosen[other]
        seen, every = nisa.register_alloc(), nisa.register_alloc()
        nisa.register_load(seen, turns[:, 2 * half : 2 * half + 1])
        nisa.register_load(every, turns[:, 2 * half + 1 : 2 * half + 2])

        def all_see(j):
            self.chunks.turn(j, works, scratch.shares, self.scores, False)

        def some_see(j):
            self.chunks.turn(j, works, scratch.shares, self.scores, True)

        nl.fori_loop(0, seen, all_see)
        nl.fori_loop(seen, every, some_see)
        self.chunks.finish(works, scratch.shares, turns[:, 2 * half + 1 : 2 * half + 2])
        self.lists.begin(self.works[other])
        self.pass_on(r, half)
        self.rest.load_pages(r, half)
        self.lists.near = starts[:, 2 * half + 1 : 2 * half + 2]
        others = []
        if half == 0:
            others.append((0, self, "judge", r))
        for work in works:
            others.append((0, self, "close", work))
        others.append((0, self.scores, "weigh", self.chunks.row_sums))
        others.append((0, self.chunks, "clear", works))
        following = starts[0:QUERIES, 2 * half : 2 * half + 1]
        others.append((0, self.chunks, "begin", following))
        if half == 0:
            others.append((5, self, "flag", r))
        steps = self.lists.steps_of(self.works[other], others)

        def load_near():
            if half == 1:
                self.rest.load_near(r, 0)

        works = self.rest_works[half]
        for work in works:
            work.total = [self.behind[half].total[:, work.tile.u]]
        self.rest.run(half, works, steps, self.chosen[half], load_near)
        target = of_turn(self.lane.before_o, GROUP * QUERIES * 0, GROUP * QUERIES, r)
        for work in works:
            tile = PAIR * half + work.tile.u
            self.rest.store(work, target[QUERIES * tile : QUERIES * (tile + 1)])
            sums = self.behind[half].sums[:, work.tile.u]
            nisa.tensor_reduce(self.lowest[:, tile : tile + 1], nl.minimum, sums, axis=(1, 2))
        self.lists.gather(self.rest.selected.rows)

    def close(self, work):
        """Ends a tile's compressed branch."""
        total = self.ahead[work.tile.half].total[:, work.tile.u]
        work.close_into(self.geometry, COMPRESSED, total)

    def pass_on(self, r, half):
        """The pair before goes on; the one after it, of the same half, takes its place."""
        other = 1 - half
        old, new = self.ahead[other], self.behind[other]
        parts = [*old.operands(), old.total, old.sums]
        copy_all([*new.operands(), new.total, new.sums], parts, nisa.dma_copy)
        first = self.first + GROUP * half
        some = []
        for tensor in (self.lane.q_t, self.lane.gates, self.lane.shifts):
            some.append(tiles_of(tensor, first, other, r))
        copy_all(old.operands(), sources_of(*some, old), fetch)

    def flag(self, r):
        """Which tiles of the group that the turn before has ended are not safe, to HBM."""
        target = self.lane.before_unsafe
        count = target.shape[1] // GROUP
        by_group = target[:, 0 : count * GROUP].reshape_dim(1, (count, GROUP))
        fetch(by_group.select(1, r), self.flags())

    def judge(self, r):
        """`unsafe` [rows, GROUP], 1 where a row's sum is too small."""
        g = self.geometry
        self.unsafe = unsafe = sbuf((g.rows, GROUP), nl.bfloat16)
        # NaN counts as unsafe: `less` would let it pass.
        nisa.tensor_scalar(unsafe, self.lowest, nl.greater_equal, SAFE_SUM)
        nisa.tensor_scalar(unsafe, unsafe, nl.multiply, -1.0, op1=nl.add, operand1=1.0)

    def flags(self):
        """[1, GROUP] float32: 1 where there is one."""
        counts, flags = psum((1, GROUP)), sbuf((1, GROUP), nl.float32)
        nisa.nc_matmul(counts, self.ones, self.unsafe, accumulate=False)
        nisa.tensor_scalar(flags, counts, nl.minimum, 1.0)
        return flags


def work_of(place, queries):
    """A tile's operands and sums as `work.Work`."""
    u, work = place.u, Work(place, place.u)
    work.q, work.rest = [queries.lower[:, u, :]], queries.rest
    for upper in queries.upper:
        work.q.append(upper[:, u, :])
    work.gates, work.shifts = queries.gates[:, u], queries.shifts[:, u]
    work.sums = queries.sums[:, u]
    return work


def sources_of(q_t, gates, shifts, queries):
    """Views in HBM of a pair of tiles as `Queries.operands` lie, as (view, part of it) lists."""
    by_channel = q_t.permute((1, 0, 2))
    found = [by_channel[0 : queries.low]]
    for _ in queries.upper:
        found.append(by_channel[128 : 128 + queries.rest])
    found.append(gates.permute((1, 0, 2, 3)))
    found.append(shifts.expand_dim(0).broadcast(0, 128))
    return found


def copy_all(targets, sources, copy):
    """Copies; a source with as many rows as half of the partitions hold goes to both halves."""
    for i in range(len(targets)):
        target, source = targets[i], sources[i]
        rows = source.shape[0]
        if rows == target.shape[0]:
            copy(target, source)
        else:
            for half in range(2):
                copy(target[64 * half : 64 * half + rows], source)
