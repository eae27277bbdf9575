"""ACT: the activation functions and the ``activation`` instruction (docs/trainium2.md 3.3, 5.2).

The hardware uses piecewise polynomials without published error bounds; each function here is the
mathematical one in fp32, within a few units in the last place. Outside its valid input range the
hardware returns garbage; only ``sin``'s is documented (a cubic) and reproduced, the others give
the mathematical value. ``VALID_RANGE`` lets the core report such inputs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from . import alu

if TYPE_CHECKING:
    from collections.abc import Callable

    from .alu import F32, Operand

    Out = F32 | None  # scratch that the function may use for its result
    Function = Callable[..., Any]

_ONE = np.float32(1.0)
_HALF = np.float32(0.5)
_SQRT_HALF = np.float32(math.sqrt(0.5))
_SQRT_2_OVER_PI = np.float32(math.sqrt(2.0 / math.pi))
_TWO_OVER_SQRT_PI = np.float32(2.0 / math.sqrt(math.pi))
_INV_SQRT_2PI = np.float32(1.0 / math.sqrt(2.0 * math.pi))
_PI = np.float32(math.pi)

# erf(x) = x P(x^2) / Q(x^2) on [-4, 4], the fp32 minimax fit used by Eigen and XLA.
_ERF_P = (
    *(-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06),
    *(-5.69250639462346e-05, -7.34990630326855e-04, -2.95459980854025e-03),
    -1.60960333262415e-02,
)
_ERF_Q = (
    *(-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03),
    *(-7.37332916720468e-03, -1.42647390514189e-02),
)


def _horner(coefficients: tuple[float, ...], t: F32) -> F32:
    out = np.full_like(t, coefficients[0])
    for c in coefficients[1:]:
        out *= t
        out += np.float32(c)
    return out


def erf(x: F32, out: Out = None) -> F32:
    """Error function, within 4e-7 of the exact value; erf(±inf) = ±1."""
    clamped = np.clip(x, np.float32(-4.0), np.float32(4.0))
    square = clamped * clamped
    clamped *= _horner(_ERF_P, square)
    clamped /= _horner(_ERF_Q, square)
    return np.clip(clamped, -_ONE, _ONE, out=clamped)


def sigmoid(x: F32, out: Out = None) -> F32:
    """1 / (1 + exp(-x))."""
    y = np.negative(x, out=out)
    np.exp(y, out=y)
    y += _ONE
    return np.divide(_ONE, y, out=y)


def softplus(x: F32, out: Out = None) -> F32:
    """log(1 + exp(x)), without overflow for large x."""
    y: F32 = np.abs(x)
    np.negative(y, out=y)
    np.exp(y, out=y)
    np.log1p(y, out=y)
    y += np.maximum(x, np.float32(0.0))
    return y


def sin(x: F32, out: Out = None) -> F32:
    """sin(x) on [-pi, pi]; beyond, the hardware's last cubic.

    That cubic is the Taylor polynomial about ±pi, d**3 / 6 - d with d = x ∓ pi: it gives the one
    documented value, sin(9) = 27.65.
    """
    d = x - np.copysign(_PI, x)
    cubic = d * (d * d / np.float32(6.0) - _ONE)
    return np.where(np.abs(x) > _PI, cubic, np.sin(x))


def _normal_cdf(x: F32) -> F32:
    y = erf(x * _SQRT_HALF)
    y += _ONE
    y *= _HALF
    return y


def gelu(x: F32, out: Out = None) -> F32:
    """x Phi(x); 0 at -inf."""
    y = _normal_cdf(x)
    y *= np.maximum(x, np.float32(-20.0))  # Phi is 0 there, and 0 * inf would be NaN
    return y


def gelu_dx(x: F32, out: Out = None) -> F32:
    """Phi(x) + x phi(x), the derivative of gelu."""
    bounded = np.clip(x, np.float32(-13.0), np.float32(13.0))  # x phi(x) < 1e-35 beyond
    y: F32 = np.exp(bounded * bounded * -_HALF)
    y *= _INV_SQRT_2PI
    y *= bounded
    y += _normal_cdf(x)
    return y


def gelu_apprx_tanh(x: F32, out: Out = None) -> F32:
    """x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2."""
    inner = x * x
    inner *= np.float32(0.044715)
    inner += _ONE
    inner *= x
    inner *= _SQRT_2_OVER_PI
    np.tanh(inner, out=inner)
    inner += _ONE
    inner *= _HALF
    inner *= np.maximum(x, np.float32(-20.0))
    return inner


def _times_gate(x: F32, gate: F32) -> F32:
    """x gate, where the gate underflows to 0 before x becomes infinite."""
    gate *= np.maximum(x, np.float32(-3e38))
    return gate


def gelu_apprx_sigmoid(x: F32, out: Out = None) -> F32:
    """x sigmoid(1.702 x)."""
    return _times_gate(x, sigmoid(x * np.float32(1.702)))


def _gate_derivative(x: F32, slope: float) -> F32:
    """d/dx of x s(slope x): s + z s (1 - s) with z = slope x."""
    z = np.clip(x * np.float32(slope), np.float32(-100.0), np.float32(100.0))
    y: F32 = _ONE + z * sigmoid(-z)
    y *= sigmoid(z)
    return y


def gelu_apprx_sigmoid_dx(x: F32, out: Out = None) -> F32:
    """Derivative of x sigmoid(1.702 x)."""
    return _gate_derivative(x, 1.702)


def silu(x: F32, out: Out = None) -> F32:
    """x sigmoid(x); 0 at -inf."""
    return _times_gate(x, sigmoid(x))


def silu_dx(x: F32, out: Out = None) -> F32:
    """Derivative of silu."""
    return _gate_derivative(x, 1.0)


def mish(x: F32, out: Out = None) -> F32:
    """x tanh(softplus(x)); 0 at -inf."""
    return _times_gate(x, np.tanh(softplus(x)))


def erf_dx(x: F32, out: Out = None) -> F32:
    """2 exp(-x^2) / sqrt(pi)."""
    y = np.multiply(x, x, out=out)
    np.negative(y, out=y)
    np.exp(y, out=y)
    y *= _TWO_OVER_SQRT_PI
    return y


def _relu(x: F32, out: Out = None) -> F32:
    return np.maximum(x, np.float32(0.0), out=out)


def _reciprocal(x: F32, out: Out = None) -> F32:
    return np.divide(_ONE, x, out=out)


def _rsqrt(x: F32, out: Out = None) -> F32:
    y = np.sqrt(x, out=out)
    return np.divide(_ONE, y, out=y)


def _copy(x: F32, out: Out = None) -> F32:
    return x


FUNCTIONS: dict[str, Function] = {
    "copy": _copy,
    "square": np.square,
    "sigmoid": sigmoid,
    "relu": _relu,
    "gelu": gelu,
    "gelu_dx": gelu_dx,
    "gelu_apprx_tanh": gelu_apprx_tanh,
    "gelu_apprx_sigmoid": gelu_apprx_sigmoid,
    "gelu_apprx_sigmoid_dx": gelu_apprx_sigmoid_dx,
    "silu": silu,
    "silu_dx": silu_dx,
    "tanh": np.tanh,
    "softplus": softplus,
    "mish": mish,
    "erf": erf,
    "erf_dx": erf_dx,
    "exp": np.exp,
    "log": np.log,
    "sin": sin,
    "arctan": np.arctan,
    "sqrt": np.sqrt,
    "rsqrt": _rsqrt,
    "reciprocal": _reciprocal,
    "sign": np.sign,
    "abs": np.abs,
}
"""ACT functions of gen3 by name: ``f(x, out=None)``; ``out`` is scratch that may become the result.
``prelu`` exists only in gen4's ``activate2``."""

