"""ACT functions against the mathematical definitions in double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nsa_neuron.simulator.semantics import activation, reduction

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
F = np.float32


def _sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _softplus(x):
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def _phi(x):
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _cdf(x):
    return math.erfc(-x / math.sqrt(2)) / 2


def _tanh_gelu(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _silu_dx(x, slope=1.0):
    s = _sigmoid(slope * x)
    return s * (1 + slope * x * (1 - s))


EXACT = {
    "copy": lambda x: x,
    "square": lambda x: x * x,
    "sigmoid": _sigmoid,
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x * _cdf(x),
    "gelu_dx": lambda x: _cdf(x) + x * _phi(x),
    "gelu_apprx_tanh": _tanh_gelu,
    "gelu_apprx_sigmoid": lambda x: x * _sigmoid(1.702 * x),
    "gelu_apprx_sigmoid_dx": lambda x: _silu_dx(x, 1.702),
    "silu": lambda x: x * _sigmoid(x),
    "silu_dx": _silu_dx,
    "tanh": math.tanh,
    "softplus": _softplus,
    "mish": lambda x: x * math.tanh(_softplus(x)),
    "erf": math.erf,
    "erf_dx": lambda x: 2 / math.sqrt(math.pi) * math.exp(-x * x),
    "exp": math.exp,
    "log": math.log,
    "sin": math.sin,
    "arctan": math.atan,
    "sqrt": math.sqrt,
    "rsqrt": lambda x: 1 / math.sqrt(x),
    "reciprocal": lambda x: 1 / x,
    "sign": lambda x: float((x > 0) - (x < 0)),
    "abs": abs,
}
POSITIVE = {"log", "sqrt", "rsqrt", "reciprocal"}


def test_every_documented_function_exists():
    assert set(activation.FUNCTIONS) == set(EXACT)
    assert set(activation.VALID_RANGE) <= set(EXACT)


@pytest.mark.parametrize("op", EXACT)
def test_functions_are_the_mathematical_ones(op):
    if op in POSITIVE:
        x = np.geomspace(2.0**-40, 2.0**40, 4001).astype(F)
    else:
        low, high = activation.VALID_RANGE.get(op, (-12.0, 12.0))
        x = np.linspace(low, high, 4001).astype(F)
        x = x[(x >= low) & (x <= high)]
    before = x.copy()
    want = np.array([EXACT[op](float(v)) for v in x])
    got = activation.FUNCTIONS[op](x)
    assert got.dtype == F and np.array_equal(x, before)
    error = np.abs(got - want) / np.maximum(np.abs(want), 1.0)
    assert error.max() < 1.5e-6
    np.testing.assert_array_equal(activation.FUNCTIONS[op](before, out=before), got)


@pytest.mark.parametrize(
    ("op", "at_minus_inf", "at_inf"),
    [
        ("copy", -math.inf, math.inf),
        ("square", math.inf, math.inf),
        ("sigmoid", 0, 1),
        ("relu", 0, math.inf),
        ("gelu", 0, math.inf),
        ("gelu_apprx_tanh", 0, math.inf),
        ("gelu_apprx_sigmoid", 0, math.inf),
        ("silu", 0, math.inf),
        ("silu_dx", 0, 1),
        ("tanh", -1, 1),
        ("softplus", 0, math.inf),
        ("mish", 0, math.inf),
        ("erf", -1, 1),
        ("erf_dx", 0, 0),
        ("exp", 0, math.inf),
        ("sign", -1, 1),
        ("abs", math.inf, math.inf),
    ],
)
def test_functions_at_infinity_and_nan(op, at_minus_inf, at_inf):
    got = activation.FUNCTIONS[op](np.array([-math.inf, math.inf, math.nan], F))
    np.testing.assert_array_equal(got, [at_minus_inf, at_inf, math.nan])


@pytest.mark.parametrize("op", ["gelu", "gelu_dx", "silu", "silu_dx", "mish", "gelu_apprx_tanh"])
def test_gated_functions_stay_finite_far_out(op):
    got = activation.FUNCTIONS[op](np.array([-3e38, -1e4, -90.0, 90.0, 1e4], F))
    np.testing.assert_allclose(got[:3], 0.0, atol=1e-30)
    assert np.isfinite(got).all()


def test_exp_is_exact_where_the_range_select_note_says_so():
    got = activation.FUNCTIONS["exp"](np.array([-math.inf, 0.0, -0.0], F))
    assert got.tolist() == [0.0, 1.0, 1.0]


def test_sin_beyond_pi_extrapolates_the_documented_cubic():
    got = activation.FUNCTIONS["sin"](np.array([9.0, -9.0, math.pi, -math.pi], F))
    assert got[0] == pytest.approx(27.65, abs=0.01)
    assert got[1] == -got[0]
    assert abs(got[2]) < 1e-6 and abs(got[3]) < 1e-6


COLUMN = np.array([[0.5], [-2.0], [3.0]], F)


@pytest.mark.parametrize("scale", [1.0, 0.25, COLUMN])
@pytest.mark.parametrize("bias", [None, 0.0, -1.5, COLUMN])
@pytest.mark.parametrize("op", ["copy", "tanh", "sigmoid", "gelu", "sin"])
@pytest.mark.parametrize("shape", [(3, 5), (3, 1), (3, 2, 2)])
def test_activation_scales_then_shifts(op, bias, scale, shape):
    data = np.random.default_rng(0).uniform(-0.5, 0.5, shape).astype(F)
    before = data.copy()
    got = activation.activation(op, data, bias, scale)
    assert got.shape == shape
    for i in np.ndindex(*shape):
        s = scale[i[0], 0] if isinstance(scale, np.ndarray) else F(scale)
        b = F(0) if bias is None else bias[i[0], 0] if isinstance(bias, np.ndarray) else F(bias)
        x = F(data[i] * s) + b
        want = activation.FUNCTIONS[op](np.array([x], F))[0]
        assert got[i] == pytest.approx(want, rel=1e-6, abs=1e-7)
    assert np.array_equal(data, before)


def test_activation_with_reduction_sums_fp32_outputs():
    data = np.random.default_rng(1).uniform(-1, 1, (3, 2, 4)).astype(F)
    out = activation.activation("exp", data, None, 2.0)
    register = np.full((3, 1), 10.0, F)
    for command, start in (("reset_reduce", 0.0), ("reduce", 10.0)):
        got = reduction.accumulate("add", out, register, command)
        want = [start + sum(math.exp(2 * float(v)) for v in row.ravel()) for row in data]
        np.testing.assert_allclose(got[:, 0], want, rtol=1e-6)
    assert reduction.accumulate("add", out, register, "idle") is register
    assert reduction.accumulate("add", out, register, "reset").tolist() == [[0.0]] * 3
