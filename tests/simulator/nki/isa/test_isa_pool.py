"""GpSimd Engine: patterns, gathers, segments, nonzeros, top-k; random numbers."""

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
    engines,
    f32,
    in_psum,
    integers,
    new,
    normal,
    ps,
    record,
    refused,
    sb,
    simulated,
)
from told import tells

from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

COMPARE = ["equal", "not_equal", "less", "less_equal", "greater", "greater_equal"]
PATTERNS = [[[1, 12]], [[100, 3], [-7, 4]], [[0, 2], [5, 1], [3, 3], [1, 2]]]


def affine(lanes, pattern, offset, multiplier):
    shape = tuple(n for _, n in pattern)
    value = np.full((lanes, *shape), offset, np.int64)
    value += multiplier * np.arange(lanes).reshape(-1, *[1] * len(shape))
    for axis, (step, count) in enumerate(pattern):
        steps = step * np.arange(count)
        value += steps.reshape([count if a == axis else 1 for a in range(len(shape))])
    return value.reshape(lanes, -1)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [nl.int32, nl.float32, nl.bfloat16, nl.uint8])
def test_iota(pattern, dtype):
    def body():
        out = new(10, 12, dtype=dtype)
        nisa.iota(out, pattern, offset=21, channel_multiplier=3)
        again = new(10, 2, 6, dtype=dtype)
        nisa.iota(again, pattern, offset=nisa.register_alloc(21), channel_multiplier=3)
        return out, again

    want = affine(10, pattern, 21, 3)
    out, again = simulated(body)
    if dtype == nl.uint8:
        want = np.clip(want, 0, 255)
    elif dtype == nl.bfloat16:
        want = f32(want.astype(BF16))
    np.testing.assert_array_equal(f32(out), want)
    np.testing.assert_array_equal(f32(again).reshape(10, 12), want)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("op", COMPARE)
def test_affine_select(pattern, op):
    x = normal(20, 12, dtype=BF16)

    def body(t):
        same, wide = new(20, 12, dtype=t.dtype), new(20, 3, 4)
        args = {"cmp_op": getattr(nl, op), "offset": -9}
        nisa.affine_select(same, pattern, 1, t, -1.5, **args)
        nisa.affine_select(wide, pattern, 1, t, -3.4028235e38, **args)
        return same, wide

    keep = getattr(np, op)(affine(20, pattern, -9, 1), 0)
    same, wide = simulated(body, x)
    np.testing.assert_array_equal(f32(same), np.where(keep, f32(x), -1.5))
    want = np.where(keep, f32(x), np.float32(-3.4028235e38)).reshape(20, 3, 4)
    np.testing.assert_array_equal(wide, want)


def test_affine_select_makes_a_causal_mask():
    x = normal(16, 16)

    def body(t):
        nisa.affine_select(t, [[-1, 16]], 1, t, 0.0, nl.greater_equal)
        return t

    np.testing.assert_array_equal(simulated(body, x), np.tril(x))


