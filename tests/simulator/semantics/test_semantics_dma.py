"""DMA transposition, gather, scatter and compute against loops."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_neuron.simulator.machine import dtypes
from nsa_neuron.simulator.semantics import dma

BF16 = dtypes.bfloat16.numpy


def raw(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 2**16, shape).astype(np.uint16).view(BF16)


def test_transpose_permutations():
    a2, a3, a4 = raw((3, 4)), raw((2, 3, 4)), raw((2, 3, 4, 5))
    for i in np.ndindex(4, 3):
        assert dtypes.bits(dma.transpose(a2))[i] == dtypes.bits(a2)[i[1], i[0]]
    for i in np.ndindex(4, 3, 2):
        assert dtypes.bits(dma.transpose(a3))[i] == dtypes.bits(a3)[i[2], i[1], i[0]]
    for i in np.ndindex(5, 3, 4, 2):
        assert dtypes.bits(dma.transpose(a4))[i] == dtypes.bits(a4)[i[3], i[1], i[2], i[0]]


@settings(max_examples=30, deadline=None)
@given(lanes=st.integers(1, 6), columns=st.integers(1, 4), data=st.data())
def test_transpose_indices_run_down_the_columns(lanes, columns, data):
    index = np.arange(lanes * columns, dtype=np.uint32).reshape(lanes, columns)[:, ::-1]
    count = data.draw(st.integers(1, lanes * columns))
    want = [int(index[p, c]) for c in range(columns) for p in range(lanes)][:count]
    assert dma.transpose_indices(index, count).tolist() == want


def test_which_indices_address_a_row():
    wanted = np.array([-(2**31), -1, 0, 3, 4, 2**32 - 1], np.int64)
    assert dma.in_bounds(wanted, 4).tolist() == [False, False, True, True, False, False]
    assert not dma.in_bounds(wanted, 0).any()


def test_compute_adds_in_fp32_from_first_to_last():
    tiles = [np.full((2, 3), v, np.float32) for v in (16777216.0, 1.0, 1.0, -16777216.0)]
    before = tiles[0].copy()
    tiles[2] = tiles[2].reshape(3, 2)
    got = dma.compute(tiles)
    assert got.shape == (2, 3) and (got == 0.0).all()
    assert np.array_equal(tiles[0], before)
    assert np.isnan(dma.compute([tiles[0], np.full((2, 3), math.nan, np.float32)])).all()
