"""Operators: functions on tiles that return a new SBUF tile, and the values of `op=` arguments.

`nl.add` is both: `nl.add(a, b)` issues the instruction AWS documents for it, `op=nl.add` names the
operator (attribute `nki_op`). Where the documents do not say which instruction a function becomes,
the choice made here is in the docstring of its factory.
"""

from ...memory.tensor import NkiTensor
from ...rules.session import violation
from .. import isa
from .making import broadcast_pair, new_tile, promote, require_tile
from .simulated import binary


def _binary(name):
    """Two tiles: `tensor_tensor`; a tile and a scalar: `tensor_scalar`."""

    def operator(x, y, dtype=None):
        if not isinstance(x, NkiTensor) and not isinstance(y, NkiTensor):
            raise violation(
                "usage", "x or y must be a tile", instruction=f"nl.{name}", operand="x", value=x
            )
        if not isinstance(x, NkiTensor):
            out = new_tile(require_tile(y, name, "y").shape, dtype or y.dtype)
            isa.tensor_scalar(out, y, operator, x, reverse0=True)
        elif isinstance(y, NkiTensor):
            a, b, shape = broadcast_pair(require_tile(x, name), require_tile(y, name, "y"), name)
            out = new_tile(shape, dtype or promote(x.dtype, y.dtype))
            isa.tensor_tensor(out, a, b, operator)
        else:
            out = new_tile(require_tile(x, name).shape, dtype or x.dtype)
            isa.tensor_scalar(out, x, operator, y)
        out.memory.verdict = name in _VERDICTS
        return out

    return _named(operator, name, f"x {name} y, element by element.")


def _simulated(name, doc):
    """No engine has the operator: computed, and noted in the record's warnings."""

    def operator(x, y, dtype=None):
        return binary(name, x, y, dtype)

    return _named(operator, name, doc)


def _act(name):
    """`activation` on the Scalar Engine."""

    def operator(x, dtype=None):
        out = new_tile(require_tile(x, name).shape, dtype or x.dtype)
        isa.activation(out, operator, x)
        return out

    return _named(operator, name, f"{name}(x) on the Scalar Engine.")


def _via(name, lower, doc):
    """`lower(isa, out, x, operator)` issues the instructions."""

    def operator(x, dtype=None):
        out = new_tile(require_tile(x, name).shape, dtype or x.dtype)
        lower(isa, out, x, operator)
        out.memory.verdict = name in _VERDICTS
        return out

    return _named(operator, name, doc)


def _marker(name, doc):
    def operator(*args, **kwargs):
        raise violation("usage", f"nl.{name} is only a value of op=", instruction=f"nl.{name}")

    return _named(operator, name, doc)


def _named(function, name, doc):
    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    function.nki_op = name
    return function


def _logical_not(isa, out, x, _):
    other = TABLE["bitwise_xor"] if x.dtype.is_integer else TABLE["logical_xor"]
    isa.tensor_scalar(out, x, other, 1 if x.dtype.is_integer else 1.0)


def _invert(isa, out, x, _):
    isa.tensor_scalar(out, x, TABLE["bitwise_xor"], -1)


def _rsqrt(isa, out, x, operator):
    isa.tensor_scalar(out, x, operator, 0.0, engine=isa.engine.gpsimd)


_ACT = (
    "exp log sqrt tanh sigmoid relu gelu gelu_dx gelu_apprx_tanh gelu_apprx_sigmoid "
    "gelu_apprx_sigmoid_dx silu silu_dx softplus mish erf erf_dx arctan square sign"
).split()
_VERDICTS = frozenset(
    "equal not_equal greater greater_equal less less_equal logical_and logical_or "
    "logical_xor logical_not".split()
)
_BINARY = (
    "add subtract multiply maximum minimum power abs_max abs_min equal not_equal greater "
    "greater_equal less less_equal logical_and logical_or logical_xor bitwise_and bitwise_or "
    "bitwise_xor left_shift right_shift"
).split()

TABLE = {
    **{n: _binary(n) for n in _BINARY},
    **{n: _act(n) for n in _ACT},
    "divide": _simulated("divide", "x / y; no engine divides: multiply by nl.reciprocal(y)."),
    "mod": _simulated("mod", "Remainder with the sign of y; simulation only."),
    "fmod": _simulated("fmod", "Remainder with the sign of x; simulation only."),
    "abs": _via(
        "abs", lambda isa, o, x, op: isa.tensor_scalar(o, x, op, 0.0), "|x| on the Vector Engine."
    ),
    "copy": _via(
        "copy",
        lambda isa, o, x, op: isa.tensor_copy(o, x, engine=isa.engine.vector),
        "A copy in SBUF, by the Vector Engine (NKI 0.6): bit-exact where the dtype stays.",
    ),
    "reciprocal": _via(
        "reciprocal", lambda isa, o, x, op: isa.reciprocal(o, x), "1 / x on the Vector Engine."
    ),
    "rsqrt": _via("rsqrt", _rsqrt, "1 / sqrt(x) on GpSimd (NKI 0.5): x must be in SBUF."),
    "logical_not": _via("logical_not", _logical_not, "x xor 1; x holds 0 and 1."),
    "invert": _via("invert", _invert, "Bitwise not: x xor all ones; integers only."),
    "average": _marker("average", "Value of `op=` of tensor_partition_reduce: the mean."),
    "prelu": _marker("prelu", "Value of `op=`: parametric ReLU, of NeuronCore-v4's activate2."),
    "bypass": _marker("bypass", "Value of `op=`: passes data through."),
}

__all__ = ["TABLE"]