VALID_RANGE: dict[str, tuple[float, float]] = {
    "log": (2.0**-64, 2.0**64),
    "sin": (-math.pi, math.pi),
    "arctan": (-math.pi / 2, math.pi / 2),
    "sqrt": (2.0**-116, 2.0**118),
    "rsqrt": (2.0**-87, 2.0**97),
    "reciprocal": (2.0**-42, 2.0**42),
}
"""Documented input range of functions that have one (of ``reciprocal``: of the magnitude)."""


def activation(
    op: str,
    data: F32,
    bias: Operand | None = None,
    scale: Operand = 1.0,
    out: F32 | None = None,
) -> F32:
    """``op(data * scale + bias)`` in fp32.

    The optional sum over the free axes is ``reduction.accumulate("add", ...)`` on the result,
    before its conversion to the destination's type (which of the two is summed is not documented).

    Args:
        op: name in ``FUNCTIONS``.
        data: ``[P, *free]`` fp32.
        bias: constant, ``[P, 1]``, or None.
        scale: constant or ``[P, 1]``.
        out: see the package's conventions.

    Returns:
        fp32 of ``data``'s shape; for ``copy`` without scale and bias, ``data`` itself.
    """
    scaled = isinstance(scale, np.ndarray) or scale != 1.0
    shifted = bias is not None and (isinstance(bias, np.ndarray) or bias != 0.0)
    if not scaled and not shifted:
        result: F32 = FUNCTIONS[op](data, out=out)
        return result
    if scaled:
        free = alu.scratch(out, bias)
        work = np.multiply(data, alu.column(scale, data.ndim), out=free)
        if shifted:
            assert bias is not None
            work += alu.column(bias, data.ndim)
    else:
        assert bias is not None
        work = np.add(data, alu.column(bias, data.ndim), out=out)
    result = FUNCTIONS[op](work, out=work)
    return result
