"""Reduce registers: activation, tensor_scalar_reduce, tensor_scalar_cumulative, and their state."""

from __future__ import annotations

import math

import numpy as np
import pytest
from isa_helpers import (
    BF16,
    E5M2,
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

RESET, REDUCE, BOTH = (nisa.reduce_cmd[n] for n in ("reset", "reduce", "reset_reduce"))
IDLE, LOAD = nisa.reduce_cmd.idle, nisa.reduce_cmd.load_reduce


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _cdf(x):
    return 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


FUNCTIONS = {
    "copy": lambda x: x,
    "square": lambda x: x * x,
    "sigmoid": _sigmoid,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * _cdf(x),
    "gelu_dx": lambda x: _cdf(x) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi),
    "gelu_apprx_tanh": lambda x: (
        0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "gelu_apprx_sigmoid": lambda x: x * _sigmoid(1.702 * x),
    "gelu_apprx_sigmoid_dx": lambda x: (
        _sigmoid(1.702 * x) * (1 + 1.702 * x * (1 - _sigmoid(1.702 * x)))
    ),
    "silu": lambda x: x * _sigmoid(x),
    "silu_dx": lambda x: _sigmoid(x) * (1 + x * (1 - _sigmoid(x))),
    "tanh": np.tanh,
    "softplus": lambda x: np.log1p(np.exp(x)),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "erf": np.vectorize(math.erf),
    "erf_dx": lambda x: 2 / math.sqrt(math.pi) * np.exp(-x * x),
    "exp": np.exp,
    "log": lambda x: np.log(x),
    "sin": np.sin,
    "arctan": np.arctan,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "reciprocal": lambda x: 1 / x,
    "sign": np.sign,
    "abs": np.abs,
}
POSITIVE = ("log", "sqrt", "rsqrt", "reciprocal")


@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_activation_functions(op, dtype):
    x = np.clip(normal(130 - 2, 2, 5), -1.5, 1.5)
    x = (np.abs(x) + 0.1 if op in POSITIVE else x).astype(dtype)

    def body(t):
        out = new(128, 10)
        nisa.activation(out, getattr(nl, op), in_psum(t))
        return out

    got, run = record(body, x)
    want = FUNCTIONS[op](x.astype(np.float64).reshape(128, 10))
    np.testing.assert_allclose(got, want, rtol=3e-6, atol=2e-6)
    assert engines(run, "activation") == ["scalar"] and not run.cores[0].warnings


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [None, 0.5, "fp32", "bf16"])
@pytest.mark.parametrize("scale", [1.0, -2, "fp32"])
def test_bias_and_scale(dtype, bias, scale):
    x, b, s = normal(65, 6, dtype=dtype), normal(65, 1), normal(65, 1)
    if bias == "bf16":
        b = b.astype(BF16)

    def body(t, bt, st):
        out = new(65, 6, dtype=t.dtype)
        nisa.activation(
            out,
            nl.tanh,
            t,
            bias=in_psum(bt) if isinstance(bias, str) else bias,
            scale=st if scale == "fp32" else scale,
        )
        return out

    by = s if scale == "fp32" else scale
    plus = f32(b) if isinstance(bias, str) else (bias or 0)
    close(simulated(body, x, b, s), np.tanh(f32(x) * by + plus), rtol=5e-6)


def test_inputs_outside_a_documented_range_are_noted():
    def body(t):
        nisa.activation(t, nl.sin, t)
        return t

    got, run = record(body, np.array([[9.0, 0.5]], np.float32))
    np.testing.assert_allclose(got, [[27.65, np.sin(0.5)]], rtol=1e-3)
    assert "sin" in run.cores[0].warnings[0]


def test_activation_accumulates_over_instructions():
    x = normal(64, 4, 8)

    def body(t):
        out, sums, resets = new(64, 8), new(64, 3), new(64, 2)
        act = lambda i, command, **kw: nisa.activation(  # noqa: E731
            out, nl.exp, t[:, i], reduce_op=nl.add, reduce_cmd=command, **kw
        )
        act(0, BOTH)
        act(1, REDUCE, reduce_res=sums[:, 0:1])
        act(2, IDLE, reduce_res=sums[:, 1:2])
        act(3, REDUCE, reduce_res=sums[:, 2:3])
        act(0, RESET, reduce_res=resets[:, 0:1])
        nisa.activation_reduce(out, nl.exp, t[:, 1], nl.add, resets[:, 1:2])
        return sums, resets

    sums, resets = simulated(body, x)
    e = np.exp(x).sum(2)
    close(sums, np.stack([e[:, 0] + e[:, 1]] * 2 + [e[:, 0] + e[:, 1] + e[:, 3]], 1), rtol=1e-5)
    close(resets, np.stack([0 * e[:, 1], e[:, 1]], 1), rtol=1e-5)


