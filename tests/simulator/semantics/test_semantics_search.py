"""max8, find_index8, match_replace8 and the stream shuffle against loops, ties included."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nsa_neuron.simulator.machine import dtypes
from nsa_neuron.simulator.semantics import search

F = np.float32
few = st.sampled_from([F(0), F(-0.0), F(1), F(2), F(-3), F(math.inf), F(-math.inf)])
tiles = st.tuples(st.integers(1, 3), st.integers(8, 20)).flatmap(
    lambda shape: hnp.arrays(F, shape, elements=few)
)


@settings(max_examples=80, deadline=None)
@given(tile=tiles)
def test_max8_keeps_duplicates_in_descending_order(tile):
    before = tile.copy()
    got = search.max8(tile)
    assert got.shape == (tile.shape[0], 8) and got.dtype == F
    for p, row in enumerate(tile.tolist()):
        assert got[p].tolist() == sorted(row, reverse=True)[:8]
    assert np.array_equal(tile, before)


def test_max8_flattens_free_axes():
    tile = np.arange(48, dtype=F).reshape(2, 2, 3, 4)
    assert search.max8(tile)[0].tolist() == list(range(23, 15, -1))


def choose(row, vals, order):
    """Each value, in the given order, takes the first matching element that is still free."""
    index, taken = [None] * 8, set()
    for i in order:
        for j, v in enumerate(row):
            if j not in taken and v == vals[i]:
                taken.add(j)
                index[i] = j
                break
    return [0xFFFFFFFF if j is None else j for j in index], taken


@settings(max_examples=150, deadline=None)
@given(tile=tiles, data=st.data())
def test_find_and_replace_take_matches_in_documented_order(tile, data):
    vals = data.draw(hnp.arrays(F, (tile.shape[0], 8), elements=few | st.just(F(9))))
    before = tile.copy()
    found = search.nc_find_index8(tile, vals)
    replaced, index = search.nc_match_replace8(tile, vals, -7.0)
    assert found.dtype == index.dtype == np.uint32
    for p, row in enumerate(tile.tolist()):
        assert found[p].tolist() == choose(row, vals[p].tolist(), range(8))[0]
        want, taken = choose(row, vals[p].tolist(), range(7, -1, -1))
        assert index[p].tolist() == want
        assert replaced[p].tolist() == [-7.0 if j in taken else v for j, v in enumerate(row)]
    assert np.array_equal(tile, before)


def test_the_documented_example_of_match_replace8():
    data = np.array([[1, 2, 3, 4, 8, 8, 8, 8, 8, 8, 8]], F)
    vals = np.array([[3, 8, 8, 8, 8, 8, 8, 8]], F)
    _, index = search.nc_match_replace8(data, vals, 0.0)
    assert index.tolist() == [[2, 10, 9, 8, 7, 6, 5, 4]]
    assert search.nc_find_index8(data, vals).tolist() == [[2, 4, 5, 6, 7, 8, 9, 10]]


def test_absent_values_give_all_ones_in_either_width():
    index = search.nc_find_index8(np.zeros((1, 8), F), np.full((1, 8), math.nan, F))
    for dtype, ones in ((np.uint32, 0xFFFFFFFF), (np.uint16, 0xFFFF)):
        out = np.zeros((1, 8), dtype)
        dtypes.store_bits(out, index)
        assert out.tolist() == [[ones] * 8]


def test_replacing_by_a_searched_value_does_not_match_again():
    data = np.arange(1, 9, dtype=F)[None]
    vals = np.array([[5, 8, 8, 8, 8, 8, 8, 4]], F)
    replaced, index = search.nc_match_replace8(data, vals, 8.0)
    assert replaced.tolist() == [[1, 2, 3, 8, 8, 6, 7, 8]]
    assert index.tolist() == [[4] + [0xFFFFFFFF] * 5 + [7, 3]]


def test_three_rounds_of_max8_and_match_replace8_give_the_top_24():
    data = np.random.default_rng(0).integers(0, 30, (4, 64)).astype(F)
    work, top = data, []
    for _ in range(3):
        best = search.max8(work)
        top.append(best)
        work, _ = search.nc_match_replace8(work, best, -math.inf)
    want = -np.sort(-data, axis=1)[:, :24]
    assert np.array_equal(np.concatenate(top, axis=1), want)


@settings(max_examples=60, deadline=None)
@given(
    mask=st.lists(st.integers(0, 31) | st.just(255), min_size=32, max_size=32),
    quadrants=st.integers(1, 4),
    name=st.sampled_from(["float32", "bfloat16", "uint8"]),
)
def test_stream_shuffle(mask, quadrants, name):
    dtype = dtypes.resolve(name).numpy
    rng = np.random.default_rng(len(set(mask)))
    rows = 32 * quadrants
    dst, src = (
        rng.integers(0, 256, (rows, 3 * dtype.itemsize), np.uint8).view(dtype) for _ in range(2)
    )
    got = search.nc_stream_shuffle(dst, src, mask)
    for p in range(rows):
        quadrant, i = divmod(p, 32)
        source = dst[p] if mask[i] == 255 else src[32 * quadrant + mask[i]]
        assert dtypes.bits(got)[p].tolist() == dtypes.bits(source).tolist()


def test_stream_shuffle_broadcasts_one_partition_and_works_in_place():
    src = np.arange(6, dtype=np.int16).reshape(1, 2, 3)
    got = search.nc_stream_shuffle(np.zeros((20, 6), np.int16), src, [0] * 32)
    assert (got == src.reshape(1, 6)).all()
    tile = np.arange(32, dtype=np.int32)[:, None]
    rotated = search.nc_stream_shuffle(tile, tile, [(i - 1) % 32 for i in range(32)])
    assert rotated[:, 0].tolist() == [31, *range(31)]
    with pytest.raises(IndexError):
        search.nc_stream_shuffle(np.zeros((32, 6), np.int16), src, [1] * 32)
