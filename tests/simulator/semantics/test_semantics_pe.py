"""Matrix multiplication, PSUM accumulation and transposition against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_neuron.simulator.machine import dtypes
from nsa_neuron.simulator.semantics import pe

F = np.float32


def random(shape, dtype, seed):
    """Small exact values of a type, raw."""
    values = np.random.default_rng(seed).integers(-4, 5, shape).astype(F) / 2
    return dtypes.convert(values, dtypes.resolve(dtype).numpy)


def product(stationary, moving):
    """stationary.T @ moving by loops, contraction over axis 0 (exact for small values)."""
    k, m, n = len(stationary), len(stationary[0]), len(moving[0])
    return [
        [sum(stationary[x][i] * moving[x][j] for x in range(k)) for j in range(n)] for i in range(m)
    ]


@pytest.mark.parametrize("pair", [("bfloat16", "float16"), ("float8_e4m3", "float8_e5m2")])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 3, 5), (128, 4, 9)])
def test_matmul(pair, sizes):
    k, m, n = sizes
    a, b = random((k, m), pair[0], 1), random((k, n), pair[1], 2)
    got = pe.matmul(dtypes.load_f32(a), dtypes.load_f32(b))
    assert got.dtype == F
    want = product(a.astype(float).tolist(), b.astype(float).tolist())
    assert got.tolist() == want


@pytest.mark.parametrize(("m", "n"), [(49, 1), (1, 49), (7, 1), (1, 1), (5, 3)])
def test_bits_of_a_product_do_not_hang_on_its_place(m, n):
    """BLAS multiplies a matrix and a vector in another order for the last rows."""
    rng = np.random.default_rng(m)
    for k in (17, 49, 127):
        stationary, moving = (rng.standard_normal((k, x)).astype(np.float32) for x in (m, n))
        whole = pe.matmul(stationary, moving)
        assert whole.shape == (m, n)
        for first in range(m):
            for column in range(n):
                part = pe.matmul(stationary[:, first:], moving[:, column:])
                assert np.array_equal(part, whole[first:, column:])
        out = np.empty((m, n), np.float32)
        assert pe.matmul(stationary, moving, out) is out and np.array_equal(out, whole)


def test_matmul_flattens_free_axes_in_view_order():
    a, b = random((6, 2, 3), "float32", 3), random((6, 2, 2, 2), "float32", 4)
    got = pe.matmul(a, b.transpose(0, 3, 1, 2))
    want = product(a.reshape(6, 6).tolist(), b.transpose(0, 3, 1, 2).reshape(6, 8).tolist())
    assert got.tolist() == want


def test_double_row_contracts_over_partitions_and_pairs():
    a, b = random((5, 2, 3), "float8_e4m3", 5), random((5, 2, 4), "float8_e5m2", 6)
    got = pe.matmul_double_row(dtypes.load_f32(a), dtypes.load_f32(b))
    x, y = a.astype(float), b.astype(float)
    for i in range(3):
        for j in range(4):
            want = sum(x[k, r, i] * y[k, r, j] for k in range(5) for r in range(2))
            assert got[i, j] == want


def test_products_of_narrow_floats_and_sums_are_kept_in_fp32():
    a = np.array([[1 + 2.0**-7], [1.0]], F).astype(dtypes.bfloat16.numpy)
    got = pe.matmul(dtypes.load_f32(a), dtypes.load_f32(a))
    assert got[0, 0] == (1 + 2.0**-7) ** 2 + 1.0


def test_tf32_views_are_rounded_when_read():
    raw = np.array([[1 + 2.0**-12, 1 + 2.0**-10 + 2.0**-11]], F)
    assert pe.operand(raw, dtypes.float32) is raw
    assert pe.operand(raw, dtypes.tfloat32).tolist() == [[1.0, 1 + 2.0**-9]]


@pytest.mark.parametrize("accumulate", [False, True, None])
def test_psum_update(accumulate):
    old, new = random((4, 2, 3), "float32", 7), random((4, 6), "float32", 8)
    written = np.random.default_rng(9).integers(0, 2, (4, 2, 3)).astype(bool)
    got = old.copy()
    pe.psum_update(got, new, accumulate, written)
    for i in np.ndindex(4, 2, 3):
        value = new.reshape(4, 2, 3)[i]
        adds = written[i] if accumulate is None else accumulate
        assert got[i] == (old[i] + value if adds else value)


def test_psum_update_with_one_state_for_all_elements():
    old, new = np.full((2, 2), math.nan, F), np.ones((2, 2), F)
    for accumulate, written, left in ((None, False, 1), (False, True, 1), (None, True, math.nan)):
        out = old.copy()
        pe.psum_update(out, new, accumulate, np.full((2, 2), written))
        np.testing.assert_array_equal(out, np.full((2, 2), left, F))


@settings(max_examples=80, deadline=None)
@given(
    stride=st.integers(0, 3),
    rows=st.integers(1, 4),
    width=st.integers(1, 4),
    accumulate=st.sampled_from([False, True, None]),
    seed=st.integers(0, 1000),
)
def test_overlapping_destinations(stride, rows, width, accumulate, seed):
    rng = np.random.default_rng(seed)
    flat = rng.integers(-5, 6, 20).astype(F)
    written = rng.integers(0, 2, 20).astype(bool)
    index = stride * np.arange(rows)[:, None] + np.arange(width)
    values = rng.integers(-5, 6, (rows, width)).astype(F)
    want, seen = flat.tolist(), written.tolist()
    for position, value in zip(index.ravel(), values.ravel().tolist(), strict=True):
        adds = seen[position] if accumulate is None else accumulate
        want[position] = want[position] + value if adds else value
        seen[position] = True
    pe.psum_update_overlapping(flat, index, values, accumulate, written)
    assert flat.tolist() == want and written.tolist() == seen


@pytest.mark.parametrize("name", ["bfloat16", "float32", "uint8", "int32", "float8_e5m2"])
def test_transposition_is_bit_exact(name):
    dtype = dtypes.resolve(name).numpy
    raw = np.random.default_rng(0).integers(0, 256, (5, 6 * dtype.itemsize), np.uint8).view(dtype)
    got = pe.transpose(raw.reshape(5, 2, 3))
    identity = np.eye(5, dtype=F)
    by_matmul = pe.transpose_mode(raw, identity)
    for i in range(6):
        for j in range(5):
            assert dtypes.bits(got)[i, j] == dtypes.bits(raw)[j, i]
            assert dtypes.bits(np.ascontiguousarray(by_matmul))[i, j] == dtypes.bits(raw)[j, i]


def test_transpose_mode_accepts_permutations_and_partial_identities():
    data = np.array([[1.0, math.nan], [2.0, math.inf], [3.0, -0.0]], F)
    order = np.zeros((3, 4), F)
    order[2, 0] = order[0, 1] = order[1, 3] = 1
    got = pe.transpose_mode(data, order)
    np.testing.assert_array_equal(got, [[3, 1, 0, 2], [-0.0, math.nan, 0, math.inf]])
    assert np.signbit(got[1, 0]) and not np.signbit(got[1, 2])


@pytest.mark.parametrize(
    "bad", [2 * np.eye(3, dtype=F), np.ones((3, 3), F), np.full((3, 3), 0.5, F)]
)
def test_transpose_mode_refuses_what_is_not_one_hot(bad):
    with pytest.raises(ValueError, match="at most a single 1"):
        pe.transpose_mode(np.zeros((3, 2), F), bad)


def test_fp8_transposes_into_16_bit_elements():
    raw = np.array([[0x38, 0xFF]], np.uint8).view(dtypes.float8_e4m3.numpy)
    assert pe.widen_fp8(raw).tolist() == [[0x0038, 0x00FF]]
