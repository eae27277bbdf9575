"""Operators: functions on tiles that return a new SBUF tile, and the values of `op=` arguments.

`nl.add` is both: `nl.add(a, b)` issues the instruction AWS documents for it, `op=nl.add` names the
operator (attribute `nki_op`). Where the documents do not say which instruction a function becomes,
the choice made here is in the docstring of its factory.
"""

from ...context import violation
from ...dtypes import DType, bfloat16, float32
from ...tensor import NkiTensor
from .tiles import ndarray, sbuf


def promote(a, b):
    """Result dtype of two tiles: fp32 for unlike floats, bf16 for unlike fp8, else the wider.

    `nl` documents the default only for equal dtypes ("the same as the input tile"); for unlike
    ones this is the rule of NKI 0.1 (SDK 2.26 nki/api/nki.api.shared.rst).
    """
    if a.name == b.name:
        return a
    if a.is_float != b.is_float:
        return a if a.is_float else b
    if a.is_float:
        if a.is_fp8 and b.is_fp8:
            return bfloat16
        if a.itemsize == b.itemsize:
            return float32
    return a if a.itemsize >= b.itemsize else b


def new_tile(shape, dtype):
    """An SBUF tile for a result; a 1-D shape gets a free dim of 1."""
    shape = tuple(shape)
    return ndarray(shape if len(shape) > 1 else (*shape, 1), dtype, sbuf)


def require_tile(x, function, operand="x"):
    """Refuse anything but a tensor on chip."""
    if not isinstance(x, NkiTensor) or not x.on_chip:
        given = repr(x) if isinstance(x, NkiTensor) else type(x).__name__
        raise violation(
            "usage",
            "must be a tile in SBUF or PSUM",
            instruction=f"nl.{function}",
            operand=operand,
            value=given,
            hint="nl.load it first",
        )
    return x


def _fits(shape, target):
    """True when `shape` broadcasts to `target` along free dims only."""
    return (
        len(shape) == len(target)
        and shape[0] == target[0]
        and all(n in (1, m) for n, m in zip(shape, target, strict=True))
    )


def broadcast_pair(x, y, function):
    """Views of both tiles in one shape; size-1 free dims are repeated by a stride of 0.

    Raises:
        SimulationError: rule "shape": other shapes, which NKI 0.3 to 0.6 do not broadcast.
    """
    if x.size == y.size and x.shape[0] == y.shape[0]:
        return x, y, x.shape if x.ndim >= y.ndim else y.shape
    if x.ndim == y.ndim and x.shape[0] == y.shape[0]:
        target = tuple(max(a, b) for a, b in zip(x.shape, y.shape, strict=True))
        if _fits(x.shape, target) and _fits(y.shape, target):
            return repeat(x, target), repeat(y, target), target
    raise violation(
        "shape",
        "the tiles' shapes differ",
        instruction=f"nl.{function}",
        operand="y",
        value=y.shape,
        limit=x.shape,
        hint="nl.broadcast_to(y, x.shape)",
    )


def repeat(x, shape):
    """A view of x with its size-1 free dims repeated to `shape`."""
    for dim in range(1, len(shape)):
        if x.shape[dim] != shape[dim]:
            x = x.broadcast(dim, shape[dim])
    return x


def _binary(name):
    """Two tiles: `tensor_tensor`; a tile and a scalar: `tensor_scalar`."""

    def operator(x, y, dtype=None):
        from .. import isa

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
        return out

    return _named(operator, name, f"x {name} y, element by element.")


def _simulated(name, doc):
    """No engine has the operator: computed, and noted in the record's warnings."""

    def operator(x, y, dtype=None):
        from .simulated import binary

        return binary(name, x, y, dtype)

    return _named(operator, name, doc)


def _act(name):
    """`activation` on the Scalar Engine."""

    def operator(x, dtype=None):
        from .. import isa

        out = new_tile(require_tile(x, name).shape, dtype or x.dtype)
        isa.activation(out, operator, x)
        return out

    return _named(operator, name, f"{name}(x) on the Scalar Engine.")


def _via(name, lower, doc):
    """`lower(isa, out, x, operator)` issues the instructions."""

    def operator(x, dtype=None):
        from .. import isa

        out = new_tile(require_tile(x, name).shape, dtype or x.dtype)
        lower(isa, out, x, operator)
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

__all__ = ["TABLE", "DType", "broadcast_pair", "new_tile", "promote", "repeat", "require_tile"]
