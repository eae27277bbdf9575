"""Vector Engine: predicated copies, selections, searches and shuffles."""

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

BOTH, REDUCE, IDLE = (nisa.reduce_cmd[n] for n in ("reset_reduce", "reduce", "idle"))
FP32_MIN = -3.4028235e38


@pytest.mark.parametrize("predicate", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("dtype", [*FLOATS, np.dtype(np.int32)])
@pytest.mark.parametrize("reverse", [False, True])
def test_tensor_copy_predicated(predicate, dtype, reverse):
    x, y = (integers(40, 6, high=90).astype(dtype) for _ in range(2))
    mask = integers(40, 2, 3, high=3).astype(predicate)

    def body(dst, src, m):
        other = new(40, 6, dtype=dst.dtype)
        nisa.tensor_copy(other, dst)
        nisa.tensor_copy_predicated(dst, src, m, reverse_pred=reverse)
        nisa.tensor_copy_predicated(other, 7.0, in_psum(m), reverse_pred=reverse)
        return dst, other

    keep = (mask.reshape(40, 6) == 0) ^ reverse
    got, constant = simulated(body, x, y, mask)
    np.testing.assert_array_equal(f32(got), np.where(keep, f32(x), f32(y)))
    np.testing.assert_array_equal(f32(constant), np.where(keep, f32(x), 7))


def test_a_predicated_copy_writes_only_where_it_says():
    x = normal(4, 6)
    mask = np.zeros((4, 6), np.uint8)
    mask[:, :3] = 1

    def body(src, m, read):
        dst = new(4, 6)
        nisa.tensor_copy_predicated(dst, src, m)
        out = new(4, read)
        nisa.tensor_copy(out, dst[:, 0:read])
        return out

    np.testing.assert_array_equal(simulated(lambda s, m: body(s, m, 3), x, mask), x[:, :3])
    error = refused("uninitialized-read", lambda s, m: body(s, m, 4), x, mask)
    assert error.value == (0, 3)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, np.dtype(np.int16)])
@pytest.mark.parametrize("predicate", [np.int8, np.uint8, np.int16, np.uint16])
def test_select_reduce(dtype, predicate):
    x = np.rint(normal(50, 2, 4) * 9).astype(dtype)
    mask, other = integers(50, 8, low=-1, high=2).astype(predicate), normal(50, 1)

    def body(t, m, column):
        out, reverse, top = new(50, 8), new(50, 8, dtype=t.dtype), new(50, 2)
        nisa.select_reduce(out, m, in_psum(t), column, top[:, 0:1], BOTH)
        nisa.select_reduce(
            reverse, in_psum(m), t, 100.0, top[:, 1:2], REDUCE, nl.maximum, reverse_pred=True
        )
        return out, reverse, top

    out, reverse, top = simulated(body, x, mask, other)
    v = f32(x).reshape(50, 8)
    first, second = np.where(mask != 0, v, other), np.where(mask == 0, v, 100)
    close(out, first)
    close(reverse, second)
    close(top, np.stack([first.max(1), np.maximum(first.max(1), second.max(1))], 1))


COMPARE = {
    "equal": np.equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
}


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(list(COMPARE)),
    st.sampled_from(list(COMPARE)),
    st.integers(-5, 2000),
    st.sampled_from([F32, BF16, F16]),
)
def test_range_select(op0, op1, start, dtype):
    x = normal(33, 3, 5, dtype=dtype)
    low, high = (start + integers(33, 1, low=-2, high=17).astype(np.float32) for _ in range(2))

    def body(t, lo, hi):
        out, narrow, top = new(33, 15), new(33, 15, dtype=nl.bfloat16), new(33, 1)
        ops = getattr(nl, op0), getattr(nl, op1)
        nisa.range_select(out, in_psum(t), *ops, lo, hi, reduce_res=top, range_start=start)
        nisa.range_select(narrow, t, *ops, lo, hi, reduce_cmd=REDUCE, range_start=start)
        return out, narrow, top

    out, narrow, top = simulated(body, x, low, high)
    index = np.float32(start) + np.arange(15, dtype=np.float32)
    keep = COMPARE[op0](index, low) & COMPARE[op1](index, high)
    want = np.where(keep, f32(x).reshape(33, 15), np.float32(FP32_MIN))
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(top[:, 0], want.max(1))
    np.testing.assert_array_equal(np.isneginf(f32(narrow)), ~keep)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, np.dtype(np.int16)])
@pytest.mark.parametrize("shape", [(128, 8), (3, 2, 37)])
def test_max8(dtype, shape):
    x = integers(*shape, low=-40, high=40).astype(dtype)

    def body(t):
        out = new(shape[0], 8, dtype=t.dtype)
        nisa.max8(out, in_psum(t))
        return out

    want = -np.sort(-f32(x).reshape(shape[0], -1), axis=1)[:, :8]
    np.testing.assert_array_equal(f32(simulated(body, x)), want)


