"""Random programs: no overlap on a lane, no broken dependency, more work never takes less time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cost_helpers import P, hbm, nisa, nl, of, psum, record, sbuf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nsa_neuron.simulator import cost
from nsa_neuron.simulator.cost import Cause
from nsa_neuron.simulator.cost.estimate import program_of
from nsa_neuron.simulator.cost.patterns import Spares
from nsa_neuron.simulator.cost.timeline import SHIFT
from nsa_neuron.simulator.machine.trn2 import TRN2
from nsa_neuron.simulator.profiler import memory

TILES = 4
KINDS = ("load", "store", "copy", "exp", "gpsimd", "matmul", "evict")

steps = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.integers(0, TILES - 1),
        st.integers(0, TILES - 1),
        st.sampled_from([(0, 64), (64, 128), (0, 128), (32, 96)]),
    ),
    min_size=1,
    max_size=24,
)


def program(steps):
    """A body that performs the steps on a few tiles of SBUF and PSUM and a matrix in HBM."""

    def body():
        tiles = [sbuf((128, 128)) for _ in range(TILES)]
        banks = [psum((128, 128)) for _ in range(TILES)]
        far = hbm((128, 128 * TILES))
        for kind, a, b, (lo, hi) in steps:
            part = slice(lo, hi)
            distant = far[:, b * 128 + lo : b * 128 + hi]
            if kind == "load":
                nisa.dma_copy(tiles[a][:, part], distant)
            elif kind == "store":
                nisa.dma_copy(distant, tiles[a][:, part])
            elif kind == "copy":
                nisa.tensor_copy(tiles[a][:, part], tiles[b][:, part])
            elif kind == "exp":
                nisa.activation(tiles[a][:, part], nl.exp, banks[b][:, part])
            elif kind == "gpsimd":
                nisa.tensor_copy(tiles[a][:, part], tiles[b][:, part], engine=nisa.engine.gpsimd)
            elif kind == "matmul":
                nisa.nc_matmul(banks[a][:, part], tiles[b], tiles[b][:, part])
            else:
                nisa.tensor_copy(tiles[a][:, part], banks[b][:, part])

    return body


def touched(access):
    """Every (partition, byte) hull row of an access, as a set of (allocation, byte)."""
    layout, size = access.layout, access.layout.dtype.itemsize
    first = 1 if layout.pitch else 0
    index = np.array(access.start % layout.pitch if layout.pitch else access.start)
    for n, s in zip(layout.shape[first:], layout.strides[first:], strict=True):
        index = index[..., None] + np.arange(n) * s
    return {(access.allocation.id, int(e)) for e in np.unique(index * size)}


def check(t):
    """Independent check of every pair of instructions that touch the same bytes."""
    for lane in range(len(t.lanes)):
        index = np.flatnonzero(t.lane == lane)
        assert np.all(np.diff(t.issue[index]) >= 0)
        assert np.all(t.issue[index[1:]] >= t.free[index[:-1]] - 1e-9)
    assert np.all(t.start <= t.issue) and np.all(t.issue <= t.begin)
    assert np.all(t.begin <= t.end) and np.all(t.issue <= t.free)
    places = [
        (
            set().union(*(touched(a) for a in i.writes)),
            set().union(set(), *(touched(a) for a in i.reads)),
        )
        for i in t.instructions
    ]
    for k, (writes, reads) in enumerate(places):
        for j in range(k):
            earlier_writes, earlier_reads = places[j]
            same = t.lane[j] == t.lane[k] and not t.lanes[t.lane[k]].startswith("dma")
            raw = bool(reads & earlier_writes)
            other = bool(writes & (earlier_writes | earlier_reads))
            if raw and not (same and t.lane[k] == 0):
                assert t.issue[k] >= t.end[j] - 1e-9
            elif other and not same:
                assert t.issue[k] >= t.end[j] - 1e-9
            elif raw or other:
                assert t.issue[k] >= t.free[j] - 1e-9


@settings(max_examples=60)
@given(steps)
def test_no_overlap_and_no_broken_dependency(steps):
    run = record(program(steps))
    check(of(run))
    check(of(run, pe_warm_up=4600))


@settings(max_examples=30)
@given(steps)
def test_causes_name_who_was_waited_for(steps):
    t = of(record(program(steps)))
    for k in range(len(t.instructions)):
        cause, blocker = Cause(int(t.cause[k])), int(t.blocker[k])
        assert (cause is Cause.LANE) == (blocker < 0)
        assert blocker < k
        if cause is Cause.LANE:
            assert t.issue[k] == t.start[k]
    path = t.critical_path()
    assert sum(s.until - s.since for s in path) == pytest.approx(t.total)


@settings(max_examples=40)
@given(steps, st.integers(0, 40))
def test_more_instructions_never_take_less_time(steps, cut):
    short = of(record(program(steps[:cut])))
    assert of(record(program(steps))).total >= short.total - 1e-9


SLOWER = [
    {"dma_rate": P.dma_rate / 2},
    {"dma_start": P.dma_start * 2},
    {"dma_hbm_run": P.dma_hbm_run * 3},
    {"dma_completion": P.dma_completion * 3},
    {"semaphore": P.semaphore * 4},
    {"vector_latency": P.vector_latency * 2},
    {"scalar_latency": P.scalar_latency * 2},
    {"scalar_table_load": P.scalar_table_load * 2},
    {"pe_overhead": 100.0},
    {"gpsimd_other": 9.0},
]


@settings(max_examples=30)
@given(steps)
@pytest.mark.parametrize("change", SLOWER, ids=lambda c: next(iter(c)))
def test_a_slower_machine_is_never_faster(change, steps):
    """Where nothing is handed out by arrival: one DMA queue at a time, no PSUM bank rule.

    Resources given to whoever comes first can make a slower machine finish earlier (Graham's
    anomaly), so programs here do not store while they load.
    """
    ordered = [s for s in steps if s[0] != "store"]
    program_ = cost.program_of(record(program(ordered)))
    base = replace(P, pe_warm_up=0.0, psum_bank_share=0.0)
    fast = cost.schedule(program_, base)
    slow = cost.schedule(program_, replace(base, **change))
    assert slow.total >= fast.total - 1e-9


@pytest.mark.parametrize("columns", [128, 512, 2048])
def test_bigger_operands_never_take_less_time(columns):
    def body(n):
        def inner():
            a = sbuf((128, n))
            nisa.dma_copy(a, hbm((128, n)))
            nisa.tensor_copy(sbuf((128, n)), a)
            nisa.activation(sbuf((128, n)), nl.exp, a)

        return inner

    totals = [of(record(body(n))).total for n in (columns, columns + 1, 2 * columns)]
    assert totals == sorted(totals)


sizes = st.lists(
    st.tuples(
        st.integers(1, 26_000), st.sampled_from(KINDS[:5]), st.sampled_from([32, 64, 96, 128])
    ),
    max_size=40,
)
PLACED = (0, 100_000), (64, 100_000), (0, 100_000), (0, 102_000)


@settings(max_examples=60)
@given(sizes, st.integers(0, 4))
@example([(50_000, "gpsimd", 128), (9_000, "copy", 128), (40_000, "load", 128)], 0)
def test_no_report_exceeds_a_capacity(sizes, placed):
    """Tiles of any size and height, some with addresses: what is over of one serves others."""

    def body():
        far = hbm((128, 53_000))
        for address in PLACED[:placed]:
            fixed = nl.ndarray((64, 1000), nl.float32, address=address)
            nisa.dma_copy(fixed, far[:64, :1000])
        for width, kind, rows in sizes:
            made = sbuf((rows, width))
            source = far[:rows, :width]
            if kind == "load":
                nisa.dma_copy(made, source)
                nisa.tensor_copy(sbuf((rows, 1)), made[:, :1], engine=nisa.engine.gpsimd)
            elif kind == "store":
                nisa.memset(made, 0.0)
                nisa.dma_copy(source, made)
            elif kind == "copy":
                nisa.memset(made, 0.0)
            elif kind == "exp":
                out = psum((rows, min(width, 4096)))
                nisa.activation(out, nl.exp, made[:, : out.shape[1]])
                nisa.tensor_copy(made[:, : out.shape[1]], out, engine=nisa.engine.vector)
            else:
                nisa.memset(made, 0.0, engine=nisa.engine.gpsimd)

    t = of(record(body))
    for buffer, limit in (("sbuf", TRN2.sbuf_bytes), ("psum", TRN2.psum_bytes)):
        _, used = memory.usage(t, 0, TRN2)[buffer]
        assert used.min() >= 0 and used.max() <= limit


@settings(max_examples=30)
@given(steps, steps)
def test_what_is_known_of_a_tensor_that_is_no_more_never_reaches_the_next(steps, others):
    """Tensors made and first used alike take over patterns, not whom to wait for."""

    def body():
        for part in (steps, others, steps):
            program(part)()

    run = record(body)
    found = [sorted(deps) for deps in program_of(run).deps]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Spares, "get", lambda self, place: None)
        assert found == [sorted(deps) for deps in program_of(run).deps]


@pytest.mark.parametrize("parts", [1, 2])
def test_who_reads_an_address_from_a_tensor_whose_room_it_takes_does_not_wait_for_itself(parts):
    rows = 4

    def body():
        source = hbm((8, 128, 4096))
        lists = [sbuf((1, rows), nl.int32) for _ in range(2)]
        for which in lists:
            for part in range(parts):
                nisa.memset(which[:, part * rows // parts : (part + 1) * rows // parts], 0)
        for which in lists:
            for slot in range(rows):
                view = source.ap(
                    [[4096, 128], [1, 4096]],
                    scalar_offset=which[0:1, slot : slot + 1],
                    indirect_dim=0,
                )
                made = sbuf((128, 24 * 1024))
                nisa.dma_copy(made[:, :4096], view)

    program = program_of(record(body))
    assert any(code & 7 == Cause.SPACE for deps in program.deps for code in deps)
    for me, deps in enumerate(program.deps):
        assert all(code >> SHIFT < me for code in deps)
