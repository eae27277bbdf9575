"""Vector Engine: reductions, scans and statistics."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isa_helpers import (
    BF16,
    F16,
    F32,
    FLOATS,
    close,
    f32,
    in_psum,
    integers,
    new,
    normal,
    ps,
    refused,
    sb,
    simulated,
)
from told import tells

from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl


def _subtract(x, axis):
    first, rest = np.split(x, [1], axis=axis[0] if isinstance(axis, tuple) else axis)
    return first.sum(axis=axis) - rest.sum(axis=axis)


REDUCTIONS = {
    "add": np.sum,
    "multiply": np.prod,
    "maximum": np.max,
    "minimum": np.min,
    "logical_and": lambda x, axis: np.all(x != 0, axis=axis) * 1.0,
    "logical_or": lambda x, axis: np.any(x != 0, axis=axis) * 1.0,
}


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("dtype", [*FLOATS, np.dtype(np.int16)])
@pytest.mark.parametrize("axis", [3, -1, (2, 3), [1, 2, 3], (3, 2)])
def test_tensor_reduce(op, dtype, axis):
    x = np.rint(normal(7, 2, 3, 4) * 1.5).astype(dtype)
    axes = tuple(a % 4 for a in ([axis] if isinstance(axis, int) else axis))
    shape = tuple(n for d, n in enumerate(x.shape) if d not in axes)
    if len(shape) == 1:
        shape += (1,)

    def body(t):
        out, negated = new(*shape), new(*shape)
        nisa.tensor_reduce(out, getattr(nl, op), t, axis, keepdims=True)
        nisa.tensor_reduce(negated, getattr(nl, op), in_psum(t), axis, negate=True)
        return out, negated

    want = REDUCTIONS[op](f32(x), axis=axes).reshape(shape)
    out, negated = simulated(body, x)
    close(out, want)
    close(negated, -want)


def test_subtract_reduces_from_the_first():
    x = normal(5, 6)

    def body(t):
        out = new(5, 1)
        nisa.tensor_reduce(out, nl.subtract, t, 1)
        return out

    close(simulated(body, x)[:, 0], x[:, 0] - x[:, 1:].sum(1))


@pytest.mark.parametrize("op", ["bitwise_and", "bitwise_or", "bitwise_xor"])
@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_bit_reductions(op, dtype):
    x = integers(6, 3, 5, high=250).astype(dtype)

    def body(t):
        out = new(6, 3, dtype=t.dtype)
        nisa.tensor_reduce(out, getattr(nl, op), t, 2)
        return out

    np.testing.assert_array_equal(simulated(body, x), getattr(np, op).reduce(x, axis=2))


def naive_scan(a, b, start, op0, op1, reverse0, reverse1):
    steps = {
        "add": lambda p, q: p + q,
        "subtract": lambda p, q: p - q,
        "multiply": lambda p, q: p * q,
        "maximum": np.maximum,
        "minimum": np.minimum,
    }
    state, out = start[:, 0], np.empty_like(a)
    for i in range(a.shape[1]):
        inner = steps[op0](state, a[:, i]) if reverse0 else steps[op0](a[:, i], state)
        state = steps[op1](b[:, i], inner) if reverse1 else steps[op1](inner, b[:, i])
        out[:, i] = state
    return out


OPS = ["add", "subtract", "multiply", "maximum", "minimum"]


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(OPS),
    st.sampled_from(OPS),
    st.booleans(),
    st.booleans(),
    st.integers(1, 12),
    st.sampled_from([F32, BF16, F16]),
)
def test_tensor_tensor_scan(op0, op1, reverse0, reverse1, count, dtype):
    a, b = (np.rint(normal(3, count)).astype(dtype) for _ in range(2))
    start = np.rint(normal(3, 1))

    def body(x, y, s):
        out, constant = new(3, count), new(3, count)
        ops = getattr(nl, op0), getattr(nl, op1)
        nisa.tensor_tensor_scan(out, x, in_psum(y), s, *ops, reverse0, reverse1)
        nisa.tensor_tensor_scan(constant, in_psum(x), y, 2.0, *ops, reverse0, reverse1)
        return out, constant

    out, constant = simulated(body, a, b, start)
    flags = op0, op1, reverse0, reverse1
    np.testing.assert_array_equal(out, naive_scan(f32(a), f32(b), start, *flags))
    two = np.full((3, 1), 2, np.float32)
    np.testing.assert_array_equal(constant, naive_scan(f32(a), f32(b), two, *flags))


def test_scan_keeps_its_state_in_fp32_and_chains_through_the_last_column():
    x = normal(4, 24)

    def body(t):
        ones = nl.ones((4, 12), nl.float32)
        narrow, halves = new(4, 24, dtype=nl.bfloat16), new(4, 24)
        both = nl.ones((4, 24), nl.float32)
        nisa.tensor_tensor_scan(narrow, both, t, 0.0, nl.multiply, nl.add)
        nisa.tensor_tensor_scan(halves[:, 0:12], ones, t[:, 0:12], 0.0, nl.multiply, nl.add)
        nisa.tensor_tensor_scan(
            halves[:, 12:24], ones, t[:, 12:24], halves[:, 11:12], nl.multiply, nl.add
        )
        return narrow, halves

    narrow, halves = simulated(body, x)
    close(halves, np.cumsum(x, axis=1, dtype=np.float32), rtol=1e-5)
    close(narrow, np.cumsum(x, axis=1))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("count", [1, 2, 7, 512])
def test_bn_stats(count, dtype):
    x = (normal(9, count) * 3 + 1).astype(dtype)

    def body(t):
        out = new(9, 6)
        nisa.bn_stats(out, in_psum(t))
        return out

    got = simulated(body, x)
    for base, half in ((0, f32(x)[:, 0::2]), (3, f32(x)[:, 1::2])):
        n = half.shape[1]
        np.testing.assert_array_equal(got[:, base], n)
        if n:
            close(got[:, base + 1], half.mean(1), rtol=1e-5)
            np.testing.assert_allclose(got[:, base + 2], half.var(1) * n, rtol=1e-4, atol=1e-5)


def test_bn_aggr_of_several_tiles():
    x = normal(16, 3, 500) + 2

    def body(t):
        stats, out = new(16, 3, 6), new(16, 2)
        for i in range(3):
            nisa.bn_stats(stats[:, i], t[:, i])
        nisa.bn_aggr(out, stats)
        return out

    got = simulated(body, x)
    flat = x.reshape(16, -1).astype(np.float64)
    np.testing.assert_allclose(got, np.stack([flat.mean(1), flat.var(1)], 1), rtol=1e-5)


T = np.ones((64, 8), np.float32)
REFUSALS = [
    ("axis", lambda t: nisa.tensor_reduce(sb(64, 1), nl.add, t, 0)),
    ("axis", lambda t: nisa.tensor_reduce(sb(64, 2), nl.add, sb(64, 2, 4), 1)),
    ("axis", lambda t: nisa.tensor_reduce(sb(64, 1), nl.add, t, 2)),
    ("axis", lambda t: nisa.tensor_reduce(sb(64, 8), nl.add, t, ())),
    ("element-count", lambda t: nisa.tensor_reduce(sb(64, 2), nl.add, t, 1)),
    ("partition-match", lambda t: nisa.tensor_reduce(sb(32, 1), nl.add, t, 1)),
    ("operator", lambda t: nisa.tensor_reduce(sb(64, 1), nl.less, t, 1)),
    ("operator", lambda t: nisa.tensor_reduce(sb(64, 1), nl.left_shift, t, 1)),
    ("generation", lambda t: nisa.tensor_reduce(sb(64, 1), nl.abs_max, t, 1)),
    ("dtype", lambda t: nisa.tensor_reduce(sb(64, 1), nl.bitwise_or, t, 1)),
    (
        "value",
        lambda t: nisa.tensor_reduce(
            sb(4, 1, dtype=nl.int8), nl.bitwise_or, sb(4, 2, dtype=nl.int8), 1, negate=True
        ),
    ),
    ("usage", lambda t: nisa.tensor_reduce(sb(64, 1), nl.add, None, 1)),
    ("psum-inputs", lambda t: _scan(t, in_psum(t), in_psum(t), 0.0)),
    ("shape", lambda t: _scan(t, t, t, t)),
    ("partition-match", lambda t: _scan(t, t, t, sb(32, 1))),
    ("usage", lambda t: _scan(t, t, t, None)),
    ("element-count", lambda t: _scan(t, t, t[:, 0:4], 0.0)),
    ("operator", lambda t: nisa.tensor_tensor_scan(t, t, t, 0.0, nl.bitwise_or, nl.add)),
    ("operator", lambda t: nisa.tensor_tensor_scan(t, t, t, 0.0, nl.add, nl.abs)),
    ("tile-size", lambda t: nisa.bn_stats(sb(64, 6), sb(64, 513))),
    ("element-count", lambda t: nisa.bn_stats(sb(64, 5), t)),
    ("shape", lambda t: nisa.bn_aggr(sb(64, 2), t)),
    ("element-count", lambda t: nisa.bn_aggr(sb(64, 3), sb(64, 6))),
    ("uninitialized-read", lambda t: nisa.bn_aggr(sb(64, 2), ps(64, 6))),
]


def _scan(dst, a, b, start):
    nisa.tensor_tensor_scan(dst, a, b, start, nl.multiply, nl.add)


@pytest.mark.parametrize(
    ("rule", "body"), REFUSALS, ids=[f"{i}-{r[0]}" for i, r in enumerate(REFUSALS)]
)
def test_refusals(rule, body, request):
    tells(refused(rule, body, T), request)