def naive_find(data, vals, order):
    index = np.full(vals.shape, 0xFFFFFFFF, np.uint32)
    taken = np.zeros(data.shape, bool)
    for p in range(data.shape[0]):
        for j in order:
            for i in range(data.shape[1]):
                if data[p, i] == vals[p, j] and not taken[p, i]:
                    index[p, j], taken[p, i] = i, True
                    break
    return index, taken


@settings(max_examples=25, deadline=None)
@given(st.integers(8, 24), st.integers(1, 9), st.sampled_from([F32, BF16]), st.booleans())
def test_find_and_replace(count, kinds, dtype, narrow):
    data = integers(5, count, high=kinds).astype(dtype)
    vals = integers(5, 8, high=kinds + 1).astype(dtype)
    kind = nl.uint16 if narrow else nl.uint32

    def body(d, v):
        found, where = new(5, 8, dtype=kind), new(5, 8, dtype=kind)
        nisa.nc_find_index8(found, d, v)
        nisa.nc_match_replace8(d, d, v, imm=-9.5, dst_idx=where)
        return found, where, d

    found, where, replaced = simulated(body, data, vals)
    mask = 0xFFFF if narrow else 0xFFFFFFFF
    np.testing.assert_array_equal(found, naive_find(f32(data), f32(vals), range(8))[0] & mask)
    index, taken = naive_find(f32(data), f32(vals), range(7, -1, -1))
    np.testing.assert_array_equal(where, index & mask)
    np.testing.assert_array_equal(f32(replaced), np.where(taken, -9.5, f32(data)))


def test_the_documented_order_of_duplicates():
    data = np.array([[1, 2, 3, 4, 8, 8, 8, 8, 8, 8, 8]], np.float32)
    vals = np.array([[3, 8, 8, 8, 8, 8, 8, 8]], np.float32)

    def body(d, v):
        found, where = new(1, 8, dtype=nl.uint32), new(1, 8, dtype=nl.uint32)
        nisa.nc_find_index8(found, d, v)
        nisa.nc_match_replace8(new(1, 11), d, v, 0.0, where)
        return found, where

    found, where = simulated(body, data, vals)
    np.testing.assert_array_equal(found, [[2, 4, 5, 6, 7, 8, 9, 10]])
    np.testing.assert_array_equal(where, [[2, 10, 9, 8, 7, 6, 5, 4]])


@pytest.mark.parametrize("dtype", [*FLOATS, np.dtype(np.uint8)])
@pytest.mark.parametrize("lanes", [32, 64, 128])
def test_stream_shuffle(dtype, lanes):
    x, old = (integers(lanes, 3, 2, high=100).astype(dtype) for _ in range(2))
    mask = [int(m) for m in np.random.default_rng(lanes).integers(0, 32, 32)]
    mask[3] = mask[30] = 255

    def body(src, dst):
        inplace = new(lanes, 6, dtype=src.dtype)
        nisa.tensor_copy(inplace, src)
        nisa.nc_stream_shuffle(dst, in_psum(src), mask)
        nisa.nc_stream_shuffle(inplace, inplace, mask)
        return dst, inplace

    dst, inplace = simulated(body, x, old)
    for p in range(lanes):
        entry = mask[p % 32]
        source = p - p % 32 + entry
        np.testing.assert_array_equal(dst[p], old[p] if entry == 255 else x[source])
        want = x[p] if entry == 255 else x[source]
        np.testing.assert_array_equal(inplace[p], want.reshape(-1))


def test_a_shuffle_broadcasts_one_partition_across_a_quadrant():
    x = normal(128, 4)

    def body(t):
        out = new(128, 4)
        for quadrant in range(4):
            rows = slice(32 * quadrant, 32 * quadrant + 32)
            nisa.nc_stream_shuffle(out[rows], t[32:33], [0] * 32)
        return out

    np.testing.assert_array_equal(simulated(body, x), np.tile(x[32], (128, 1)))


T = np.ones((64, 16), np.float32)
U8, U16, U32, BF = nl.uint8, nl.uint16, nl.uint32, nl.bfloat16


def _mask(dtype=U8, rows=64, count=16):
    return sb(rows, count, dtype=dtype)


def _range(t, on_true=None, bound=None, **kw):
    args = {"comp_op0": nl.less, "comp_op1": nl.less, **kw}
    bound = sb(64, 1) if bound is None else bound
    nisa.range_select(t, t if on_true is None else on_true, bound0=bound, bound1=bound, **args)


