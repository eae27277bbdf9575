"""Timeline queries: critical path, busy time, stalls; overlap of access patterns."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from cost_helpers import hbm, nisa, nl, psum, sbuf, timeline
from hypothesis import given
from hypothesis import strategies as st

from nsa_neuron.simulator.cost import Cause
from nsa_neuron.simulator.cost.overlap import may_overlap
from nsa_neuron.simulator.machine.dtypes import resolve
from nsa_neuron.simulator.memory.allocation import Access, access_at, allocation_of
from nsa_neuron.simulator.memory.layout import Form, layout_of


def pipeline():
    x = hbm((512, 512))
    for i in range(4):
        a, acc = sbuf((128, 512)), psum((128, 512))
        nisa.dma_copy(a, x[i * 128 : (i + 1) * 128])
        nisa.nc_matmul(acc, a[:, 0:128], a)
        b = sbuf((128, 512))
        nisa.activation(b, nl.exp, acc)
        nisa.dma_copy(x[i * 128 : (i + 1) * 128], b)


def test_the_critical_path_tiles_the_total_time():
    t = timeline(pipeline)
    path = t.critical_path()
    assert path[0].since == 0 and path[-1].until == t.total
    assert all(a.until == b.since for a, b in pairwise(path))
    assert all(s.since <= s.until for s in path)
    assert path[-1].index == int(t.end.argmax())


def test_the_critical_path_of_a_chain_is_the_chain():
    def body():
        a = sbuf((128, 512))
        nisa.memset(a, 0.0)
        for _ in range(3):
            b = sbuf((128, 512))
            nisa.activation(b, nl.copy, a)
            nisa.tensor_copy(a, b)

    t = timeline(body)
    assert [s.index for s in t.critical_path()] == list(range(7))


def test_busy_is_the_union_of_executions():
    t = timeline(pipeline)
    for lane in ("tensor", "scalar", "dma-load", "dma"):
        index = t.members(lane)
        ticks = np.linspace(0, t.total, 40_001)
        inside = np.zeros(len(ticks), bool)
        for k in index:
            inside |= (ticks >= t.begin[k]) & (ticks < t.end[k])
        assert t.busy(lane) == pytest.approx(inside.mean() * t.total, rel=2e-3)
    assert t.busy("vector") == 0


FORM = Form("private_hbm", (24, 24), resolve("uint8"), None)
TENSOR = allocation_of(FORM, 0, 0, "", 0, None, "scratch")


@st.composite
def patterns(draw):
    """A pattern of up to three dims inside 576 bytes."""
    dims = draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 5)), min_size=1, max_size=3))
    extent = sum((n - 1) * s for s, n in dims) + 1
    start = draw(st.integers(0, max(0, 576 - extent)))
    shape, strides = tuple(n for _, n in dims), tuple(s for s, _ in dims)
    layout = layout_of(shape, strides, resolve("uint8"), 0)
    return access_at(TENSOR, FORM.place(layout, start, False))


def positions(a: Access) -> set[int]:
    index = np.array(a.start)
    for n, s in zip(a.layout.shape, a.layout.strides, strict=True):
        index = index[..., None] + np.arange(n) * s
    return set(index.ravel().tolist())


@given(patterns(), patterns())
def test_overlap_is_never_missed(a, b):
    if positions(a) & positions(b):
        assert may_overlap(a, b)


@given(st.data())
def test_blocks_of_a_matrix_are_told_apart_exactly(data):
    def block():
        rows = sorted(data.draw(st.lists(st.integers(0, 24), min_size=2, max_size=2, unique=True)))
        cols = sorted(data.draw(st.lists(st.integers(0, 24), min_size=2, max_size=2, unique=True)))
        layout = layout_of((rows[1] - rows[0], cols[1] - cols[0]), (24, 1), resolve("uint8"), 0)
        return access_at(TENSOR, FORM.place(layout, rows[0] * 24 + cols[0], False))

    a, b = block(), block()
    assert may_overlap(a, b) == bool(positions(a) & positions(b))


def test_a_lane_s_stalls_are_told_by_cause_the_longest_first():
    """VectorE waits for ScalarE's result, then for GpSimdE to have written what it overwrites."""

    def body():
        a, b, c = sbuf((128, 64)), sbuf((128, 64)), sbuf((128, 4096))
        nisa.activation(a, nl.copy, sbuf((128, 64)))
        nisa.tensor_copy(sbuf((128, 64)), a, engine=nisa.engine.vector)
        nisa.tensor_copy(c, sbuf((128, 4096)), engine=nisa.engine.gpsimd)
        nisa.memset(b, 0.0, engine=nisa.engine.vector)
        nisa.tensor_copy(b, c[:, :64], engine=nisa.engine.gpsimd)
        nisa.tensor_tensor(b, a, a, nl.add, engine=nisa.engine.vector)

    t = timeline(body)
    found = t.stalls("vector")
    assert list(found) == [Cause.WAW, Cause.RAW]
    assert list(found.values()) == sorted(found.values(), reverse=True)
    index = t.members("vector")
    for cause, ns in found.items():
        assert ns == pytest.approx(t.stall[index][t.cause[index] == cause].sum())


def test_members_are_those_of_one_core_in_the_order_they_begin():
    def body():
        if nl.program_id(0) == 0:
            nisa.memset(sbuf((128, 64)), 0.0)
        nisa.memset(sbuf((128, 64)), 0.0)
        nisa.dma_copy(hbm((128, 64)), sbuf((128, 64)))
        nisa.dma_copy(sbuf((128, 4096)), hbm((128, 4096)))

    t = timeline(body, lnc=2)
    assert t.members("vector", 0).tolist() == [0, 1] and t.members("vector", 1).tolist() == [4]
    assert t.members("dma", 1).tolist() == [5, 6]
    assert t.busy("vector", 0) > t.busy("vector", 1) > 0
    begun = timeline(late_store).members("dma")
    assert begun.tolist() == [2, 1]


def late_store():
    """A store that waits for a long pass, and a load behind it in the program, not in time."""
    tile = sbuf((128, 8192))
    nisa.memset(tile, 0.0)
    nisa.dma_copy(hbm((128, 8192)), tile)
    nisa.dma_copy(sbuf((128, 64)), hbm((128, 64)))


def test_a_step_that_waited_for_a_lane_or_a_bank_begins_when_that_was_free():
    """Not when its result was there: a pipeline goes on after its engine took the next."""

    def turns():
        for _ in range(2):
            nisa.tensor_copy(sbuf((128, 512)), sbuf((128, 512)), engine=nisa.engine.vector)

    def bank():
        one = psum((128, 512))
        nisa.tensor_copy(sbuf((128, 512)), one, engine=nisa.engine.vector)
        nisa.activation(sbuf((128, 512)), nl.copy, one)

    for body, cause in ((turns, Cause.LANE), (bank, Cause.BANK)):
        first, second = timeline(body).critical_path()
        assert (first.index, second.index, second.cause) == (0, 1, cause)
        assert second.since == pytest.approx(572 / 0.96) == first.until
