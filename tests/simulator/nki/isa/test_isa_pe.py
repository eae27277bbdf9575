"""Tensor Engine: products, transposes, tiles, performance modes; instructions of later chips."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from isa_helpers import (
    BF16,
    E4M3,
    E5M2,
    F16,
    F32,
    FLOATS,
    close,
    engines,
    f32,
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

NARROW = (BF16, F16, E4M3, E5M2)
DOUBLE = nisa.matmul_perf_mode.double_row


@pytest.mark.parametrize(("left", "right"), list(itertools.product(NARROW, NARROW)))
def test_narrow_operands_mix(left, right):
    a, b = normal(96, 5, 8, dtype=left), normal(96, 3, 7, dtype=right)

    def body(st, mv):
        out = ps(40, 21)
        nisa.nc_matmul(out, st, mv)
        return out

    want = f32(a).reshape(96, 40).astype(np.float64).T @ f32(b).reshape(96, 21)
    np.testing.assert_allclose(simulated(body, a, b), want, rtol=1e-5, atol=1e-4)


def test_tf32_operands_are_rounded_to_ten_bits():
    a = np.full((1, 1), 1 + 2.0**-12, np.float32)

    def body(t):
        out = ps(1, 2)
        nisa.nc_matmul(out[:, 0:1], t.view(nl.tfloat32), t)
        nisa.nc_matmul(out[:, 1:2], t, t)
        return out

    got = simulated(body, a)
    np.testing.assert_array_equal(got, [[1 + 2.0**-12, np.float32((1 + 2.0**-12) ** 2)]])


@pytest.mark.parametrize(("left", "right"), list(itertools.product((E4M3, E5M2), repeat=2)))
@pytest.mark.parametrize("mode", [DOUBLE, "double_row"])
def test_double_row_contracts_two_rows_per_partition(left, right, mode):
    a, b = normal(128, 2, 33, dtype=left), normal(128, 2, 3, 9, dtype=right)

    def body(st, mv):
        out = ps(33, 27)
        for _ in range(2):
            nisa.nc_matmul(out, st, mv, perf_mode=mode)
        return out

    got, run = record(body, a, b)
    want = np.einsum("krm,krn->mn", f32(a).astype(np.float64), f32(b).reshape(128, 2, 27))
    np.testing.assert_allclose(got, 2 * want, rtol=1e-5, atol=1e-3)
    params = next(i.params for i in run.instructions if i.opcode == "nc_matmul")
    assert params.perf_mode is DOUBLE


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (64, 128), (128, 32)])
def test_tiles_of_the_array(size):
    rows, columns = size
    a, b = normal(rows, columns), normal(rows, 16)

    def body(st, mv):
        out = ps(columns, 16)
        nisa.nc_matmul(out, st, mv, tile_position=(0, 128 - columns), tile_size=size)
        return out

    close(simulated(body, a, b), a.T @ b, rtol=1e-5)


@pytest.mark.parametrize("accumulate", [None, False, True])
def test_accumulation_flags(accumulate):
    a, b = normal(64, 8), normal(64, 12)

    def body(st, mv):
        out = ps(8, 12)
        nisa.nc_matmul(out, st, mv, accumulate=False)
        nisa.nc_matmul(out, st, mv, accumulate=accumulate)
        return out

    close(simulated(body, a, b), a.T @ b * (1 if accumulate is False else 2), rtol=1e-5)


def test_overlapping_windows_of_psum_add_up():
    a = normal(16, 4)

    def body(t):
        out = ps(4, 6)
        nisa.nc_matmul(out.ap([[6, 4], [1, 3], [1, 4]]), t, sb_ones(16, 12))
        return out

    def sb_ones(*shape):
        return nl.ones(shape, nl.float32)

    visits = np.array([1, 2, 3, 3, 2, 1], np.float32)
    close(simulated(body, a), a.sum(0)[:, None] * visits, rtol=1e-5)


@pytest.mark.parametrize("dtype", [*FLOATS, np.dtype(np.int32), np.dtype(np.uint16)])
@pytest.mark.parametrize("shape", [(128, 128), (7, 2, 13), (1, 1)])
def test_transposes_on_the_tensor_engine(dtype, shape):
    x = integers(*shape, high=100).astype(dtype)
    if dtype.kind == "f" and x.size > 1:
        x.reshape(-1)[:2] = np.nan, np.inf
    lanes, free = shape[0], x.size // shape[0]
    wide = nl.uint16 if dtype.itemsize == 1 else dtype

    def body(t):
        out = ps(free, lanes, dtype=wide)
        nisa.nc_transpose(out, t)
        return out

    got, run = record(body, x)
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}[dtype.itemsize]
    want = x.reshape(lanes, free).T.copy().view(bits)
    np.testing.assert_array_equal(got.view(np.uint16 if dtype.itemsize == 1 else bits), want)
    assert engines(run, "nc_transpose") == ["tensor"]


@pytest.mark.parametrize("dtype", [F32, BF16, np.dtype(np.int32)])
def test_transposes_on_the_vector_engine(dtype):
    x = integers(32, 5, high=100).astype(dtype)

    def body(t):
        out, again = new(5, 32, dtype=t.dtype), ps(5, 32, dtype=t.dtype)
        nisa.nc_transpose(out, t)
        nisa.nc_transpose(again, t, engine=nisa.engine.vector)
        return out, again

    (out, again), run = record(body, x)
    np.testing.assert_array_equal(f32(out), f32(x).T)
    np.testing.assert_array_equal(f32(again), f32(x).T)
    assert engines(run, "nc_transpose") == ["vector"] * 2


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_transpose_mode_of_a_matmul_is_bit_exact(dtype):
    x = normal(24, 40, dtype=dtype)
    x[0, 0] = np.nan
    shift = np.roll(np.eye(24, dtype=np.float32), 3, axis=1).astype(dtype)

    def body(t, identity):
        out = ps(40, 24, dtype=t.dtype)
        nisa.nc_matmul(out, t, identity, is_transpose=True)
        return out

    bits = {2: np.uint16, 4: np.uint32}[dtype.itemsize]
    want = np.roll(x.T, 3, axis=1).copy().view(bits)
    np.testing.assert_array_equal(simulated(body, x, shift).view(bits), want)


LATER = {
    "activate2": lambda t: nisa.activate2(t, nl.gelu, t, 2.0, 0.5, nl.multiply, nl.add),
    "exponential": lambda t: nisa.exponential(t, t, max_value=1.0),
    "nc_matmul_mx": lambda t: nisa.nc_matmul_mx(t, t, t, t, t),
    "quantize_mx": lambda t: nisa.quantize_mx(t, t, t),
    "rand2": lambda t: nisa.rand2(t, 0.0, 1.0),
}


@pytest.mark.parametrize("name", LATER)
def test_instructions_of_later_chips_say_so(name):
    error = refused("generation", LATER[name], T)
    assert error.instruction == name and error.limit == "trn3" and error.hint


T = np.ones((64, 8), np.float32)
F8, BF = nl.float8_e4m3, nl.bfloat16


def _mm(st, mv, dst=None, **kw):
    nisa.nc_matmul(ps(8, 8) if dst is None else dst, st, mv, **kw)


def _double(st=(64, 2, 8), mv=(64, 2, 8), dtype=F8, **kw):
    _mm(sb(*st, dtype=dtype), sb(*mv, dtype=dtype), perf_mode=DOUBLE, **kw)


REFUSALS = [
    ("dtype", lambda t: _mm(sb(64, 8, dtype=nl.int8), sb(64, 8, dtype=nl.int8))),
    ("dtype", lambda t: _mm(sb(64, 8, dtype=nl.float8_e4m3fn), sb(64, 8, dtype=F8))),
    ("dtype-match", lambda t: _mm(t, sb(64, 8, dtype=BF))),
    ("dtype", lambda t: _mm(t, t, ps(8, 8, dtype=BF))),
    ("buffer", lambda t: _mm(t, ps(64, 8))),
    ("buffer", lambda t: _mm(t, t, sb(8, 8))),
    ("partition-match", lambda t: _mm(t, t[0:32])),
    ("partition-match", lambda t: _mm(t[:, 0:4], t)),
    ("element-count", lambda t: _mm(t, t[:, 0:4])),
    ("usage", lambda t: _mm(t, t, accumulate=nisa.register_alloc(1))),
    ("usage", lambda t: _mm(t, t, perf_mode="fast")),
    ("usage", lambda t: _mm(t, None)),
    ("legacy-api", lambda t: nisa.nc_matmul(stationary=t, moving=t)),
    ("dtype", lambda t: _double(dtype=BF)),
    ("shape", lambda t: _double(st=(64, 3, 8))),
    ("tile-position", lambda t: _double(tile_position=(0, 64), tile_size=(128, 64))),
    ("tile-position", lambda t: _mm(t, t, tile_position=(32, 0), tile_size=(64, 128))),
    ("tile-position", lambda t: _mm(t, t, tile_position=(0, 0), tile_size=(48, 128))),
    ("tile-size", lambda t: _mm(t, t, tile_position=(0, 0), tile_size=(32, 128))),
    ("value", lambda t: _mm(t, t, is_transpose=True)),
    ("dtype-match", lambda t: _mm(t, sb(64, 8), ps(8, 8, dtype=BF), is_transpose=True)),
    ("value", lambda t: _double(is_transpose=True, dst=ps(8, 8, dtype=F8))),
    ("shape", lambda t: nisa.nc_transpose(ps(8, 32), t)),
    ("dtype-match", lambda t: nisa.nc_transpose(ps(8, 64, dtype=BF), t)),
    ("tile-size", lambda t: nisa.nc_transpose(sb(8, 64), t)),
    ("engine", lambda t: nisa.nc_transpose(ps(8, 64), t, engine=nisa.engine.scalar)),
    ("buffer", lambda t: nisa.nc_transpose(sb(8, 64), t, engine=nisa.engine.tensor)),
]


@pytest.mark.parametrize(
    ("rule", "body"), REFUSALS, ids=[f"{i}-{r[0]}" for i, r in enumerate(REFUSALS)]
)
def test_refusals(rule, body, request):
    tells(refused(rule, body, T), request)