def test_registers_are_per_lane_and_the_result_may_be_the_destination():
    x = normal(64, 4)

    def body(t):
        nisa.activation_reduce(t[0:32], nl.square, t[0:32], nl.add, None)
        nisa.activation_reduce(t[32:64], nl.square, t[32:64], nl.add, None)
        out = new(64, 1)
        nisa.activation(t[:, 0:1], nl.copy, t[:, 0:1], reduce_res=out)
        nisa.activation_reduce(t[:, 0:1], nl.copy, t[:, 0:1], nl.add, t[:, 0:1], scale=2.0)
        return out, t

    out, t = simulated(body, x)
    close(out[:, 0], (x * x).sum(1), rtol=1e-5)
    close(t[:, 0], 2 * x[:, 0] ** 2)


OPS = {
    "add": (np.add, 0.0),
    "multiply": (np.multiply, 1.0),
    "maximum": (np.maximum, -np.inf),
    "minimum": (np.minimum, np.inf),
}


@pytest.mark.parametrize("dtype", [F32, BF16, E5M2, np.dtype(np.int32)])
@pytest.mark.parametrize("op", OPS)
def test_tensor_scalar_reduce(op, dtype):
    x = np.rint(normal(32, 2, 3) * 2).astype(dtype)
    start = np.rint(normal(32, 1))

    def body(t, s):
        out, sums = new(32, 6), new(32, 4)
        reduce = getattr(nl, op)
        step = lambda **kw: nisa.tensor_scalar_reduce(  # noqa: E731
            out, t, nl.add, 1.0, reduce, **kw
        )
        step(reduce_res=sums[:, 0:1])
        step(reduce_cmd=REDUCE)
        step(reduce_cmd=REDUCE, reduce_res=sums[:, 1:2], reduce_res_negate=True)
        step(reduce_cmd=LOAD, reduce_init=in_psum(s), reduce_res=sums[:, 2:3])
        step(reduce_cmd=LOAD, reduce_init=3.0, reduce_res=sums[:, 3:4])
        return out, sums

    ufunc, _ = OPS[op]
    values = f32(x).reshape(32, 6) + 1
    once = ufunc.reduce(values, axis=1)
    thrice = ufunc(ufunc(once, once), once)
    out, sums = simulated(body, x, start)
    close(out, values)
    want = [once, -thrice, ufunc(start[:, 0], once), ufunc(np.float32(3), once)]
    close(sums, np.stack(want, 1))


def test_reverse0_of_tensor_scalar_reduce_warns():
    def body(t):
        nisa.tensor_scalar_reduce(t, t, nl.subtract, 1.0, nl.add, reverse0=True)
        return t

    got, run = record(body, normal(2, 2) * 0)
    np.testing.assert_array_equal(got, 1)
    assert "not supported yet" in run.cores[0].warnings[0]


@pytest.mark.parametrize("op1", [*OPS, "subtract"])
@pytest.mark.parametrize("dtype", [F32, F16, np.dtype(np.int16)])
def test_tensor_scalar_cumulative(op1, dtype):
    x = np.rint(normal(16, 2, 4) * 1.5).astype(dtype)
    start = np.rint(normal(16, 1))

    def body(t, s):
        outs = [new(16, 8) for _ in range(3)]
        ops = nl.multiply, getattr(nl, op1)
        nisa.tensor_scalar_cumulative(outs[0], t, *ops, 2.0)
        nisa.tensor_scalar_cumulative(outs[1], in_psum(t), *ops, s, reduce_cmd=REDUCE)
        nisa.tensor_scalar_cumulative(outs[2], t, *ops, 2.0, s, reduce_cmd=LOAD)
        return tuple(outs)

    step = {**{n: f for n, (f, _) in OPS.items()}, "subtract": np.subtract}[op1]
    identity = {**{n: i for n, (_, i) in OPS.items()}, "subtract": 0.0}[op1]

    def naive(terms, state):
        out = np.empty_like(terms)
        for i in range(terms.shape[1]):
            state = step(terms[:, i], state)
            out[:, i] = state
        return out

    values = f32(x).reshape(16, 8)
    first, second, third = simulated(body, x, start)
    close(first, naive(values * 2, np.full(16, identity, np.float32)))
    close(second, naive(values * start, first[:, -1]))
    close(third, naive(values * 2, start[:, 0]))


