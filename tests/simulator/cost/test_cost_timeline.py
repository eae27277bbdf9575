"""Timeline queries: critical path, busy time, stalls; overlap of access patterns."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from cost_helpers import hbm, nisa, nl, psum, sbuf, timeline
from hypothesis import given
from hypothesis import strategies as st

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
