"""`nl` operators and reductions against NumPy; which instruction each becomes."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from nl_helpers import apply, normal, record

from nsa_neuron.simulator import SimulationError
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

FLOAT_BINARY = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "divide": np.divide,
    "mod": np.mod,
    "fmod": np.fmod,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
}
INT_BINARY = {
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor,
    "left_shift": np.left_shift,
    "right_shift": np.right_shift,
}
EXACT = [np.float32, np.float16, ml_dtypes.bfloat16]


def signs(*shape, seed=0):
    """Small integers with many ties and zeros."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("name", sorted(FLOAT_BINARY))
def test_binary_of_tiles(name, dtype):
    a, b = signs(128, 33).astype(dtype), signs(128, 33, seed=1).astype(dtype)
    if name in ("divide", "mod", "fmod"):
        b = np.where(b == 0, dtype(2), b)
    got = apply(getattr(nl, name), a, b)
    want = FLOAT_BINARY[name](a.astype(np.float32), b.astype(np.float32)).astype(dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", sorted(FLOAT_BINARY))
def test_binary_with_a_scalar_on_either_side(name):
    a = signs(64, 2, 9)
    a[a == 0] = 1
    function = getattr(nl, name)
    want = FLOAT_BINARY[name]
    np.testing.assert_array_equal(apply(lambda t: function(t, 2.0), a), want(a, 2.0))
    np.testing.assert_array_equal(apply(lambda t: function(2.0, t), a), want(2.0, a))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint32])
@pytest.mark.parametrize("name", sorted(INT_BINARY))
def test_bit_operators(name, dtype):
    a = np.arange(128 * 8, dtype=dtype).reshape(128, 8)
    b = (np.arange(128 * 8) % 7).astype(dtype).reshape(128, 8)
    function, want = getattr(nl, name), INT_BINARY[name]
    np.testing.assert_array_equal(apply(function, a, b), want(a, b))
    np.testing.assert_array_equal(apply(lambda t: function(t, 3), a), want(a, dtype(3)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.uint32])
def test_invert_and_logical_not(dtype):
    a = np.arange(96, dtype=dtype).reshape(32, 3)
    np.testing.assert_array_equal(apply(nl.invert, a), ~a)
    np.testing.assert_array_equal(apply(nl.logical_not, a % 2), 1 - a % 2)


def test_logical_not_of_floats():
    a = np.array([[0.0, 1.0]], np.float32)
    np.testing.assert_array_equal(apply(nl.logical_not, a), [[1.0, 0.0]])


def test_power_of_tiles():
    a, b = np.abs(normal(64, 5)) + 0.5, normal(64, 5, seed=1)
    got, used = record(nl.power, a, b)
    np.testing.assert_allclose(got, a**b, rtol=1e-6)
    assert used == ["gpsimd.tensor_tensor"]


ACT = {
    "exp": np.exp,
    "log": lambda x: np.log(np.abs(x) + 1),
    "sqrt": lambda x: np.sqrt(np.abs(x) + 1),
    "rsqrt": lambda x: 1 / np.sqrt(np.abs(x) + 1),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "softplus": lambda x: np.log1p(np.exp(x)),
    "square": np.square,
    "sign": np.sign,
    "abs": np.abs,
    "negative": np.negative,
    "reciprocal": lambda x: 1 / (np.abs(x) + 1),
    "arctan": lambda x: np.arctan(np.clip(x, -1.5, 1.5)),
    "erf": np.vectorize(math.erf),
    "gelu": np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
}
POSITIVE = {"log", "sqrt", "rsqrt", "reciprocal"}


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("name", sorted(ACT))
def test_unary(name, dtype):
    x = normal(128, 40).astype(dtype)
    given = x
    if name in POSITIVE:
        given = (np.abs(x.astype(np.float64)) + 1).astype(dtype)
    if name == "arctan":
        given = np.clip(x.astype(np.float64), -1.5, 1.5).astype(dtype)
    wide = given.astype(np.float64)
    want = ACT[name](wide - 1 if name in POSITIVE else wide)
    got = apply(getattr(nl, name), given)
    assert got.dtype == dtype
    tolerance = {4: 3e-6}.get(dtype(0).itemsize, 2e-3 if dtype is np.float16 else 1e-2)
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "name, used",
    [
        ("exp", "scalar.activation"),
        ("copy", "vector.tensor_copy"),
        ("rsqrt", "gpsimd.tensor_scalar"),
        ("reciprocal", "vector.reciprocal"),
        ("square", "scalar.activation"),
    ],
)
def test_engine_of_a_function(name, used):
    assert record(getattr(nl, name), np.ones((4, 4), np.float32))[1] == [used]


def test_rsqrt_takes_no_psum_since_it_runs_on_gpsimd():
    def kernel(x):
        tile = nl.ndarray(x.shape, x.dtype, buffer=nl.psum)
        nl.isa_copy = None
        return nl.rsqrt(tile)

    with pytest.raises(SimulationError, match="psum"):
        apply(lambda t: nl.rsqrt(nl.transpose(t)), np.ones((8, 8), np.float32))


def test_dtype_argument_and_default_of_unlike_tiles():
    a, b = normal(4, 6), normal(4, 6, seed=1)
    half, wide = a.astype(ml_dtypes.bfloat16), b
    assert apply(nl.add, half, wide).dtype == np.float32
    assert apply(nl.add, half, b.astype(np.float16)).dtype == np.float32
    assert apply(lambda x, y: nl.add(x, y, dtype=nl.float16), half, wide).dtype == np.float16
    assert apply(lambda x: nl.exp(x, nl.bfloat16), a).dtype == ml_dtypes.bfloat16


