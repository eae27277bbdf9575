"""The window and the selected branch of a pair of tiles, and what both cores need of lists."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.queues import fetch
from nki_kernels.nsa_attention.constants import keep_where
from nki_kernels.nsa_attention.geometry import AT_ONCE, KEYS, TOKENS
from nki_kernels.nsa_attention.looped.chunks import banks_of, keep_sums
from nki_kernels.nsa_attention.looped.lists import hide_in
from nki_kernels.nsa_attention.looped.sizes import GROUP, PAIR, blocks_of_group, of_turn
from nki_kernels.nsa_attention.rows import turned_rows
from nki_kernels.nsa_attention.selected import Selected
from nki_kernels.nsa_attention.work import NEAR, SELECTED, multiply_keys

DEPTH = 4  # jobs between the scores of a tile of keys and its product with values


class Rest(nl.NKIObject):
    """Attributes:
    near: tiles of keys and values [128, columns] of a group's window: K^T's first 128 rows, the
        others on the lower partitions, [v | 1].
    pages: forced blocks of a pair, [128, places, columns], one buffer for each half of a group.
    sums: P @ [v | 1] of a pair's selected branches, [rows, parts, DV + 1] float32 each.
    first: the loop's first group, of all.
    """

    def __init__(self, geometry, constants, lane, scale, places, first):
        self.geometry, self.constants, self.lane, self.scale = geometry, constants, lane, scale
        self.first = first
        self.dk, self.dv = lane.q_t.shape[1], lane.v_win.shape[1] - 1
        self.selected = Selected(geometry, constants, lane, scale, places)
        self.selected.early, self.selected.copies = 8, nisa.engine.scalar
        for some in self.selected.rows:
            for buffer in some:
                nisa.memset(buffer, 0.0)
        self.pages = self.selected.pages
        for buffer in self.pages:
            for slot in range(geometry.local, geometry.forced):
                page = lane.pages[slot % 2, slot - geometry.local]
                nisa.dma_copy(buffer[:, slot, :], page)
        self.sums = []
        for _ in range(PAIR):
            self.sums.append(sbuf((geometry.rows, geometry.parts, self.dv + 1), nl.float32))
        self.near = []
        for _ in places[0].tile.window:
            self.near.append(sbuf((KEYS, lane.near.shape[2]), lane.near.dtype))

    def load_near(self, turn, back):
        """The window of a group: that of a turn, or the one before it."""
        for i in range(len(self.near)):
            first = self.first - back + i + 1 - len(self.near)
            fetch(self.near[i], self.lane.near[first:].select(0, turn))

    def load_pages(self, turn, half):
        """Forced blocks of the pair before that of a turn and half."""
        other = 1 - half
        for slot in range(self.geometry.local):
            first = blocks_of_group() * (self.first + half - 1) + other - slot
            page = of_turn(self.lane.pages[slot % 2], first, blocks_of_group(), turn)
            fetch(self.pages[other][:, slot, :], page[0])

    def jobs(self, works):
        """(branch, work, x, how many)."""
        found = []
        for work in works:
            many = len(work.tile.window)
            for x in range(many):
                found.append((NEAR, work, x, many))
        for work in works:
            many = self.selected.count(work.tile)
            for x in range(many):
                found.append((SELECTED, work, x, many))
        return found

    def run(self, half, works, steps, chosen, then):
        """Both branches of a pair, beside the steps of another's choice.

        Args:
            steps: see `lists.Lists`. chosen: the pair's lists. then: called behind the window.
        """
        self.selected.pages = [self.pages[half], self.pages[half]]
        for work in works:
            work.hidden = chosen.hidden[work.tile.u]
            hide_in(work.hidden)
        jobs, waiting, due, windows = self.jobs(works), [], 0, 0
        for now in range(len(jobs)):
            branch, work, x, _ = jobs[now]
            weights = self.weigh(branch, work, x)
            waiting.append((jobs[now], weights))
            if len(waiting) > DEPTH:
                windows += self.add(waiting.pop(0))
                if windows == PAIR:
                    then()
                    windows += 1
            while len(steps) > 0 and due + steps[0][0] <= now:
                due += steps[0][0]
                _, who, name, of = steps.pop(0)
                getattr(who, name)(of)
        while len(waiting) > 0:
            self.add(waiting.pop(0))
        while len(steps) > 0:
            _, who, name, of = steps.pop(0)
            getattr(who, name)(of)
        self.more(works, chosen)

    def weigh(self, branch, work, x):
        """P^T of a tile of keys."""
        return self.selected.weigh(work, x) if branch == SELECTED else self.of_window(work, x)

    def of_window(self, work, x):
        """P^T of a tile of keys of the window, bfloat16 [128, columns]."""
        tile = work.tile
        back = tile.window[x]
        keys = self.near[len(self.near) - 1 + back]
        low = work.q[0].shape[0]
        scores, upper = psum((KEYS, self.geometry.columns)), []
        if self.dk > 128:
            upper.append(keys[0 : work.rest, KEYS : 2 * KEYS])
        multiply_keys(scores, work, keys[0:low, 0:KEYS], upper, 0, False)
        weights = sbuf(scores.shape, work.q[0].dtype)
        bias = work.shifts[:, NEAR : NEAR + 1]
        nisa.activation(weights, nl.exp, scores, bias=bias, scale=self.scale)
        ahead, window = KEYS * back - tile.t0, self.geometry.window
        if ahead + KEYS - 1 > 0:
            keep_where(weights, self.constants.near, nl.greater_equal, ahead)
        if ahead < 32 - window:
            keep_where(weights, self.constants.near, nl.less_equal, ahead + window - 1)
        return weights

    def add(self, waiting):
        """The products of a job with values; 1 if they end a window branch."""
        (branch, work, x, many), weights = waiting
        g = self.geometry
        if branch == SELECTED:
            self.selected.add(work, x, weights)
            return 0
        if x == 0:
            work.open(g, self.constants.zeros, self.dv)
        keys = self.near[len(self.near) - 1 + work.tile.window[x]]
        values = keys[:, keys.shape[1] - self.dv - 1 :]
        for p in range(g.parts):
            columns = weights[:, p * g.rows : (p + 1) * g.rows]
            nisa.nc_matmul(work.bank(p), columns, values, accumulate=True)
        if x < many - 1:
            return 0
        work.close(g, NEAR)
        return 1

    def more(self, works, chosen):
        """Blocks behind those that were gathered ahead, sixteen of each list per turn."""
        some, last = chosen.turns()
        for work in works:
            for b in range(len(work.banks)):
                kept = banks_of(self.sums[work.tile.u])[b]
                nisa.tensor_copy(kept, work.banks[b], engine=nisa.engine.scalar)

        def once(_):
            chosen.spread()

        nl.fori_loop(0, some, once)

        def turn(t):
            jobs, waiting = [], []
            for work in works:
                work.open(self.geometry, self.constants.zeros, self.dv)
                part = Sixteen(self, work, chosen, t)
                for n in range(TOKENS):
                    jobs.append((part, n))
            for part, n in jobs:
                waiting.append((part, n, part.weigh(n)))
                if len(waiting) > 3:
                    done, m, weights = waiting.pop(0)
                    done.add(m, weights)
            for done, m, weights in waiting:
                done.add(m, weights)
            for work in works:
                keep_sums(work, self.sums[work.tile.u])

        nl.fori_loop(len(self.selected.rows[0]), last, turn)
        for work in works:
            work.banks = banks_of(self.sums[work.tile.u])

    def store(self, work, target):
        """Ends the selected branch, and writes o of a tile to [32, G, DV]."""
        g = self.geometry
        result = work.close(g, SELECTED)
        by_part = target.reshape_dim(0, (g.parts, g.per_part)).permute((1, 2, 0, 3))
        fetch(by_part, result, "g")


class Sixteen(nl.NKIObject):
    """Sixteen blocks of a tile's list, by the number of a turn: what `Selected.of_rows` takes."""

    def __init__(self, rest, work, chosen, turn):
        self.rest_of, self.work, self.tile = rest, work, work.tile
        self.q, self.rest = work.q, work.rest
        u, numbers = work.tile.u, chosen.numbers
        places, rows = sbuf((AT_ONCE, 1), nl.int32), sbuf((KEYS, 1), nl.int32)
        fetch(places, numbers.blocks[:, AT_ONCE * u : AT_ONCE * (u + 1)].select(0, turn), "a")
        fetch(rows, numbers.rows[:, :, u : u + 1].select(1, turn))
        self.hidden = sbuf((AT_ONCE, work.hidden.shape[1]), work.hidden.dtype)
        nisa.dma_copy(self.hidden, chosen.turned[u].vector_select(0, places))
        source = rest.lane.rows
        self.buffer = sbuf((KEYS, TOKENS, source.shape[2]), source.dtype)
        nisa.dma_copy(self.buffer, source.vector_select(0, rows))
        hide_in(self.hidden)
        low, wide = self.q[0].shape[0], len(self.q) > 1
        self.turned = [turned_rows(self.buffer, low, wide, nisa.engine.scalar)]

    def weigh(self, n):
        selected = self.rest_of.selected
        return selected.exponentials(self.work, selected.of_rows(self, n))

    def add(self, n, weights):
        self.rest_of.selected.add_rows(self.work, self.buffer, n, weights)


def tiles_of(tensor, first, half, turn):
    """A pair of tiles of a tensor [tiles, ...]: of a turn, its half."""
    return of_turn(tensor, first + PAIR * half, GROUP, turn)[0:PAIR]