REFUSALS = [
    ("dtype", lambda t: nisa.tensor_copy_predicated(t, t, t)),
    ("dtype", lambda t: nisa.tensor_copy_predicated(t, t, _mask(nl.int8))),
    ("dtype-match", lambda t: nisa.tensor_copy_predicated(t, sb(64, 16, dtype=BF), _mask())),
    ("psum-inputs", lambda t: nisa.tensor_copy_predicated(t, in_psum(t), in_psum(_mask()))),
    ("element-count", lambda t: nisa.tensor_copy_predicated(t, t, _mask(count=8))),
    ("element-count", lambda t: nisa.tensor_copy_predicated(t, t[:, 0:8], _mask())),
    ("usage", lambda t: nisa.tensor_copy_predicated(t, None, _mask())),
    ("usage", lambda t: nisa.tensor_copy_predicated(t, t, 1)),
    ("dtype", lambda t: nisa.select_reduce(t, _mask(U32), t, 0.0)),
    ("dtype", lambda t: nisa.select_reduce(t, _mask(), _mask(nl.int32), 0.0)),
    ("psum-inputs", lambda t: nisa.select_reduce(t, in_psum(_mask()), in_psum(t), 0.0)),
    ("shape", lambda t: nisa.select_reduce(t, _mask(), t, t)),
    ("operator", lambda t: nisa.select_reduce(t, _mask(), t, 0.0, reduce_op=nl.add)),
    ("value", lambda t: nisa.select_reduce(t, _mask(), t, 0.0, None, nisa.reduce_cmd.load_reduce)),
    ("dtype", lambda t: nisa.select_reduce(t, _mask(), t, 0.0, sb(64, 1, dtype=U8), BOTH)),
    ("shape", lambda t: nisa.select_reduce(t, _mask(), t, 0.0, t, BOTH)),
    ("undefined-accumulator", lambda t: nisa.select_reduce(t, _mask(), t, 0.0, sb(64, 1))),
    ("undefined-accumulator", lambda t: nisa.select_reduce(t, _mask(), t, 0.0, None, REDUCE)),
    ("operator", lambda t: _range(t, comp_op0=nl.not_equal)),
    ("dtype", lambda t: _range(t, on_true=_mask())),
    ("dtype", lambda t: _range(t, bound=sb(64, 1, dtype=BF))),
    ("shape", lambda t: _range(t, bound=t)),
    ("usage", lambda t: _range(t, bound=1.0)),
    ("value", lambda t: _range(t, on_false_value=0.0)),
    ("value", lambda t: _range(t, range_start=2**24)),
    ("usage", lambda t: _range(t, range_start=nisa.register_alloc(1))),
    ("operator", lambda t: _range(t, reduce_op=nl.add)),
    ("undefined-accumulator", lambda t: _range(t, reduce_cmd=IDLE, reduce_res=sb(64, 1))),
    ("tile-size", lambda t: nisa.max8(sb(64, 8), t[:, 0:7])),
    ("tile-size", lambda t: nisa.max8(sb(4, 8), sb(4, 16385, dtype=BF))),
    ("element-count", lambda t: nisa.max8(sb(64, 7), t)),
    ("partition-match", lambda t: nisa.max8(sb(32, 8), t)),
    ("dtype", lambda t: nisa.nc_find_index8(sb(64, 8), t, sb(64, 8))),
    ("element-count", lambda t: nisa.nc_find_index8(_mask(U32, count=8), t, sb(64, 7))),
    ("tile-size", lambda t: nisa.nc_find_index8(_mask(U32, count=8), t[:, 0:4], sb(64, 8))),
    ("element-count", lambda t: nisa.nc_match_replace8(t, t, t, 0.0)),
    ("usage", lambda t: nisa.nc_match_replace8(t, t, sb(64, 8), t)),
    ("dtype", lambda t: nisa.nc_match_replace8(t, t, sb(64, 8), 0.0, sb(64, 8))),
    ("value", lambda t: nisa.nc_stream_shuffle(t, t, [0] * 31)),
    ("value", lambda t: nisa.nc_stream_shuffle(t, t, [0] * 31 + [32])),
    ("bounds", lambda t: nisa.nc_stream_shuffle(t[0:32], t[0:4], [5] * 32)),
    ("dtype-match", lambda t: nisa.nc_stream_shuffle(sb(64, 16, dtype=BF), t, [0] * 32)),
    ("element-count", lambda t: nisa.nc_stream_shuffle(t[:, 0:8], t, [0] * 32)),
    (
        "start-partition",
        lambda t: nisa.nc_stream_shuffle(sb(128, 4)[0:64], sb(128, 4)[32:64], [255] * 32),
    ),
    ("uninitialized-read", lambda t: nisa.nc_stream_shuffle(t, ps(64, 16), [0] * 32)),
]


@pytest.mark.parametrize(
    ("rule", "body"), REFUSALS, ids=[f"{i}-{r[0]}" for i, r in enumerate(REFUSALS)]
)
def test_refusals(rule, body, request):
    tells(refused(rule, body, T), request)