def test_free_dims_of_size_one_repeat():
    a, b = normal(16, 8), normal(16, 1, seed=1)
    np.testing.assert_array_equal(apply(nl.add, a, b), a + b)
    np.testing.assert_array_equal(apply(nl.subtract, b, a), b - a)


def test_other_shapes_do_not_broadcast():
    with pytest.raises(SimulationError, match="broadcast_to") as error:
        apply(nl.add, normal(16, 8), normal(1, 8))
    assert error.value.rule == "shape"


@pytest.mark.parametrize("name", ["abs_max", "abs_min"])
def test_operators_of_a_later_generation(name):
    with pytest.raises(SimulationError) as error:
        apply(getattr(nl, name), normal(4, 4), normal(4, 4))
    assert error.value.rule == "generation"


@pytest.mark.parametrize("name", ["average", "prelu", "bypass"])
def test_markers_are_no_functions(name):
    with pytest.raises(SimulationError, match="op="):
        getattr(nl, name)()


def test_tensors_in_hbm_are_refused():
    def kernel(x):
        return nl.exp(x)

    from nsa_neuron import simulator

    with pytest.raises(SimulationError, match=r"nl\.load"):
        simulator.simulate(kernel)(normal(4, 4))


def test_divide_is_noted_as_simulation_only():
    from nsa_neuron import simulator

    def kernel(x):
        out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        nl.store(out, nl.divide(nl.load(x), 2.0))
        return out

    run = simulator.simulate(kernel)
    run(np.ones((2, 2), np.float32))
    assert "simulation only" in run.run.cores[0].warnings[0]


@pytest.mark.parametrize(
    ("instruction", "said"),
    [
        (lambda x, y: nisa.tensor_tensor(x, x, y, nl.divide), "divide"),
        (lambda x, y: nisa.tensor_scalar(x, x, nl.add, 2.0, False, nl.mod, 3.0), "add, mod"),
        (lambda x, y: nisa.scalar_tensor_tensor(x, x, nl.mod, 2.0, nl.add, y), "mod, add"),
        (lambda x, y: nisa.tensor_scalar_reduce(x, x, nl.divide, 2.0, nl.add), "divide"),
        (lambda x, y: nisa.tensor_scalar_cumulative(x, x, nl.divide, nl.add, 2.0), "divide"),
        (lambda x, y: nisa.tensor_tensor_scan(x, x, y, 1.0, nl.add, nl.divide), "add, divide"),
    ],
)  # fmt: skip
def test_every_instruction_says_which_operator_exists_in_simulation_only(instruction, said):
    from nsa_neuron import simulator

    def kernel(x):
        out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        one, other = nl.load(x), nl.load(x)
        instruction(one, other)
        nl.store(out, one)
        return out

    run = simulator.simulate(kernel)
    run(np.ones((2, 2), np.float32))
    (warning,) = run.run.cores[0].warnings
    assert f": {said}: divide, mod and fmod have no lowering" in f": {warning}"


REDUCTIONS = {"sum": np.sum, "max": np.max, "min": np.min, "prod": np.prod, "mean": np.mean}


@pytest.mark.parametrize("axis", [1, -1, (1,), [1, 2], (2,), (1, 2, 3), 3])
@pytest.mark.parametrize("name", sorted(REDUCTIONS))
@pytest.mark.parametrize("keepdims", [False, True])
def test_reductions(name, axis, keepdims):
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    rank = max(a % 4 for a in axes) + 1 if axes[0] > 0 else 2
    x = normal(32, 3, 4, 2)[(slice(None),) * rank + (0,) * (4 - rank)].copy()
    want = REDUCTIONS[name](x.astype(np.float64), axis=axes, keepdims=keepdims)
    got = apply(lambda t: getattr(nl, name)(t, axis, keepdims=keepdims), x)
    want = want.reshape(32, -1) if want.ndim < 2 else want
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)


def test_mean_accumulates_in_fp32():
    x = np.full((2, 4096), 1.0, ml_dtypes.bfloat16)
    x[:, 0] = 256.0
    got = apply(lambda t: nl.mean(t, 1), x).astype(np.float32)
    want = np.mean(x.astype(np.float64), axis=1, keepdims=True).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(got, want.astype(np.float32))


def test_var_keeps_the_axis_and_is_biased():
    x = normal(64, 100) + 5
    got = apply(lambda t: nl.var(t, 1), x)
    assert got.shape == (64, 1)
    np.testing.assert_allclose(got[:, 0], x.astype(np.float64).var(1), rtol=1e-5)


def test_all():
    x = np.ones((8, 5), np.float32)
    x[3, 2] = 0
    np.testing.assert_array_equal(apply(lambda t: nl.all(t, 1), x)[:, 0], x.all(1))


@pytest.mark.parametrize("axis", [0, (0, 1), (1,), 3])
def test_reductions_of_other_axes(axis):
    with pytest.raises(SimulationError) as error:
        apply(lambda t: nl.sum(t, axis), normal(4, 3, 2))
    assert error.value.rule == "axis"


@settings(max_examples=40, deadline=None)
@given(
    arrays(
        np.float32,
        (4, 6),
        elements=st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.5, -0.5, 1.5, 2.0**30]),
    )
)
def test_rounding_functions(x):
    for name in ("floor", "ceil", "trunc"):
        np.testing.assert_array_equal(apply(getattr(nl, name), x), getattr(np, name)(x))
