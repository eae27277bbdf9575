"""Reductions, scans and statistics against loops; integers in fp32, so that sums are exact."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nsa_neuron.simulator.semantics import alu, reduction

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
F = np.float32

STEP = {
    "add": lambda a, b: F(a + b),
    "subtract": lambda a, b: F(a - b),
    "multiply": lambda a, b: F(a * b),
    "maximum": lambda a, b: max(a, b),
    "minimum": lambda a, b: min(a, b),
    "logical_and": lambda a, b: F(bool(a) and bool(b)),
    "logical_or": lambda a, b: F(bool(a) or bool(b)),
    "logical_xor": lambda a, b: F(bool(a) != bool(b)),
    "power": lambda a, b: F(a**b),
    "less": lambda a, b: F(a < b),
}
START = {"add": 0.0, "subtract": 0.0, "multiply": 1.0, "maximum": -math.inf, "minimum": math.inf}
whole = st.integers(-3, 3).map(float)
tiles = st.tuples(st.integers(1, 4), st.integers(1, 9)).flatmap(
    lambda shape: hnp.arrays(F, shape, elements=whole)
)


def folded(op, values):
    if op.startswith("logical"):
        total = F(bool(values[0]))
    else:
        total = values[0]
    for v in values[1:]:
        total = STEP[op](total, v)
    return total


@pytest.mark.parametrize("op", sorted(alu.IDENTITY))
@pytest.mark.parametrize("axes", [(3,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("negate", [False, True])
def test_tensor_reduce(op, axes, negate):
    data = np.random.default_rng(0).integers(-3, 4, (3, 2, 3, 2)).astype(F)
    got = reduction.tensor_reduce(data, op, axes, negate)
    assert got.dtype == F and got.shape == data.shape[: axes[0]]
    for i in np.ndindex(*got.shape):
        want = folded(op, data[i].ravel().tolist())
        assert got[i] == (-want if negate else want)


@pytest.mark.parametrize("op", ["bitwise_and", "bitwise_or", "bitwise_xor"])
@pytest.mark.parametrize("dtype", [np.int8, np.uint32])
def test_tensor_reduce_of_bits(op, dtype):
    data = np.random.default_rng(1).integers(0, 100, (3, 2, 5)).astype(dtype)
    data[0, 0, 0] = -1 if dtype == np.int8 else 2**32 - 1
    got = reduction.tensor_reduce_bitvec(data, op, (2,))
    mask = 2 ** (8 * data.dtype.itemsize) - 1
    for i in np.ndindex(3, 2):
        want = int(data[i][0]) & mask
        for v in data[i][1:].tolist():
            want = getattr(int, {"a": "__and__", "o": "__or__", "x": "__xor__"}[op[8]])(
                want, v & mask
            )
        assert int(got[i]) == want


def test_long_sums_keep_fp32_accuracy():
    data = np.full((2, 2**14), 0.1, F)
    exact = float(Fraction(float(F(0.1))) * 2**14)
    np.testing.assert_allclose(reduction.tensor_reduce(data, "add", (1,)), exact, rtol=1e-6)


@pytest.mark.parametrize("op", ["add", "multiply", "maximum", "minimum", "subtract"])
@settings(max_examples=25, deadline=None)
@given(tile=tiles, register=whole, init=whole)
def test_accumulator_commands(op, tile, register, init):
    lanes = tile.shape[0]
    before = np.full((lanes, 1), register, F)
    starts = {"reset_reduce": START[op], "reduce": register, "load_reduce": init}
    for command, start in starts.items():
        for value in (init, np.full((lanes, 1), init, F)):
            got = reduction.accumulate(op, tile, before, command, value)
            for p in range(lanes):
                want = STEP[op](F(start), folded(op, tile[p]))
                assert got[p, 0] == want
    assert np.array_equal(reduction.accumulate(op, tile, before, "idle"), before)
    reset = reduction.accumulate(op, tile, before, "reset")
    assert reset.tolist() == [[START[op]]] * lanes


@pytest.mark.parametrize("op1", ["add", "subtract", "multiply", "maximum", "minimum"])
@pytest.mark.parametrize("command", ["reset_reduce", "reduce", "load_reduce"])
@pytest.mark.parametrize("reverse", [False, True])
@settings(max_examples=15, deadline=None)
@given(tile=tiles, start=whole, imm=whole)
def test_tensor_scalar_cumulative(op1, command, reverse, tile, start, imm):
    lanes = tile.shape[0]
    register = np.full((lanes, 1), start, F)
    out, after = reduction.tensor_scalar_cumulative(
        tile, "subtract", op1, imm, register, command, start + 1, reverse
    )
    for p in range(lanes):
        state = {"reset_reduce": START[op1], "reduce": start, "load_reduce": start + 1}[command]
        state = F(state)
        for j, x in enumerate(tile[p]):
            new = F(imm - x) if reverse else F(x - imm)
            state = STEP[op1](new, state)
            assert out[p, j] == state or (math.isnan(out[p, j]) and math.isnan(state))
        np.testing.assert_array_equal(after[p, 0], out[p, -1])


def test_cumulative_rounds_at_every_step():
    tile = np.array([[16777216.0, 1.0, 1.0, -16777216.0]], F)  # 2**24 + 1 is not an fp32 number
    out, _ = reduction.tensor_scalar_cumulative(tile, "add", "add", 0.0, np.zeros((1, 1), F))
    assert out.tolist() == [[16777216.0, 16777216.0, 16777216.0, 0.0]]
    shape = (2, 3, 2)
    data = np.arange(12, dtype=F).reshape(shape)
    out, _ = reduction.tensor_scalar_cumulative(data, "add", "add", 0.0, np.zeros((2, 1), F))
    assert out.shape == shape and out.reshape(2, 6)[1].tolist() == [6, 13, 21, 30, 40, 51]


@pytest.mark.parametrize("op0", ["multiply", "add", "maximum", "subtract", "less"])
@pytest.mark.parametrize("op1", ["add", "multiply", "maximum", "subtract"])
@pytest.mark.parametrize("reverse", [(False, False), (True, False), (False, True)])
@settings(max_examples=10, deadline=None)
@given(data0=tiles, ones=st.booleans(), initial=whole, seed=st.integers(0, 99))
def test_tensor_tensor_scan(op0, op1, reverse, data0, ones, initial, seed):
    data0 = np.ones_like(data0) if ones else data0
    data1 = np.random.default_rng(seed).integers(-2, 3, data0.shape).astype(F)
    for start in (initial, np.full((data0.shape[0], 1), initial, F)):
        got = reduction.tensor_tensor_scan(data0, data1, start, op0, op1, *reverse)
        assert got.dtype == F and got.shape == data0.shape
        for p in range(data0.shape[0]):
            state = F(initial)
            for j in range(data0.shape[1]):
                a, b = data0[p, j], data1[p, j]
                inner = STEP[op0](state, a) if reverse[0] else STEP[op0](a, state)
                state = STEP[op1](b, inner) if reverse[1] else STEP[op1](inner, b)
                assert got[p, j] == state


def test_scan_rounds_at_every_step_on_both_paths():
    data1 = np.array([[16777216.0, 1.0, 1.0, -16777216.0]], F)
    ones = np.ones_like(data1)
    fast = reduction.tensor_tensor_scan(ones, data1, 0.0, "multiply", "add")
    slow = reduction.tensor_tensor_scan(ones, data1, 0.0, "maximum", "add")
    assert fast.tolist() == [[16777216.0, 16777216.0, 16777216.0, 0.0]]
    assert slow.tolist() == fast.tolist()
    half = reduction.tensor_tensor_scan(ones * F(0.5), data1, 2.0, "multiply", "add")
    assert half.tolist() == [[16777216.0, 8388609.0, 4194305.5, -14680063.0]]


@settings(max_examples=60, deadline=None)
@given(tile=hnp.arrays(F, st.tuples(st.integers(1, 3), st.integers(1, 33)), elements=whole))
def test_bn_stats_and_aggr(tile):
    got = reduction.bn_stats(tile)
    assert got.shape == (tile.shape[0], 6)
    for p, row in enumerate(tile.tolist()):
        for base, half in ((0, row[0::2]), (3, row[1::2])):
            n = len(half)
            mean = sum(half) / n if n else 0.0
            scatter = sum((v - mean) ** 2 for v in half)
            np.testing.assert_allclose(
                got[p, base : base + 3], [n, mean, scatter], rtol=1e-5, atol=1e-5
            )
    aggregate = reduction.bn_aggr(got)
    want = [[np.mean(r), np.var(r)] for r in tile.astype(np.float64)]
    np.testing.assert_allclose(aggregate, want, rtol=1e-5, atol=1e-5)


def test_bn_aggr_of_several_tiles():
    data = np.random.default_rng(3).uniform(0, 100, (4, 3, 50)).astype(F)
    stats = np.concatenate([reduction.bn_stats(data[:, i]) for i in range(3)], axis=1)
    got = reduction.bn_aggr(stats.reshape(4, 3, 6))
    flat = data.reshape(4, -1).astype(np.float64)
    np.testing.assert_allclose(got[:, 0], flat.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(got[:, 1], flat.var(axis=1), rtol=1e-5)
    assert np.isnan(reduction.bn_aggr(np.zeros((1, 3), F))).all()
