"""Vector Engine: copies, element-wise arithmetic of tensors and scalars."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isa_helpers import (
    BF16,
    E4M3,
    F16,
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

ARITHMETIC = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "equal": lambda a, b: (a == b) * 1.0,
    "not_equal": lambda a, b: (a != b) * 1.0,
    "greater": lambda a, b: (a > b) * 1.0,
    "greater_equal": lambda a, b: (a >= b) * 1.0,
    "less": lambda a, b: (a < b) * 1.0,
    "less_equal": lambda a, b: (a <= b) * 1.0,
    "logical_and": lambda a, b: ((a != 0) & (b != 0)) * 1.0,
    "logical_or": lambda a, b: ((a != 0) | (b != 0)) * 1.0,
    "logical_xor": lambda a, b: ((a != 0) ^ (b != 0)) * 1.0,
}
BITS = {
    "bitwise_and": lambda a, b: a & b,
    "bitwise_or": lambda a, b: a | b,
    "bitwise_xor": lambda a, b: a ^ b,
}


@pytest.mark.parametrize("engine", ["vector", "scalar", "gpsimd", "unknown"])
@pytest.mark.parametrize("dtype", [*FLOATS, np.dtype(np.int32), np.dtype(np.uint8)])
def test_tensor_copy(engine, dtype):
    x = integers(33, 2, 5, high=120).astype(dtype)

    def body(t):
        same, cast = new(33, 10, dtype=t.dtype), new(33, 5, 2)
        nisa.tensor_copy(same, t, engine=getattr(nisa.engine, engine))
        nisa.tensor_copy(cast, t, engine=getattr(nisa.engine, engine))
        return same, cast

    (same, cast), run = record(body, x)
    np.testing.assert_array_equal(f32(same), f32(x).reshape(33, 10))
    np.testing.assert_array_equal(cast, f32(x).reshape(33, 5, 2))
    expected = "vector" if engine == "unknown" else engine
    assert engines(run, "tensor_copy") == [expected] * 2


def test_integers_survive_a_copy_on_vector_but_not_on_scalar():
    x = np.array([[2**24 + 1, -(2**31), 2**31 - 1]], np.int32)

    def body(t):
        exact, through_fp32 = new(1, 3, dtype=nl.int32), new(1, 3, dtype=nl.int32)
        nisa.tensor_copy(exact, t)
        nisa.tensor_copy(through_fp32, t, engine=nisa.engine.scalar)
        return exact, through_fp32

    exact, through_fp32 = simulated(body, x)
    np.testing.assert_array_equal(exact, x)
    np.testing.assert_array_equal(through_fp32, [[2**24, -(2**31), 2**31 - 1]])


@pytest.mark.parametrize("engine", ["vector", "gpsimd"])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [(nl.float32, -1.5), (nl.bfloat16, 1), (nl.float8_e4m3, 1e9), (nl.int8, -128), (nl.bool_, 1)],
)
def test_memset(engine, dtype, value):
    def body():
        tile = new(3, 4, dtype=dtype)
        nisa.memset(tile, value, engine=getattr(nisa.engine, engine))
        return tile

    want = np.inf if value == 1e9 else value
    np.testing.assert_array_equal(f32(simulated(body)), want)


@pytest.mark.parametrize("dtype", [*FLOATS, np.dtype(np.int8)])
@pytest.mark.parametrize("op", ARITHMETIC)
def test_tensor_tensor(op, dtype):
    a, b = (np.rint(normal(17, 3, 4) * 2).astype(dtype) for _ in range(2))

    def body(x, y):
        flat = new(17, 12, dtype=x.dtype)
        nisa.tensor_tensor(flat, x, y.reshape((17, 12)), getattr(nl, op))
        nisa.tensor_tensor(x, in_psum(x), y, getattr(nl, op))  # in place
        return flat, x

    want = ARITHMETIC[op](f32(a), f32(b))
    flat, inplace = simulated(body, a, b)
    close(flat, want.reshape(17, 12))
    close(inplace, want)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["add", "subtract", "multiply", "maximum", "minimum", "less", "logical_and"]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([np.int32, np.uint32]),
)
def test_32_bit_integers_are_exact_on_gpsimd(op, seed, dtype):
    draw = np.random.default_rng(seed)
    info = np.iinfo(dtype)
    a, b = (draw.integers(info.min, info.max, (2, 6), dtype, endpoint=True) for _ in range(2))

    def body(x, y):
        out = new(2, 6, dtype=x.dtype)
        nisa.tensor_tensor(out, x, y, getattr(nl, op))
        return out

    got, run = record(body, a, b)
    exact = ARITHMETIC[op](a.astype(object), b.astype(object)).astype(object)
    wrapped = (np.vectorize(int, otypes=[object])(exact) % 2**32).astype(np.uint32).view(dtype)
    np.testing.assert_array_equal(got, wrapped)
    assert engines(run, "tensor_tensor") == ["gpsimd"]


def test_32_bit_integers_round_on_vector_and_in_psum():
    a = np.array([[2**24 + 1, 5]], np.int32)

    def body(x):
        out, again = new(1, 2, dtype=nl.int32), new(1, 2, dtype=nl.int32)
        nisa.tensor_tensor(out, x, x, nl.maximum, engine=nisa.engine.vector)
        nisa.tensor_tensor(again, in_psum(x), x, nl.maximum)
        return out, again

    (out, again), run = record(body, a)
    np.testing.assert_array_equal(out, [[2**24, 5]])
    np.testing.assert_array_equal(again, out)
    assert engines(run, "tensor_tensor") == ["vector"] * 2


def test_power_runs_on_gpsimd():
    a, b = np.abs(normal(8, 4)), normal(8, 4)

    def body(x, y):
        nisa.tensor_tensor(x, x, y, nl.power)
        return x

    got, run = record(body, a, b)
    close(got, a**b, rtol=1e-5)
    assert engines(run, "tensor_tensor") == ["gpsimd"]


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32])
@pytest.mark.parametrize("op", BITS)
def test_bit_operators(op, dtype):
    a, b = (integers(5, 7, low=0, high=2**31).astype(dtype) for _ in range(2))

    def body(x, y):
        both, constant, shifted = (new(5, 7, dtype=x.dtype) for _ in range(3))
        nisa.tensor_tensor(both, x, y, getattr(nl, op))
        nisa.tensor_scalar(constant, x, getattr(nl, op), 0x5A, op1=nl.invert)
        nisa.tensor_scalar(shifted, x, nl.right_shift, 1, op1=getattr(nl, op), operand1=y[:, 0:1])
        return both, constant, shifted

    both, constant, shifted = simulated(body, a, b)
    np.testing.assert_array_equal(both, BITS[op](a, b))
    np.testing.assert_array_equal(constant, ~BITS[op](a, np.asarray(0x5A).astype(dtype)))
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    logical = (a.view(unsigned) >> 1).view(dtype)
    np.testing.assert_array_equal(shifted, BITS[op](logical, b[:, 0:1]))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reverse", [(False, False), (True, False), (False, True), (True, True)])
def test_tensor_scalar_orders_its_operands(dtype, reverse):
    x, column = normal(64, 2, 9, dtype=dtype), normal(64, 1)

    def body(t, c):
        out = new(64, 18)
        nisa.tensor_scalar(
            out, t, nl.subtract, 2.0, reverse[0], nl.subtract, in_psum(c), reverse[1]
        )
        nisa.tensor_scalar(t, t, nl.multiply, c)
        return out, t

    out, scaled = simulated(body, x, column)
    v = f32(x).reshape(64, 18)
    first = 2.0 - v if reverse[0] else v - 2.0
    close(out, column - first if reverse[1] else first - column)
    close(scaled, f32(x) * column[:, :, None])


UNARY = {"abs": np.abs, "reciprocal": lambda x: 1 / x, "logical_not": lambda x: (x == 0) * 1.0}


@pytest.mark.parametrize("op", UNARY)
def test_unary_operators_of_tensor_scalar(op):
    x = normal(9, 8)

    def body(t):
        out = new(9, 8)
        nisa.tensor_scalar(out, t, getattr(nl, op), None, op1=nl.add, operand1=1.0)
        return out

    close(simulated(body, x), UNARY[op](x) + 1)


@pytest.mark.parametrize(
    ("op0", "op1", "engine", "runs_on"),
    [
        ("multiply", "add", "scalar", "scalar"),
        ("multiply", None, "scalar", "scalar"),
        ("add", None, "scalar", "scalar"),
        ("add", "power", "unknown", "gpsimd"),
        ("add", "rsqrt", "unknown", "gpsimd"),
        ("rsqrt", None, "gpsimd", "gpsimd"),
        ("subtract", "multiply", "vector", "vector"),
    ],
)
def test_engine_of_tensor_scalar(op0, op1, engine, runs_on):
    x = np.abs(normal(4, 8)) + 1

    def body(t):
        nisa.tensor_scalar(
            t,
            t,
            getattr(nl, op0),
            None if op0 == "rsqrt" else 2.0,
            op1=op1 and getattr(nl, op1),
            operand1=None if op1 in (None, "rsqrt") else -0.5,
            engine=getattr(nisa.engine, engine),
        )
        return t

    steps = {**ARITHMETIC, "power": np.power, "rsqrt": lambda a, b: 1 / np.sqrt(a)}
    want = steps[op0](x, 2.0)
    if op1:
        want = steps[op1](want, -0.5)
    got, run = record(body, x)
    close(got, want, rtol=1e-5)
    assert engines(run, "tensor_scalar") == [runs_on]


@pytest.mark.parametrize("dtypes", [(BF16, F16), (F16, E4M3), (np.dtype(np.int16), BF16)])
@pytest.mark.parametrize("reverse1", [False, True])
def test_scalar_tensor_tensor(dtypes, reverse1):
    a, b, c = normal(65, 6) * 3, normal(65, 2, 3) * 3, normal(65, 1)
    a, b = a.astype(dtypes[0]), b.astype(dtypes[1])

    def body(x, y, z):
        out, other = new(65, 3, 2), new(65, 6, dtype=nl.bfloat16)
        nisa.scalar_tensor_tensor(out, x, nl.multiply, z, nl.subtract, y, reverse1=reverse1)
        nisa.scalar_tensor_tensor(other, in_psum(x), nl.subtract, 1.0, nl.maximum, y, True)
        return out, other

    out, other = simulated(body, a, b, c)
    product, y = f32(a) * c, f32(b).reshape(65, 6)
    close(out, (y - product if reverse1 else product - y).reshape(65, 3, 2))
    close(other, np.maximum(1 - f32(a), y))


def test_scalar_tensor_tensor_in_place_of_its_second_operand():
    a, b = normal(4, 8), normal(4, 8)

    def body(x, y):
        nisa.scalar_tensor_tensor(y, x, nl.multiply, 3.0, nl.add, y)
        return y

    close(simulated(body, a, b), 3 * a + b)


@pytest.mark.parametrize("dtype", FLOATS)
def test_reciprocal(dtype):
    x = normal(128, 3, 2, dtype=dtype) + np.asarray(4, dtype)
    x[0, 0, 0] = 0

    def body(t):
        out = new(128, 6, dtype=t.dtype)
        nisa.reciprocal(out, in_psum(t))
        return out

    with np.errstate(divide="ignore"):
        close(simulated(body, x), (1 / f32(x)).reshape(128, 6))


def test_high_precision_mode_keeps_fp32_in_narrow_tiles():
    a = normal(4, 5)

    def body(x):
        narrow = new(4, 5, dtype=nl.bfloat16)
        flags = new(4, 5, dtype=nl.bool_)
        nisa.tensor_scalar(narrow, x, nl.multiply, 3.0)
        nisa.tensor_scalar(flags, x, nl.multiply, 0.25)
        out, bits = new(4, 5), new(4, 5)
        nisa.tensor_copy(out, narrow)
        nisa.tensor_copy(bits, flags)
        return out, bits

    out, bits = simulated(body, a, precise=False)
    np.testing.assert_array_equal(out, a * np.float32(3))
    np.testing.assert_array_equal(bits, (a != 0) * 1.0)


def test_divide_warns_that_no_engine_has_it():
    def body(x):
        nisa.tensor_tensor(x, x, x, nl.divide)
        nisa.tensor_scalar(x, x, nl.divide, 2.0)
        return x

    got, run = record(body, normal(2, 2))
    np.testing.assert_array_equal(got, 0.5)
    assert len(run.cores[0].warnings) == 2 and "divide" in run.cores[0].warnings[0]


DOCUMENTED = {  # docs/trainium2.md 3.3
    "log": (2.0**-64, 2.0**64), "sin": (-np.pi, np.pi), "arctan": (-np.pi / 2, np.pi / 2),
    "sqrt": (2.0**-116, 2.0**118), "rsqrt": (2.0**-87, 2.0**97),
    "reciprocal": (2.0**-42, 2.0**42),
}  # fmt: skip


@pytest.mark.parametrize("op", DOCUMENTED)
def test_activations_warn_outside_their_documented_range_only(op):
    low, high = DOCUMENTED[op]
    beyond = low * (1.00001 if low < 0 else 0.99999), high * 1.00001

    def warned(*values):
        def body(x):
            nisa.activation(x, getattr(nl, op), x)
            return x

        _, run = record(body, np.array([values], np.float32))
        return [op in warning for warning in run.cores[0].warnings]

    assert warned(low, high) == []
    assert warned(low, beyond[1]) == [True] and warned(beyond[0], high) == [True]
    if op == "reciprocal":
        assert warned(-low, -high) == [] and warned(-low, -beyond[1]) == [True]


T = np.ones((64, 8), np.float32)
I32 = nl.int32
G = nisa.engine.gpsimd
S = nisa.engine.scalar
REFUSALS = [
    ("engine", lambda t: nisa.tensor_copy(t, t, engine=nisa.engine.sync)),
    ("enum", lambda t: nisa.tensor_copy(t, t, engine=5)),
    ("usage", lambda t: nisa.tensor_copy(t, 1.0)),
    ("buffer", lambda t: nisa.tensor_copy(ps(64, 8), t, engine=G)),
    ("legacy-api", lambda t: nisa.tensor_copy(t, t, dtype=nl.bfloat16)),
    ("engine", lambda t: nisa.memset(t, 0, engine=S)),
    ("value", lambda t: nisa.memset(sb(4, 4, dtype=nl.int8), 128)),
    ("usage", lambda t: nisa.memset(t, "0")),
    ("operator", lambda t: nisa.tensor_tensor(t, t, t, nl.exp)),
    ("operator", lambda t: nisa.tensor_tensor(t, t, t, np.add)),
    ("operator", lambda t: nisa.tensor_tensor(t, t, t, nl.abs)),
    ("dtype", lambda t: nisa.tensor_tensor(t, t, t, nl.bitwise_or)),
    ("engine", lambda t: nisa.tensor_tensor(*[sb(4, 4, dtype=I32)] * 3, nl.bitwise_or, engine=G)),
    ("engine", lambda t: nisa.tensor_tensor(t, t, t, nl.power, engine=nisa.engine.vector)),
    ("buffer", lambda t: nisa.tensor_tensor(ps(64, 8), t, t, nl.power)),
    ("engine", lambda t: nisa.tensor_tensor(t, t, t, nl.add, engine=S)),
    ("psum-inputs", lambda t: nisa.tensor_tensor(t, in_psum(t), in_psum(t), nl.add)),
    ("element-count", lambda t: nisa.tensor_tensor(t, t, t[:, 0:1], nl.add)),
    ("generation", lambda t: nisa.tensor_tensor(t, t, t, nl.abs_min)),
    ("generation", lambda t: nisa.tensor_scalar(t, t, nl.square, None)),
    ("operator", lambda t: nisa.tensor_scalar(t, t, nl.exp, None)),
    (
        "operator",
        lambda t: nisa.tensor_scalar(t, t, nl.bitwise_and, 1, op1=nl.add, operand1=1),
    ),
    ("dtype", lambda t: nisa.tensor_scalar(sb(4, 4, dtype=I32), sb(4, 4), nl.bitwise_and, 1)),
    (
        "dtype",
        lambda t: nisa.tensor_scalar(*[sb(4, 4, dtype=I32)] * 2, nl.bitwise_and, 1.0),
    ),
    ("dtype", lambda t: nisa.tensor_scalar(t, t, nl.add, sb(64, 1, dtype=nl.bfloat16))),
    ("value", lambda t: nisa.tensor_scalar(t, t, nl.abs, 3.0)),
    ("value", lambda t: nisa.tensor_scalar(t, t, nl.add, 3.0, operand1=1.0)),
    ("usage", lambda t: nisa.tensor_scalar(t, t, nl.add, None)),
    ("usage", lambda t: nisa.tensor_scalar(t, t, nl.add, "2")),
    ("engine", lambda t: nisa.tensor_scalar(t, t, nl.subtract, 1.0, engine=S)),
    ("engine", lambda t: nisa.tensor_scalar(t, t, nl.add, 1.0, engine=G)),
    ("engine", lambda t: nisa.tensor_scalar(t, t, nl.rsqrt, None, engine=nisa.engine.vector)),
    ("buffer", lambda t: nisa.tensor_scalar(t, in_psum(t), nl.rsqrt, None)),
    ("partition-match", lambda t: nisa.tensor_scalar(t, t, nl.add, sb(32, 1))),
    ("psum-inputs", lambda t: _stt(t, in_psum(t), 1.0, in_psum(t))),
    ("usage", lambda t: _stt(t, t, 1.0, 2.0)),
    ("shape", lambda t: _stt(t, t, t, t)),
    ("operator", lambda t: nisa.scalar_tensor_tensor(t, t, nl.bitwise_or, 1, nl.add, t)),
    ("operator", lambda t: nisa.scalar_tensor_tensor(t, t, nl.add, 1, nl.abs, t)),
    ("element-count", lambda t: nisa.reciprocal(t[:, 0:4], t)),
    ("buffer", lambda t: nisa.reciprocal(t, nl.ndarray((64, 8), nl.float32, buffer=nl.hbm))),
    ("free-dim-range", lambda t: nisa.memset(new(1, 2, 40000)[:, :, 0:8], 0.0)),
    ("free-dim-range", lambda t: nisa.memset(new(1, 70000, dtype=nl.uint8), 0)),
    ("generation", lambda t: new(4, 4, dtype=nl.float8_e8m0fnu)),
]


def _stt(dst, data, operand0, operand1):
    nisa.scalar_tensor_tensor(dst, data, nl.add, operand0, nl.add, operand1)


@pytest.mark.parametrize(
    ("rule", "body"), REFUSALS, ids=[f"{i}-{r[0]}" for i, r in enumerate(REFUSALS)]
)
def test_refusals(rule, body, request):
    tells(refused(rule, body, T), request)


@pytest.mark.parametrize("shift", [-1, 0, 3])
def test_operands_may_overlap_the_destination(shift):
    """Results computed in the destination's memory equal those computed apart from it."""
    x = np.abs(normal(6, 16)) + 0.5

    def body(t):
        outs = []
        for apart in (False, True):
            w = new(6, 16)
            nisa.tensor_copy(w, t)
            data, dst = w[:, 4:12], w[:, 4 + shift : 12 + shift]
            column = w[:, 6:7]
            if apart:
                dst, data, column = new(6, 8), t[:, 4:12], t[:, 6:7]
            nisa.tensor_scalar(dst, data, nl.multiply, column, op1=nl.add, operand1=column)
            outs.append(dst)
        return tuple(outs)

    inplace, apart = simulated(body, x)
    np.testing.assert_array_equal(inplace, apart)


def test_chains_in_place_equal_numpy():
    x = np.abs(normal(6, 8)) + 0.5

    def body(t):
        nisa.scalar_tensor_tensor(t, t, nl.subtract, 0.5, nl.multiply, t)
        nisa.activation(t, nl.silu, t, bias=t[:, 0:1], scale=t[:, 1:2])
        nisa.activation(t, nl.erf_dx, t, scale=0.25)
        return t

    v = (x.astype(np.float64) - 0.5) * x
    v = v * v[:, 1:2] + v[:, 0:1]
    v = v / (1 + np.exp(-v))
    close(simulated(body, x), 2 / np.sqrt(np.pi) * np.exp(-((v / 4) ** 2)), rtol=1e-5)