@pytest.mark.parametrize("dtype", [*FLOATS, np.dtype(np.int32)])
@pytest.mark.parametrize(("lanes", "size", "valid"), [(16, 1, None), (128, 4, 19), (48, 2, 32)])
def test_local_gather(dtype, lanes, size, valid):
    x = integers(lanes, 10, 8, high=100).astype(dtype)
    index = integers(lanes, 2, high=80 - size, dtype=np.uint16)
    count = 32 if valid is None else valid

    def body(src, idx):
        out = new(lanes, count * size, dtype=src.dtype)
        nisa.local_gather(out, src, idx, size, valid)
        return out

    want = np.empty((lanes, count * size), dtype)
    flat = x.reshape(lanes, -1)
    for p in range(lanes):
        core = p - p % 16
        for i in range(count):
            start = int(index[core + i % 16, i // 16])
            want[p, i * size : (i + 1) * size] = flat[p, start : start + size]
    np.testing.assert_array_equal(f32(simulated(body, x, index)), f32(want))


@pytest.mark.parametrize("dtype", [*FLOATS, np.dtype(np.uint8)])
def test_nc_n_gather(dtype):
    x = integers(37, 4, 5, high=100).astype(dtype)
    index = integers(37, 3, 2, high=20, dtype=np.uint32)

    def body(src, idx):
        out = new(37, 6, dtype=src.dtype)
        nisa.nc_n_gather(out, src, idx)
        return out

    want = np.take_along_axis(x.reshape(37, 20), index.reshape(37, 6).astype(int), 1)
    np.testing.assert_array_equal(f32(simulated(body, x, index)), f32(want))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.sampled_from([F32, np.int32]))
def test_sequence_bounds(ids, dtype):
    n = len(ids)
    x = np.array([ids]).astype(dtype)

    def body(t):
        out = new(1, 2, n, dtype=t.dtype)
        nisa.sequence_bounds(out, t)
        return out

    got = simulated(body, x)[0]
    for i, value in enumerate(ids):
        if value == 0:
            want = [n, -1]
        else:
            first = last = i
            while first > 0 and ids[first - 1] == value:
                first -= 1
            while last + 1 < n and ids[last + 1] == value:
                last += 1
            want = [first, last + 1]
        np.testing.assert_array_equal(got[:, i], want)


@pytest.mark.parametrize("dtype", [F32, np.dtype(np.int32)])
def test_nonzero_with_count(dtype):
    x = integers(40, 9, low=-1, high=2).astype(dtype)
    x[16] = 0

    def body(src):
        out = nl.full((40, 10), 77, nl.int32)
        nisa.nonzero_with_count(out, src, index_offset=16, padding_val=-3)
        return out

    got = simulated(body, x)
    for p in range(40):
        if p % 16:
            np.testing.assert_array_equal(got[p], 77)
        else:
            found = np.flatnonzero(x[p])
            want = [*(found + 16), *[-3] * (9 - found.size), found.size]
            np.testing.assert_array_equal(got[p], want)


def test_nonzero_with_count_reads_and_writes_every_16th_partition_only():
    x = normal(1, 4)

    def body(row, rows):
        src, dst = new(32, 4), new(32, 5, dtype=nl.int32)
        nisa.tensor_copy(src[0:1], row)
        nisa.dma_copy(src[16:17], row)
        nisa.nonzero_with_count(dst, src)
        out = new(rows, 5, dtype=nl.int32)
        nisa.tensor_copy(out, dst[0:rows])
        return out

    got = simulated(lambda r: body(r, 1), x)
    np.testing.assert_array_equal(got[0, -1:], [4])
    refused("uninitialized-read", lambda r: body(r, 2), x)


@pytest.mark.parametrize(("lanes", "n", "k"), [(16, 8, 8), (32, 42, 8), (128, 100, 1)])
def test_topk(lanes, n, k):
    columns = -(-n // 16)
    x = np.stack(
        [np.random.default_rng(g).permutation(16 * columns) for g in range(lanes // 16)]
    ).reshape(lanes // 16, columns, 16)
    src = x.transpose(0, 2, 1).reshape(lanes, columns).astype(BF16)

    def body(t):
        values, indices = new(lanes, k, dtype=nl.bfloat16), new(lanes, k, dtype=nl.uint32)
        nisa.topk(values, indices, t, n)
        return values, indices

    values, indices = simulated(body, src)
    for p in range(lanes):
        snake = x[p // 16].reshape(-1)[:n]
        order = np.argsort(snake)[-k:]
        np.testing.assert_array_equal(indices[p], order)
        np.testing.assert_array_equal(f32(values[p]), f32(snake[order].astype(BF16)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", ["add", "average", "maximum"])
def test_tensor_partition_reduce(op, dtype):
    x = np.rint(normal(50, 3, 4) * 2).astype(dtype)

    def body(t):
        out = new(1, 12)
        nisa.tensor_partition_reduce(out, getattr(nl, op), t)
        return out

    want = {"add": np.sum, "average": np.mean, "maximum": np.max}[op](f32(x), axis=0)
    close(simulated(body, x), want.reshape(1, 12), rtol=1e-5)


@pytest.mark.parametrize("op", ["bitwise_or", "bitwise_and"])
def test_bitwise_partition_reduce(op):
    x = integers(7, 5, low=-100, dtype=np.int16)

    def body(t):
        out = new(1, 5, dtype=t.dtype)
        nisa.tensor_partition_reduce(out, getattr(nl, op), t)
        return out

    np.testing.assert_array_equal(simulated(body, x)[0], getattr(np, op).reduce(x))


# Random numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["vector", "gpsimd"])
@pytest.mark.parametrize("dtype", [nl.uint32, nl.int16, nl.uint8])
def test_rng_draws_uniform_bits(engine, dtype):
    def body():
        first, second = new(64, 50, dtype=dtype), new(64, 50, dtype=dtype)
        for tile in (first, second):
            nisa.rng(tile, engine=getattr(nisa.engine, engine))
        return first, second

    (first, second), run = record(body)
    assert engines(run, "rng") == [engine] * 2
    assert not np.array_equal(first, second)
    bits = np.unpackbits(first.view(np.uint8), axis=None)
    assert abs(bits.mean() - 0.5) < 0.02
    np.testing.assert_array_equal(simulated(body)[0], first)


def test_a_seed_repeats_the_sequence_on_vector():
    def body():
        seed, tiles = nl.full((1, 1), 1234, nl.uint32), []
        for value in (1234, 1234, 99):
            nisa.memset(seed, value)
            nisa.set_rng_seed(in_psum(seed))
            tile = new(4, 9, dtype=nl.uint32)
            nisa.rng(tile)
            tiles.append(tile)
        return tuple(tiles)

    first, again, other = simulated(body)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_state_of_gpsimds_generator_can_be_saved_and_set():
    def body():
        state, after = new(32, 6, dtype=nl.uint32), new(32, 6, dtype=nl.uint32)
        first, second = new(32, 5, dtype=nl.uint32), new(32, 5, dtype=nl.uint32)
        nisa.rand_get_state(state)
        nisa.rng(first, engine=nisa.engine.gpsimd)
        nisa.rand_get_state(after)
        nisa.rand_set_state(state)
        nisa.rng(second, engine=nisa.engine.gpsimd)
        return state, after, first, second

    state, after, first, second = simulated(body)
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(state, after)
    x, y, z, w, v, d = (int(n) for n in state[7])  # Marsaglia 2003, section 3.1
    for drawn in first[7]:
        t = x ^ (x >> 2)
        x, y, z, w = y, z, w, v
        v = (v ^ (v << 4) ^ t ^ (t << 1)) % 2**32
        d = (d + 362437) % 2**32
        assert int(drawn) == (d + v) % 2**32


@pytest.mark.parametrize("dtype", [F32, BF16, F16, np.dtype(np.int32)])
def test_dropout(dtype):
    x = integers(64, 100, low=1).astype(dtype)

    def body(t):
        outs = [new(64, 100, dtype=t.dtype) for _ in range(4)]
        prob = new(64, 1)
        nisa.memset(prob[0:32], 1.0)
        nisa.memset(prob[32:64], 0.25)
        for out, p in zip(outs, (0.0, 1.0, 0.3, prob), strict=True):
            nisa.dropout(out, t, p)
        return tuple(outs)

    none, everything, some, columns = (f32(a) for a in simulated(body, x))
    np.testing.assert_array_equal(none, f32(x))
    assert not everything.any()
    assert abs((some == 0).mean() - 0.3) < 0.03
    np.testing.assert_array_equal(some[some != 0], f32(x)[some != 0])
    assert not columns[:32].any() and abs((columns[32:] == 0).mean() - 0.25) < 0.04


T = np.ones((64, 8), np.float32)
I32, U16, U32, BF = nl.int32, nl.uint16, nl.uint32, nl.bfloat16


def _gather(t, dst=None, index=None, **kw):
    dst = sb(64, 16) if dst is None else dst
    nisa.local_gather(dst, t, sb(64, 1, dtype=U16) if index is None else index, **kw)


def _topk(rows=16, columns=3, n=42, k=8, value=BF, index=U32):
    nisa.topk(new(rows, k, dtype=value), new(rows, k, dtype=index), sb(rows, columns, dtype=BF), n)


REFUSALS = [
    ("element-count", lambda t: nisa.iota(t, [[1, 9]])),
    ("value", lambda t: nisa.iota(t, [[1, 2]] * 5)),
    ("value", lambda t: nisa.iota(t, [[1]])),
    ("value", lambda t: nisa.iota(t, [[1, 8]], offset=2**31)),
    ("value", lambda t: nisa.iota(t, [[1, 8]], channel_multiplier=nisa.register_alloc(1))),
    ("buffer", lambda t: nisa.iota(ps(64, 8), [[1, 8]])),
    ("buffer", lambda t: nisa.affine_select(t, [[1, 8]], 0, in_psum(t), 0.0)),
    ("operator", lambda t: nisa.affine_select(t, [[1, 8]], 0, t, 0.0, nl.add)),
    ("usage", lambda t: nisa.affine_select(t, [[1, 8]], 0, t, t)),
    ("element-count", lambda t: nisa.affine_select(t, [[1, 4]], 0, t, 0.0)),
    ("dtype", lambda t: _gather(t, index=sb(64, 1, dtype=U32))),
    ("dtype-match", lambda t: _gather(t, dst=sb(64, 16, dtype=BF))),
    ("value", lambda t: _gather(t, num_elem_per_idx=3)),
    ("tile-size", lambda t: _gather(t, num_valid_indices=17)),
    ("element-count", lambda t: _gather(t, num_valid_indices=15)),
    ("partition-limit", lambda t: _gather(sb(8, 8), sb(8, 16), sb(8, 1, dtype=U16))),
    ("tile-size", lambda t: _gather(sb(16, 8), sb(16, 4112), sb(16, 257, dtype=U16))),
    ("oob", lambda t: _gather(t, index=nl.full((64, 1), 8, U16))),
    ("dtype", lambda t: nisa.nc_n_gather(t, t, sb(64, 8, dtype=I32))),
    ("dtype-match", lambda t: nisa.nc_n_gather(sb(64, 8, dtype=BF), t, sb(64, 8, dtype=U32))),
    ("element-count", lambda t: nisa.nc_n_gather(t, t, sb(64, 4, dtype=U32))),
    ("oob", lambda t: nisa.nc_n_gather(t, t, nl.full((64, 8), 8, U32))),
    ("buffer", lambda t: nisa.nc_n_gather(ps(64, 8), t, sb(64, 8, dtype=U32))),
    ("partition-limit", lambda t: nisa.sequence_bounds(sb(64, 16), t)),
    ("element-count", lambda t: nisa.sequence_bounds(sb(1, 8), t[0:1])),
    ("dtype", lambda t: nisa.sequence_bounds(sb(1, 16), sb(1, 8, dtype=BF))),
    ("value", lambda t: nisa.sequence_bounds(sb(1, 16), nl.full((1, 8), -1, I32))),
    ("element-count", lambda t: nisa.nonzero_with_count(sb(64, 8, dtype=I32), t)),
    ("dtype", lambda t: nisa.nonzero_with_count(sb(64, 9), t)),
    ("dtype", lambda t: nisa.nonzero_with_count(sb(4, 9, dtype=I32), sb(4, 8, dtype=BF))),
    ("value", lambda t: nisa.nonzero_with_count(sb(64, 9, dtype=I32), t, padding_val=0.5)),
    ("dtype", lambda t: _topk(value=nl.float32)),
    ("dtype", lambda t: _topk(index=I32)),
    ("value", lambda t: _topk(n=7)),
    ("shape", lambda t: _topk(columns=2)),
    ("shape", lambda t: _topk(n=10, k=11)),
    ("partition-limit", lambda t: _topk(rows=8)),
    ("operator", lambda t: nisa.tensor_partition_reduce(sb(1, 8), nl.minimum, t)),
    ("dtype", lambda t: nisa.tensor_partition_reduce(sb(1, 8), nl.bitwise_or, t)),
    ("partition-match", lambda t: nisa.tensor_partition_reduce(sb(2, 8), nl.add, t)),
    ("element-count", lambda t: nisa.tensor_partition_reduce(sb(1, 4), nl.add, t)),
    ("dtype", lambda t: nisa.rng(t)),
    ("engine", lambda t: nisa.rng(sb(4, 4, dtype=I32), engine=nisa.engine.scalar)),
    ("buffer", lambda t: nisa.rng(ps(4, 4, dtype=I32), engine=nisa.engine.gpsimd)),
    ("shape", lambda t: nisa.set_rng_seed(sb(1, 2, dtype=U32))),
    ("dtype", lambda t: nisa.set_rng_seed(sb(1, 1, dtype=U16))),
    ("element-count", lambda t: nisa.rand_set_state(sb(4, 24, dtype=U32))),
    ("dtype", lambda t: nisa.rand_set_state(sb(4, 6))),
    ("generation", lambda t: nisa.rand_set_state(sb(4, 24, dtype=U32), nisa.engine.vector)),
    ("generation", lambda t: nisa.rand_get_state(sb(4, 24, dtype=U32), nisa.engine.vector)),
    ("buffer", lambda t: nisa.rand_get_state(ps(4, 6, dtype=U32))),
    ("dtype-match", lambda t: nisa.dropout(sb(64, 8, dtype=BF), t, 0.5)),
    ("dtype", lambda t: nisa.dropout(t, t, sb(64, 1, dtype=I32))),
    (
        "dtype",
        lambda t: nisa.dropout(*[sb(4, 4, dtype=I32)] * 2, sb(4, 1, dtype=BF)),
    ),
    ("shape", lambda t: nisa.dropout(t, t, t)),
]


@pytest.mark.parametrize(
    ("rule", "body"), REFUSALS, ids=[f"{i}-{r[0]}" for i, r in enumerate(REFUSALS)]
)
def test_refusals(rule, body, request):
    tells(refused(rule, body, T), request)
