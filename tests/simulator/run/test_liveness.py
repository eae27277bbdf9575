"""Capacity: peaks against brute force, quarters of the partitions, two cores, growth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_neuron import simulator
from nsa_neuron.simulator.issue.record import CoreTrace
from nsa_neuron.simulator.machine.dtypes import uint8
from nsa_neuron.simulator.machine.trn2 import TRN2
from nsa_neuron.simulator.memory.allocation import allocation_of
from nsa_neuron.simulator.memory.layout import Form
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl
from nsa_neuron.simulator.run import liveness, overlap
from nsa_neuron.simulator.run.coverage import Coverage, quarters, quarters_of

WIDTHS = {32: 1, 64: 2, 96: 4, 128: 4}


def tile(partitions, size, first, last, address=None):
    """A tensor of so many bytes per partition that lives from `first` to `last`."""
    form = Form("sbuf", (partitions, size), uint8, address)
    made = allocation_of(form, 0, 0, "", 0, None, "scratch")
    made.first_use, made.last_use = first, last
    return made


def by_hand(tiles):
    """Bytes needed at each instant: placed bytes as sets, then the largest tile first."""
    worst = 0
    for t in range(max(a.last_use for a in tiles) + 1):
        there = [a for a in tiles if a.first_use <= t <= a.last_use]
        taken = [set(), set(), set(), set()]
        for a in there:
            if a.address:
                for p in range(a.address[0], a.address[0] + a.partitions):
                    taken[p // 32] |= set(range(a.address[1], a.address[1] + a.pitch_bytes))
        loads = [len(s) for s in taken]
        free = sorted((a for a in there if not a.address), key=lambda a: -a.pitch_bytes)
        for width in (4, 2, 1):
            for a in free:
                if WIDTHS[a.partitions] == width:
                    starts = range(0, 4, width)
                    at = min(starts, key=lambda s: max(loads[s : s + width]))
                    top = max(loads[at : at + width]) + a.pitch_bytes
                    loads[at : at + width] = [top] * width
        worst = max(worst, *loads)
    return worst


lives = st.tuples(st.integers(0, 12), st.integers(0, 6)).map(lambda x: (x[0], x[0] + x[1]))
shapes = st.tuples(st.sampled_from([32, 64, 96, 128]), st.integers(1, 40))
whole = st.tuples(shapes, lives).map(lambda x: tile(*x[0], *x[1]))
placed = st.tuples(shapes, lives, st.sampled_from([0, 8, 16, 30])).map(
    lambda x: tile(*x[0], *x[1], (0 if x[0][0] > 64 else 64, x[2]))
)


@settings(max_examples=150)
@given(st.lists(st.one_of(whole, placed), min_size=1, max_size=12))
def test_the_peak_is_that_of_brute_force(tiles):
    need, there = liveness.peak(CoreTrace(0, allocations=tiles), "sbuf", TRN2)
    assert need == by_hand(tiles)
    assert sorted(-a.pitch_bytes for a in there) == [-a.pitch_bytes for a in there]


@settings(max_examples=60)
@given(st.lists(st.one_of(whole, placed), min_size=1, max_size=12))
def test_sweeping_finds_at_most_a_little_less(tiles):
    """The instant of the largest area, where several tensors share addresses at many instants."""
    made = liveness._Tiles(tiles, TRN2)
    swept = made.need(made._sweep())
    assert swept <= by_hand(tiles) <= swept + 2 * max(a.pitch_bytes for a in tiles)
    if all(a.address and a.partitions == 128 for a in tiles):
        assert swept == by_hand(tiles)


@settings(max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), min_size=1, max_size=10))
def test_coverage_counts_each_byte_once(spans):
    spans = [(a, a + n) for a, n in spans]
    cover = Coverage(spans)
    for k, span in enumerate(spans):
        cover.change(*span, 1)
        assert cover.covered == len(set().union(*(range(*s) for s in spans[: k + 1])))
    for k, span in enumerate(spans):
        cover.change(*span, -1)
        assert cover.covered == len(set().union(*(range(*s) for s in spans[k + 1 :])))


def test_quarters_of_the_partitions():
    found = {n: quarters(tile(n, 4, 0, 1), TRN2) for n in (1, 32, 33, 64, 65, 96, 97, 128)}
    assert found == {1: 1, 32: 1, 33: 2, 64: 2, 65: 4, 96: 4, 97: 4, 128: 4}
    for first, partitions, there in [
        (0, 1, [0]), (0, 32, [0]), (0, 33, [0, 1]), (32, 32, [1]), (64, 64, [2, 3]), (96, 5, [3]),
        (0, 128, [0, 1, 2, 3]), (32, 33, [1, 2]),
    ]:  # fmt: skip
        assert [*quarters_of(tile(partitions, 4, 0, 1, (first, 8)), TRN2)] == there
    bank = allocation_of(Form("psum", (1, 4), uint8, (96, 0)), 0, 0, "", 0, None, "scratch")
    assert quarters(bank, TRN2) == 4 and [*quarters_of(bank, TRN2)] == [0, 1, 2, 3]


@pytest.mark.parametrize("partitions", [64, 32])
def test_tiles_on_different_partitions_share_a_column(partitions):
    def kernel(x):
        tiles = [nl.ndarray((partitions, 60_000), nl.bfloat16) for _ in range(128 // partitions)]
        for t in tiles:
            nisa.memset(t, 1.0)
        for t in tiles:
            nisa.tensor_scalar(t, t, nl.add, 1.0)
        out = nl.ndarray((partitions, 60_000), nl.bfloat16, buffer=nl.shared_hbm)
        nisa.dma_copy(out, tiles[0])
        return out

    simulated = simulator.simulate(kernel, data=False)
    simulated(simulator.ShapeDtype((1, 1), "float32"))
    assert simulated.run.peaks[0]["sbuf"] == 120_000
    again = simulator.profile(kernel)(simulator.ShapeDtype((1, 1), "float32"))
    assert again.to_dict()["cores"][0]["memory"]["sbuf"]["peak"] == 120_000


def test_a_third_half_needs_a_column_of_its_own():
    def kernel(x):
        tiles = [nl.ndarray((64, 60_000), nl.bfloat16) for _ in range(3)]
        for t in (*tiles, *tiles):
            nisa.memset(t, 1.0)

    with pytest.raises(simulator.CapacityError, match="3 tensors in SBUF") as caught:
        simulator.simulate(kernel)(np.zeros((1, 1), np.float32))
    assert caught.value.value == 240_000
    (row,) = caught.value.table
    assert row.startswith("3 x 120,000 bytes per partition: tensor [64, 60000] bfloat16, made at")


def halves(a):
    out = nl.ndarray((2, 128, 64), nl.float32, buffer=nl.shared_hbm)
    me = nl.program_id(0)
    t = nl.ndarray((128, 64), nl.float32)
    for _ in range(10 if me == 0 else 0):
        nisa.memset(t, 0.0)
    nisa.memset(t, 1.0)
    nisa.dma_copy(out[me], t)
    return out


@pytest.mark.parametrize("data", [True, False])
def test_cores_of_different_length_share_hbm(data):
    """Their instructions have no common order, so what they share lives all the while."""
    simulated = simulator.simulate(simulator.Kernel(halves, 2), data=data)
    out = simulated(np.zeros((1, 1), np.float32))
    assert not data or (out == 1.0).all()
    assert liveness.check_hbm(simulated.run, TRN2) == 4 + 2 * 128 * 64 * 4


def test_shared_hbm_of_two_cores_counts_against_the_stack():
    def kernel(x):
        me = nl.program_id(0)
        for _ in range(3):  # one after the other, but no order between the cores says so
            big = nl.ndarray((2, 2**31), nl.float32, buffer=nl.shared_hbm)
            nisa.dma_copy(big[me : me + 1, 0:1], nl.zeros((1, 1), nl.float32))
        return x

    call = simulator.simulate(simulator.Kernel(kernel, 2), data=False)
    with pytest.raises(simulator.CapacityError, match="tensors in HBM are live at once, in bytes"):
        call(simulator.ShapeDtype((1, 1), "float32"))


@pytest.mark.parametrize("count", [1_000, 16_000])
def test_bookkeeping_looks_at_few_instants_and_few_neighbours(count, monkeypatch):
    """Rotating buffers at addresses, as AWS's allocators make them: no work per pair of tiles."""
    tiles = [tile(128, 2048, k, k + 2, (0, 2048 * (k % 8))) for k in range(count)]
    looks, pairs = [], []
    need, common = liveness._Tiles.need, overlap._common
    monkeypatch.setattr(liveness._Tiles, "need", lambda self, t: looks.append(t) or need(self, t))
    monkeypatch.setattr(overlap, "_common", lambda a, b: pairs.append(a) or common(a, b))
    assert liveness.peak(CoreTrace(0, allocations=tiles), "sbuf", TRN2)[0] == 3 * 2048
    overlap.check(CoreTrace(0, allocations=tiles), tiles)
    assert len(looks) <= liveness._LOOKS + 1
    assert len(pairs) <= count
