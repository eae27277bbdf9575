"""Kernels that stray or race where `off` is not 0 and do not where it is, loaded for simulation.

Each is started as two programs on x and out, both of `size` elements.
"""

import triton
import triton.language as tl

from nsa_neuron.toolchain import triton_interpreter

with triton_interpreter():

    @triton.jit
    def halves(x, out, size, off):
        """Doubles x; the last lane of the last program reads `off` elements too far."""
        at = tl.program_id(0) * 4 + tl.arange(0, 4)
        far = at + tl.where(at == size - 1, off, 0)
        value = tl.load(x + far, mask=at < size, other=0.0)
        tl.store(out + at, 2 * value, mask=at < size)

    @triton.jit
    def loads_before(x, out, size, off):
        at = tl.program_id(0) * 4 + tl.arange(0, 4)
        tl.store(out + at, tl.load(x + at + tl.where(at == 0, off, 0)))

    @triton.jit
    def put(place, value):
        tl.store(place, value)

    @triton.jit
    def stores_behind(x, out, size, off):
        """By a function of its own."""
        at = tl.program_id(0) * 4 + tl.arange(0, 4)
        put(out + at + tl.where(at == size - 1, off, 0), tl.load(x + at))

    @triton.jit
    def raises(x, out, size, off):
        tl.static_assert(size < 0, "a defect of another kind")

    @triton.jit
    def overlaps(x, out, size, off):
        """The first program stores `off` rows too many: what idle rows of a tile would do."""
        lane = tl.arange(0, 8)
        first = tl.program_id(0) * 4
        many = 4 + tl.where(first == 0, off, 0)
        tl.store(out + first + lane, tl.load(x + lane), mask=lane < many)

    @triton.jit
    def reads_the_other(x, out, size, off):
        first = tl.program_id(0) * 4
        tl.store(out + first, 1.0)
        tl.debug_barrier()
        tl.store(out + first + 1, tl.load(out + (first + off) % size))

    @triton.jit
    def reads_back(x, out, size, off):
        """What it stored itself, with no barrier between where `off` is 1."""
        at = tl.program_id(0) * 4 + tl.arange(0, 4)
        tl.store(out + at, tl.load(x + at))
        if off == 0:
            tl.debug_barrier()
        value = tl.load(out + at)
        tl.store(out + at, 2 * value)  # each lane where it has loaded

    @triton.jit
    def turns(x, out, size, off):
        """Each lane stores what its right neighbour had: with no barrier, where `off` is 1."""
        lane = tl.arange(0, 4)
        mine = out + tl.program_id(0) * 4
        tl.store(mine + lane, tl.load(x + tl.program_id(0) * 4 + lane))
        tl.debug_barrier()
        value = tl.load(mine + (lane + 1) % 4)
        if off == 0:
            tl.debug_barrier()
        tl.store(mine + lane, value)

    @triton.jit
    def takes_first(x, out, size, off):
        """All lanes load the first one's element, whose lane stores into it."""
        lane = tl.arange(0, 4)
        mine = out + tl.program_id(0) * 4
        tl.store(mine + lane, tl.load(x + tl.program_id(0) * 4 + lane))
        tl.debug_barrier()
        value = tl.load(mine + lane * 0)
        if off == 0:
            tl.debug_barrier()
        tl.store(mine + lane, value + 1, mask=lane == 0)

    @triton.jit
    def hints(x, out, size, off):
        """A hint to the compiler that holds where `off` is 0."""
        first = tl.multiple_of(tl.program_id(0) * 4 + off, 4)
        at = (first + tl.arange(0, 4)) % size
        tl.store(out + at, tl.load(x + at))

    @triton.jit
    def leaves_out(x, out, size, SAID: tl.constexpr):
        """The last of four lanes is masked out of the load."""
        lane = tl.arange(0, 4)
        if SAID:
            value = tl.load(x + lane, mask=lane < 3, other=0)
        else:
            value = tl.load(x + lane, mask=lane < 3)
        tl.store(out + lane, value)

    @triton.jit
    def lanes_meet(x, out, size, off):
        """Two lanes of one store meet in an element where `off` is 2."""
        at = tl.arange(0, 4)
        place = tl.program_id(0) * 4 + tl.where(off == 2, at // 2, at)
        tl.store(out + place, tl.load(x + at))
        tl.store(out + tl.program_id(0) * 4 + at, tl.load(x + at))

    @triton.jit
    def masked(x, out, size, off):
        at = tl.program_id(0) * 4 + tl.arange(0, 4)
        inside = at < size - 1
        far = at + tl.where(inside, 0, off)
        tl.store(out + far, tl.load(x + far, mask=inside, other=0.0), mask=inside)

    @triton.jit
    def last_adds_up(
        out, counter, size, MEET: tl.constexpr, BEFORE: tl.constexpr = True,
        BEHIND: tl.constexpr = True, SEM: tl.constexpr = "acq_rel", SCOPE: tl.constexpr = "gpu",
        CACHE: tl.constexpr = ".cg",
    ):  # fmt: skip
        """Every program stores its number plus one; the last to arrive stores their sum."""
        me = tl.program_id(0)
        tl.store(out + me, (me + 1).to(tl.float32))
        arrived = me
        if BEFORE:
            tl.debug_barrier()
        if MEET:
            arrived = tl.atomic_add(counter, 1, sem=SEM, scope=SCOPE)
        if BEHIND:
            tl.debug_barrier()
        if arrived == size - 1:
            parts = tl.load(out + tl.arange(0, 4), cache_modifier=CACHE)
            tl.store(out + size, tl.sum(parts, 0))

    @triton.jit
    def one_stays_away(out, counter, size):
        """As `last_adds_up`, but program 1 never comes to the atomic."""
        me = tl.program_id(0)
        tl.store(out + me, (me + 1).to(tl.float32))
        tl.debug_barrier()
        if me != 1:
            arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            tl.debug_barrier()
            if arrived == size - 2:
                parts = tl.load(out + tl.arange(0, 4), cache_modifier=".cg")
                tl.store(out + size, tl.sum(parts, 0))
