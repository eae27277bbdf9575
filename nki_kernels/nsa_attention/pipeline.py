"""One software pipeline through all tiles of queries of a kv head, branches and tiles of keys."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import sbuf
from nki_kernels.nsa_attention.choose import Choice, hide
from nki_kernels.nsa_attention.compressed import Compressed
from nki_kernels.nsa_attention.flags import Flags
from nki_kernels.nsa_attention.selected import Selected
from nki_kernels.nsa_attention.unite import GROUP, Union, Unions
from nki_kernels.nsa_attention.window import Window
from nki_kernels.nsa_attention.work import COMPRESSED, NEAR, SELECTED, Work

DEPTH = 4  # jobs between the scores of a tile of keys and its product with values
SPARE = 6  # jobs between the last page and its first use, if there are so many


class Job(nl.NKIObject):
    """A tile of queries against a tile of keys of a branch: number x of `count`."""

    def __init__(self, branch, work, x, count):
        self.branch, self.work, self.x, self.count = branch, work, x, count
        self.weights = None


class Pipeline(nl.NKIObject):
    """See the package."""

    def __init__(self, geometry, constants, lane, turned, lists, scale, queues, tiles, ahead):
        self.geometry, self.lane, self.ahead = geometry, lane, ahead
        self.works = []
        streams = 1
        for i in range(len(tiles)):
            self.works.append(Work(tiles[i], i))
            streams = max(streams, tiles[i].stream + 1)
        self.compressed = Compressed(geometry, constants, lane, scale, self.works)
        self.selected = Selected(geometry, constants, lane, scale, self.works)
        self.window = Window(geometry, constants, lane, scale, streams)
        self.branches = [self.compressed, self.selected, self.window]
        self.unions = Unions(turned, lists)
        self.choice = Choice(geometry, constants, turned, self.unions)
        self.flags = Flags(geometry, lane.unsafe, lane.crowded, lists)
        self.waiting = []  # jobs whose scores are made
        self.now = 0  # number of the job
        self.starts = []  # number of the first selected job of each tile
        self.steps = []  # (job, who, name, of what) of the choice, in order
        self.queues = queues
        self.branch, self.gathered = COMPRESSED, 0  # of the job; pages so far
        self.pages = []  # (job, work, name, n, last) of what gathers blocks, in order
        self.gathering = 0  # tiles whose pages are on their way or there

    def run(self):
        """Everything."""
        jobs = self.jobs()
        if len(self.works) > 0:
            self.works[0].load(self.geometry, self.lane)
            self.window.load(self.works[0].tile)
        for i in range(len(jobs)):
            job, self.now, self.branch = jobs[i], i, jobs[i].branch
            if job.x == 0:
                self.begin(job)
            job.weights = self.branches[job.branch].weigh(job.work, job.x)
            self.waiting.append(job)
            if len(self.waiting) > DEPTH:
                self.add()
            self.catch_up()
        while len(self.waiting) > 0:
            self.add()
        for stream in range(2):
            self.flags.write(stream)

    def jobs(self):
        """All jobs in order: compressed branches `ahead` tiles before the others."""
        found = []
        for i in range(-self.ahead, len(self.works)):
            if 0 <= i + self.ahead < len(self.works):
                work = self.works[i + self.ahead]
                for x in range(work.tile.key_tiles):
                    found.append(Job(COMPRESSED, work, x, work.tile.key_tiles))
            if i >= 0:
                work = self.works[i]
                for branch in (NEAR, SELECTED):
                    count = self.branches[branch].count(work.tile)
                    if branch == SELECTED:
                        self.starts.append(len(found))
                    for x in range(count):
                        found.append(Job(branch, work, x, count))
        return found

    def begin(self, job):
        """What a branch's first job of a tile needs."""
        work = job.work
        if len(work.q) == 0:
            work.load(self.geometry, self.lane)
        if job.branch == COMPRESSED and work.index + 1 < len(self.works):
            following = self.works[work.index + 1]
            if len(following.q) == 0:
                following.load(self.geometry, self.lane)
        if job.branch == SELECTED:
            if work.index + 1 < len(self.works):
                self.window.load(self.works[work.index + 1].tile)
            if work.index == 0:
                for first in self.works[0:2]:
                    self.load_list(first)
                    self.gather(first)
            if work.index + 2 < len(self.works):
                self.load_list(self.works[work.index + 2])
            # Where branches have few jobs, the products of two tiles before may still wait: only
            # behind them is there room for these pages.
            while self.gathering <= work.index:
                self.add()
            self.arrive(work)

    def add(self):
        """The products of the first job that waits, and what follows a branch's last one."""
        job = self.waiting.pop(0)
        work = job.work
        self.branches[job.branch].add(work, job.x, job.weights)
        if job.x < job.count - 1:
            return
        if job.branch == COMPRESSED:
            self.choose(work)
        elif job.branch == NEAR:
            self.keep(work)
        else:
            if work.index + 2 < len(self.works):
                self.gather(self.works[work.index + 2])
            self.finish(work)

    def keep(self, work):
        """Ends the window branch; of a tile whose union may be too long for its list, what it has
        without the selected branch is kept."""
        total = work.close(self.geometry, NEAR)
        if work.tile.crowded:
            nisa.dma_copy(self.lane.others[work.tile.number], total)

    def choose(self, work):
        """Adds the steps of a tile's choice, and of its group's lists behind its last tile."""
        if work.tile.ranked:
            self.add_steps(self.choice, work)
        if work.index % GROUP == GROUP - 1 or work.index == len(self.works) - 1:
            first = work.index // GROUP * GROUP
            self.add_steps(self.unions, Union(self.works[first : work.index + 1]))

    def add_steps(self, who, of):
        """Appends the steps of a part of the choice."""
        due = self.now
        if len(self.steps) > 0:
            due = max(due, self.steps[len(self.steps) - 1][0])
        for name, wait in who.steps_of(of):
            due += wait
            self.steps.append((due, who, name, of))

    def catch_up(self):
        """What is done beside the job."""
        while len(self.pages) > 0 and self.pages[0][0] <= self.now:
            self.gather_some()
        while len(self.steps) > 0 and self.steps[0][0] <= self.now:
            self.step()

    def step(self):
        """The next step of the choice."""
        _, who, name, of = self.steps.pop(0)
        getattr(who, name)(of)

    def load_list(self, work):
        """Loads the list of a tile, which is made first if it is not yet."""
        if work.tile.listed > 0:
            while self.unions.ready <= work.index:
                if len(self.steps) > 0:
                    self.step()
                else:
                    self.add()
            self.unions.load(work)

    def gather(self, work):
        """Starts to gather a tile's pages; they take the place of those of two tiles before."""
        self.selected.gather_known(work)
        self.gathering += 1
        steps = self.selected.steps_of(work.tile)
        count = len(steps)
        span = max(0, self.starts[work.index] - self.now - SPARE)
        for i in range(count):
            name, n = steps[i]
            self.pages.append((self.now + 1 + i * span // count, work, name, n, i == count - 1))

    def gather_some(self):
        """The next step of gathering that is due; behind the last one of a tile, what it hides."""
        _, work, name, n, last = self.pages.pop(0)
        some = ""
        for least, beside_compressed, beside_others in self.queues:
            if work.tile.key_tiles >= least:
                some = beside_compressed if self.branch == COMPRESSED else beside_others
        getattr(self.selected, name)(work, n, some[self.gathered % len(some)])
        if name == "gather_page":
            self.gathered += 1
        if last:
            hide(work)

    def arrive(self, work):
        """The pages of a tile that are missing when they are needed."""
        while len(self.pages) > 0 and self.pages[0][1].index <= work.index:
            self.gather_some()

    def finish(self, work):
        """Writes a tile's output, and keeps its smallest row sum."""
        g, tile = self.geometry, work.tile
        result = work.close(g, SELECTED)
        target = self.lane.o[32 * tile.number : 32 * (tile.number + 1)]
        target = target.reshape_dim(0, (g.parts, g.per_part)).permute((1, 2, 0, 3))
        nisa.dma_copy(target, result)
        if tile.key_tiles == 0:
            nisa.memset(work.sums[:, COMPRESSED, :], 1.0)
        elif tile.t0 < g.block - 1:
            self.excuse_dead(work)
        self.flags.keep(tile, work.sums)

    def excuse_dead(self, work):
        """Rows that see no compressed key have no sum, rightly."""
        g = self.geometry
        row = sbuf((g.rows, g.parts), nl.float32)
        nisa.iota(row, [[g.rows, g.parts]], offset=0, channel_multiplier=1)
        sums = work.sums[:, COMPRESSED, :]
        dead = float((g.block - 1 - work.tile.t0) * g.group)
        nisa.scalar_tensor_tensor(sums, row, nl.less, dead, nl.add, sums)
