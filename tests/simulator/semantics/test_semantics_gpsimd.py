"""POOL instructions against loops that follow the documented pseudo-code."""

from __future__ import annotations

import math
import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_neuron.simulator.machine import dtypes
from nsa_neuron.simulator.semantics import gpsimd

F = np.float32
COMPARE = {
    **{"equal": operator.eq, "not_equal": operator.ne, "less": operator.lt},
    **{"less_equal": operator.le, "greater": operator.gt, "greater_equal": operator.ge},
}
patterns = st.lists(st.tuples(st.integers(-50, 50), st.integers(1, 4)), min_size=1, max_size=4)


def affine(lanes, pattern, offset, multiplier):
    """The pseudo-code of nisa.iota, any number of nested loops."""
    nums = [num for _, num in pattern]
    return [
        [
            offset + p * multiplier + sum(s * i for (s, _), i in zip(pattern, at, strict=True))
            for at in np.ndindex(*nums)
        ]
        for p in range(lanes)
    ]


@settings(max_examples=60, deadline=None)
@given(
    pattern=patterns,
    lanes=st.integers(1, 5),
    offset=st.integers(-1000, 1000),
    multiplier=st.integers(-200, 200),
)
def test_iota(pattern, lanes, offset, multiplier):
    got = gpsimd.iota(lanes, pattern, offset, multiplier)
    assert got.dtype == np.int32 and got.tolist() == affine(lanes, pattern, offset, multiplier)


def test_iota_wraps_in_int32():
    got = gpsimd.iota(2, [[1, 3]], 2**31 - 1, 2**31)
    want = [
        [(v + 2**31) % 2**32 - 2**31 for v in row] for row in affine(2, [[1, 3]], 2**31 - 1, 2**31)
    ]
    assert got.tolist() == want


@pytest.mark.parametrize("cmp_op", COMPARE)
@settings(max_examples=15, deadline=None)
@given(pattern=patterns, offset=st.integers(-20, 20), multiplier=st.integers(-5, 5))
def test_affine_select(cmp_op, pattern, offset, multiplier):
    values = affine(3, pattern, offset, multiplier)
    count = len(values[0])
    for dtype in (dtypes.float32, dtypes.bfloat16, dtypes.int32):
        raw = np.arange(3 * count, dtype=np.int32).reshape(3, count)
        on_true = raw if dtype is dtypes.int32 else dtypes.convert(raw, dtype.numpy)
        got = gpsimd.affine_select(on_true, pattern, multiplier, -2.5, cmp_op, offset)
        assert got.dtype == dtype.numpy
        fill = dtypes.convert(np.array([-2.5], F), dtype.numpy)[0]
        for i in np.ndindex(3, count):
            want = on_true[i] if COMPARE[cmp_op](values[i[0]][i[1]], 0) else fill
            assert got[i] == want


def test_affine_select_of_same_type_keeps_bits_of_large_integers():
    data = np.array([[2**31 - 1, 16777217]], np.int32)
    got = gpsimd.affine_select(data, [[1, 2]], 0, 0.0, "greater_equal")
    assert got.tolist() == data.tolist()


@settings(max_examples=40, deadline=None)
@given(
    cores=st.integers(1, 3),
    columns=st.integers(1, 3),
    elems=st.sampled_from([1, 2, 4]),
    drop=st.integers(0, 15),
    seed=st.integers(0, 1000),
)
def test_local_gather(cores, columns, elems, drop, seed):
    rng = np.random.default_rng(seed)
    lanes = 16 * cores
    src = rng.integers(0, 999, (lanes, 5, 4)).astype(np.int32)
    index = rng.integers(0, 20 - elems + 1, (lanes, columns)).astype(np.uint16)
    valid = None if drop == 0 else 16 * columns - drop
    got = gpsimd.local_gather(src, index, elems, valid)
    used = 16 * columns if valid is None else valid
    assert got.shape == (lanes, used * elems)
    for p in range(lanes):
        core = p // 16 * 16
        want = []
        for entry in range(used):
            start = int(index[core + entry % 16, entry // 16])
            want += src[p].ravel()[start : start + elems].tolist()
        assert got[p].tolist() == want


def test_gathers_refuse_indices_outside():
    with pytest.raises(IndexError):
        gpsimd.local_gather(np.zeros((16, 4)), np.full((16, 1), 4, np.uint16))
    with pytest.raises(IndexError):
        gpsimd.nc_n_gather(np.zeros((2, 4)), np.full((2, 1), 4, np.uint32))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), lanes=st.integers(1, 6))
