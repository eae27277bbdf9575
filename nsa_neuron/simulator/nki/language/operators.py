"""Operator objects: functions on tiles, and the values of `op=` arguments."""

from ...tensor import NkiTensor


def _new_like(x, dtype):
    from .tiles import ndarray, sbuf

    return ndarray(x.shape, dtype or x.dtype, sbuf)


def _binary(name):
    def operator(x, y, dtype=None):
        from .. import isa

        if not isinstance(x, NkiTensor):
            out = _new_like(y, dtype)
            isa.tensor_scalar(out, y, operator, x, reverse0=True)
        elif isinstance(y, NkiTensor):
            out = _new_like(x, dtype)
            isa.tensor_tensor(out, x, y, operator)
        else:
            out = _new_like(x, dtype)
            isa.tensor_scalar(out, x, operator, y)
        return out

    return _named(operator, name, f"x {name} y, element by element, into a new SBUF tile.")


def _unary(name):
    def operator(x, dtype=None):
        from .. import isa

        out = _new_like(x, dtype)
        isa.activation(out, operator, x)
        return out

    return _named(operator, name, f"{name}(x) into a new SBUF tile, on the Scalar Engine.")


def _marker(name):
    def operator(*args, **kwargs):
        from ...context import violation

        raise violation("usage", f"nl.{name} is only a value of op=", instruction=f"nl.{name}")

    return _named(operator, name, f"Value of `op=`: {name}.")


def _named(function, name, doc):
    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    function.nki_op = name
    return function


BINARY = (
    "add",
    "subtract",
    "multiply",
    "divide",
    "maximum",
    "minimum",
    "power",
    "mod",
    "fmod",
    "abs_max",
    "abs_min",
    "equal",
    "not_equal",
    "greater",
    "greater_equal",
    "less",
    "less_equal",
    "logical_and",
    "logical_or",
    "logical_xor",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "left_shift",
    "right_shift",
)
UNARY = (
    "exp",
    "log",
    "sqrt",
    "rsqrt",
    "tanh",
    "sigmoid",
    "relu",
    "gelu",
    "gelu_dx",
    "gelu_apprx_tanh",
    "gelu_apprx_sigmoid",
    "gelu_apprx_sigmoid_dx",
    "silu",
    "silu_dx",
    "softplus",
    "mish",
    "erf",
    "erf_dx",
    "arctan",
    "sin",
    "square",
    "sign",
    "abs",
    "reciprocal",
    "copy",
    "logical_not",
    "invert",
)
MARKERS = ("average", "prelu", "bypass")

TABLE = {
    **{n: _binary(n) for n in BINARY},
    **{n: _unary(n) for n in UNARY},
    **{n: _marker(n) for n in MARKERS},
}