T = np.ones((64, 8), np.float32)


def _act(t, **kw):
    nisa.activation(t, nl.exp, t, **kw)


def _tsr(t, op=nl.add, **kw):
    nisa.tensor_scalar_reduce(t, t, nl.add, 1.0, op, **kw)


def _cum(t, op=nl.add, **kw):
    nisa.tensor_scalar_cumulative(t, t, nl.add, op, 1.0, **kw)


def _idle_then_reduce(t):
    _tsr(t)
    nisa.select_reduce(t, sb(64, 8, dtype=nl.uint8), t, 0.0)
    _tsr(t, reduce_cmd=REDUCE)


REFUSALS = [
    ("operator", lambda t: nisa.activation(t, nl.maximum, t)),
    ("operator", lambda t: nisa.activation(t, np.exp, t)),
    ("generation", lambda t: nisa.activation(t, nl.prelu, t)),
    ("dtype", lambda t: _act(t, scale=sb(64, 1, dtype=nl.bfloat16))),
    ("dtype", lambda t: _act(t, bias=sb(64, 1, dtype=nl.tfloat32))),
    ("shape", lambda t: _act(t, bias=t)),
    ("partition-match", lambda t: _act(t, scale=sb(32, 1))),
    ("usage", lambda t: _act(t, scale=None)),
    ("usage", lambda t: nisa.activation(t, nl.exp)),
    ("operator", lambda t: _act(t, reduce_op=nl.maximum, reduce_cmd=BOTH)),
    ("operator", lambda t: _act(t, reduce_cmd=BOTH)),
    ("value", lambda t: _act(t, reduce_op=nl.add, reduce_cmd=LOAD)),
    ("enum", lambda t: _act(t, reduce_op=nl.add, reduce_cmd=3)),
    ("shape", lambda t: _act(t, reduce_op=nl.add, reduce_cmd=BOTH, reduce_res=sb(64, 2))),
    ("undefined-accumulator", lambda t: _act(t, reduce_op=nl.add, reduce_cmd=REDUCE)),
    ("undefined-accumulator", lambda t: _act(t, reduce_res=sb(64, 1))),
    ("usage", lambda t: nisa.activation_reduce(t, nl.exp, t)),
    ("operator", lambda t: _tsr(t, nl.subtract)),
    ("operator", lambda t: nisa.tensor_scalar_reduce(t, t, nl.bitwise_or, 1, nl.add)),
    ("dtype", lambda t: nisa.tensor_scalar_reduce(t, t, nl.add, _narrow(), nl.add)),
    ("value", lambda t: _tsr(t, reduce_cmd=IDLE)),
    ("value", lambda t: _tsr(t, reduce_cmd=LOAD)),
    ("value", lambda t: _tsr(t, reduce_init=1.0)),
    ("dtype", lambda t: _tsr(t, reduce_cmd=LOAD, reduce_init=_narrow())),
    ("shape", lambda t: _tsr(t, reduce_res=t)),
    ("undefined-accumulator", lambda t: _tsr(t, reduce_cmd=REDUCE)),
    ("undefined-accumulator", _idle_then_reduce),
    ("value", lambda t: nisa.tensor_scalar_reduce(t, t, nl.abs, 2.0, nl.add)),
    ("operator", lambda t: _cum(t, nl.logical_and)),
    ("dtype", lambda t: _cum(sb(64, 8, dtype=nl.int32))),
    ("value", lambda t: _cum(t, reduce_cmd=RESET)),
    ("value", lambda t: _cum(t, imm1=1.0)),
    ("undefined-accumulator", lambda t: _cum(t, reduce_cmd=REDUCE)),
    ("buffer", lambda t: _act(nl.ndarray((64, 8), nl.float32, buffer=nl.hbm))),
    ("uninitialized-read", lambda t: _act(ps(64, 8))),
]


def _narrow():
    return sb(64, 1, dtype=nl.bfloat16)


@pytest.mark.parametrize(
    ("rule", "body"), REFUSALS, ids=[f"{i}-{r[0]}" for i, r in enumerate(REFUSALS)]
)
def test_refusals(rule, body, request):
    tells(refused(rule, body, T), request)


def test_integers_load_as_fp32():
    x = integers(4, 6, low=-50, high=50)

    def body(t):
        out = new(4, 1)
        nisa.activation_reduce(new(4, 6), nl.abs, t, nl.add, out)
        return out

    np.testing.assert_array_equal(simulated(body, x)[:, 0], np.abs(x).sum(1))