def test_nc_n_gather(seed, lanes):
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 2**16, (lanes, 2, 5)).astype(np.uint16).view(dtypes.bfloat16.numpy)
    indices = rng.integers(0, 10, (lanes, 3, 4)).astype(np.uint32)
    got = gpsimd.nc_n_gather(data, indices)
    assert got.shape == indices.shape and got.dtype == data.dtype
    for i in np.ndindex(*indices.shape):
        want = dtypes.bits(data)[i[0]].ravel()[indices[i]]
        assert dtypes.bits(got)[i] == want


def test_the_documented_example_of_sequence_bounds():
    ids = np.array([[0, 1, 1, 2, 2, 2, 0, 3, 3]], np.int32)
    got = gpsimd.sequence_bounds(ids)
    assert got.tolist() == [[[9, 1, 1, 3, 3, 3, 9, 7, 7], [-1, 3, 3, 6, 6, 6, -1, 9, 9]]]


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_sequence_bounds(ids):
    got = gpsimd.sequence_bounds(np.array([ids], F))
    for i, v in enumerate(ids):
        first = last = i
        while first > 0 and ids[first - 1] == v:
            first -= 1
        while last + 1 < len(ids) and ids[last + 1] == v:
            last += 1
        want = [len(ids), -1] if v == 0 else [first, last + 1]
        assert got[0, :, i].tolist() == want


@pytest.mark.parametrize("start", [0, 32, 8, 20])
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_nonzero_with_count(start, dtype):
    src = np.random.default_rng(0).integers(0, 2, (40, 7)).astype(dtype)
    dst = np.full((40, 8), 99, np.int32)
    got = gpsimd.nonzero_with_count(dst, src, 16, -3, start)
    for p in range(40):
        if (start + p) % 16:
            assert got[p].tolist() == [99] * 8
            continue
        found = [i + 16 for i in range(7) if src[p, i] != 0]
        assert got[p].tolist() == found + [-3] * (7 - len(found)) + [len(found)]
    assert (dst == 99).all()


def test_the_documented_example_of_nonzero_with_count():
    src = np.array([[0, 1, 1, 0, 0, 1, 0, 0]], np.int32)
    got = gpsimd.nonzero_with_count(np.zeros((1, 9), np.int32), src, 16, -1)
    assert got.tolist() == [[17, 18, 21, -1, -1, -1, -1, -1, 3]]
    tricky = np.array([[-0.0, math.nan]], F)
    got = gpsimd.nonzero_with_count(np.zeros((1, 3), np.int32), tricky)
    assert got.tolist() == [[1, -1, 1]]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(8, 48), data=st.data(), seed=st.integers(0, 1000))
def test_topk(n, data, seed):
    k = data.draw(st.integers(1, n))
    src = np.random.default_rng(seed).integers(0, 9, (32, 3)).astype(F)
    values, index = gpsimd.topk(src, n, k)
    assert index.dtype == np.uint32
    for p in range(32):
        group = src[p // 16 * 16 : p // 16 * 16 + 16]
        snake = [group[e % 16, e // 16] for e in range(n)]
        best = sorted(range(n), key=lambda e: (-snake[e], e))[:k][::-1]
        assert index[p].tolist() == best
        assert values[p].tolist() == [snake[e] for e in best]


@pytest.mark.parametrize("op", ["add", "average", "maximum"])
def test_tensor_partition_reduce(op):
    data = np.random.default_rng(1).integers(-9, 9, (8, 2, 3)).astype(F)
    got = gpsimd.tensor_partition_reduce(data, op)
    assert got.shape == (1, 2, 3) and got.dtype == F
    for i in np.ndindex(2, 3):
        column = data[(slice(None), *i)].tolist()
        want = max(column) if op == "maximum" else sum(column) / (8 if op == "average" else 1)
        assert got[(0, *i)] == want


@pytest.mark.parametrize("op", ["bitwise_or", "bitwise_and"])
def test_tensor_partition_reduce_of_bits(op):
    data = np.random.default_rng(2).integers(-128, 128, (5, 3)).astype(np.int8)
    got = gpsimd.tensor_partition_reduce(data, op)
    for j in range(3):
        want = int(data[0, j])
        for v in data[1:, j].tolist():
            want = want | v if op == "bitwise_or" else want & v
        assert got[0, j] == want % 256
