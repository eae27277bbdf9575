"""`nl` functions of several instructions: rounding, trigonometry, softmax, rms_norm, where, ...

AWS documents their results, not their lowering; each is written with the instructions a kernel
author would use on gen3, so that the record is that of a plausible lowering.
"""

from math import pi, prod

from ...machine.dtypes import float32, int32, resolve, uint8, uint32
from ...memory.tensor import NkiTensor
from ...rules.session import violation
from .. import isa
from .making import is_on_chip, ndarray, new_tile, repeat, require_tile, sbuf
from .operators import TABLE
from .reductions import axes_of

add, multiply, subtract = TABLE["add"], TABLE["multiply"], TABLE["subtract"]
maximum, minimum, less, greater = (TABLE[n] for n in ("maximum", "minimum", "less", "greater"))


def _out(x, dtype, name):
    return new_tile(require_tile(x, name).shape, dtype or x.dtype)


def negative(x, dtype=None):
    """-x."""
    out = _out(x, dtype, "negative")
    isa.tensor_scalar(out, x, multiply, -1.0)
    return out


def _nearest(x):
    """(x as fp32, its nearest integer as fp32), both tiles; exact below 2**31."""
    value, whole, rounded = (new_tile(x.shape, d) for d in (float32, int32, float32))
    isa.tensor_copy(value, x)
    isa.tensor_copy(whole, value)
    isa.tensor_copy(rounded, whole)
    return value, rounded


def _rounding(x, dtype, name, correct):
    """Round to nearest, apply `correct(isa, result, value)`; keep values of 2**23 and more."""
    out = _out(x, dtype, name)
    value, result = _nearest(x)
    correct(isa, result, value)
    small = new_tile(x.shape, uint8)
    isa.tensor_scalar(small, value, TABLE["abs"], 0.0, op1=less, operand1=2.0**23)
    isa.tensor_copy_predicated(value, result, small)
    isa.tensor_copy(out, value)
    return out


def _down(isa, result, value):
    over = new_tile(value.shape, float32)
    isa.tensor_tensor(over, result, value, greater)
    isa.tensor_tensor(result, result, over, subtract)


def _up(isa, result, value):
    under = new_tile(value.shape, float32)
    isa.tensor_tensor(under, result, value, less)
    isa.tensor_tensor(result, result, under, add)


def _toward_zero(isa, result, value):
    """sign(value) * floor(|value|)."""
    sign, magnitude, nearest = (new_tile(value.shape, float32) for _ in range(3))
    isa.activation(sign, TABLE["sign"], value)
    isa.tensor_scalar(magnitude, value, TABLE["abs"], 0.0)
    isa.tensor_scalar(nearest, result, TABLE["abs"], 0.0)
    _down(isa, nearest, magnitude)
    isa.tensor_tensor(result, nearest, sign, multiply)


def floor(x, dtype=None):
    """Largest integer not above x."""
    return _rounding(x, dtype, "floor", _down)


def ceil(x, dtype=None):
    """Smallest integer not below x."""
    return _rounding(x, dtype, "ceil", _up)


def trunc(x, dtype=None):
    """x without its fraction."""
    return _rounding(x, dtype, "trunc", _toward_zero)


# 2 pi in parts of few bits, so that k * part is exact for the k that matter (Cody and Waite).
_TURN = (6.28125, 0.0019350051879882812, 3.019916050561733e-07)


def _sine(x, out, shift):
    """out = sin(x + shift), after reducing the argument to the Scalar Engine's [-pi, pi]."""
    angle, turns = (new_tile(x.shape, float32) for _ in range(2))
    whole = new_tile(x.shape, int32)
    isa.tensor_scalar(turns, x, multiply, 1.0 / (2.0 * pi), op1=add, operand1=shift / (2.0 * pi))
    isa.tensor_copy(whole, turns)
    isa.tensor_copy(turns, whole)
    isa.tensor_copy(angle, x)
    for part in _TURN:
        isa.scalar_tensor_tensor(angle, turns, multiply, -part, add, angle)
    isa.tensor_scalar(angle, angle, add, shift, op1=maximum, operand1=-pi)
    isa.tensor_scalar(angle, angle, minimum, pi)
    isa.activation(out, TABLE["sin"], angle)


def sin(x, dtype=None):
    """sin(x) on the Scalar Engine, after range reduction."""
    out = _out(x, dtype, "sin")
    _sine(x, out, 0.0)
    return out


def cos(x, dtype=None):
    """cos(x) = sin(x + pi / 2)."""
    out = _out(x, dtype, "cos")
    _sine(x, out, pi / 2)
    return out


def tan(x, dtype=None):
    """sin(x) / cos(x)."""
    out = _out(x, dtype, "tan")
    s, c = (new_tile(x.shape, float32) for _ in range(2))
    _sine(x, s, 0.0)
    _sine(x, c, pi / 2)
    isa.reciprocal(c, c)
    isa.tensor_tensor(out, s, c, multiply)
    return out


sin.nki_op = "sin"  # type: ignore[attr-defined]
TABLE["sin"] = sin


def softmax(x, axis=-1, dtype=None):
    """exp(x - max) / sum over trailing free axes; the exponentials are fp32."""
    out = _out(x, dtype, "softmax")
    axes = axes_of(x, axis, "softmax")
    kept = prod(x.shape[1 : axes[0]])
    flat, result = (t.reshape((t.shape[0], kept, -1)) for t in (x, out))
    powers = new_tile(flat.shape, float32)
    low, total = (new_tile((x.shape[0], kept), float32) for _ in range(2))
    isa.tensor_reduce(low, maximum, flat, axis=2, negate=True)
    for row in range(kept):
        column = slice(row, row + 1)
        isa.activation_reduce(
            powers[:, row], TABLE["exp"], flat[:, row], add, total[:, column], bias=low[:, column]
        )
    isa.reciprocal(total, total)
    for row in range(kept):
        isa.tensor_scalar(result[:, row], powers[:, row], multiply, total[:, row : row + 1])
    return out


def rms_norm(x, w, axis, n, epsilon=1e-06, dtype=None, compute_dtype=None):
    """x / sqrt(sum(x ** 2) / n + epsilon) * w, the sum over trailing free axes."""
    out = _out(x, dtype, "rms_norm")
    axes = axes_of(x, axis, "rms_norm")
    kind = resolve(compute_dtype) if compute_dtype is not None else float32
    kept = prod(x.shape[1 : axes[0]])
    flat = x.reshape((x.shape[0], kept, -1))
    squares, scaled = new_tile(flat.shape, kind), new_tile(flat.shape, kind)
    total = new_tile((x.shape[0], kept), float32)
    isa.activation(squares, TABLE["square"], flat)
    isa.tensor_reduce(total, add, squares, axis=2)
    isa.tensor_scalar(total, total, multiply, 1.0 / n, op1=add, operand1=epsilon)
    isa.activation(total, TABLE["rsqrt"], total)
    for row in range(kept):
        isa.tensor_scalar(scaled[:, row], flat[:, row], multiply, total[:, row : row + 1])
    weights = broadcast_to(require_tile(w, "rms_norm", "w"), x.shape)
    isa.tensor_tensor(out, scaled.reshape(x.shape), weights, multiply)
    return out


def where(condition, x, y, dtype=None):
    """x where condition is not 0, else y; both may be scalars."""
    require_tile(condition, "where", "condition")
    kinds = [t.dtype for t in (x, y) if isinstance(t, NkiTensor)]
    kind = resolve(dtype) if dtype is not None else (kinds[0] if kinds else condition.dtype)
    shape = condition.shape
    mask, out = new_tile(shape, uint8), new_tile(shape, kind)
    isa.tensor_scalar(mask, condition, TABLE["not_equal"], 0.0)
    if isinstance(y, NkiTensor):
        isa.tensor_copy(out, broadcast_to(y, shape))
    else:
        isa.memset(out, int(y) if kind.is_integer else y)
    if isinstance(x, NkiTensor):
        x = broadcast_to(x, shape)
        if x.dtype.name != kind.name:
            x = TABLE["copy"](x, kind)
    isa.tensor_copy_predicated(out, x, mask)
    return out


def broadcast_to(x, shape, dtype=None):
    """x in a shape of the same rank: size-1 free dims by a stride of 0, partitions by a shuffle."""
    require_tile(x, "broadcast_to")
    shape = tuple(shape)
    if len(shape) != x.ndim or any(n not in (1, m) for n, m in zip(x.shape, shape, strict=True)):
        raise violation(
            "shape",
            "each dim stays or grows from 1, at the same rank",
            instruction="nl.broadcast_to",
            operand="shape",
            value=shape,
            limit=x.shape,
        )
    if x.shape[0] != shape[0]:
        x = _over_partitions(isa, x, shape[0])
    x = repeat(x, shape)
    if dtype is not None and resolve(dtype).name != x.dtype.name:
        return TABLE["copy"](x, dtype)
    return x


def _over_partitions(isa, x, partitions):
    """Partition 0 of x on `partitions` partitions: one stream shuffle per quadrant."""
    if x.buffer is not sbuf:
        x = TABLE["copy"](x)
    out = new_tile((partitions, *x.shape[1:]), x.dtype)
    for start in range(0, partitions, 32):
        rows = min(32, partitions - start)
        isa.nc_stream_shuffle(out[start : start + rows], x[0:1], [0] * 32)
    return out


def expand_dims(x, axis):
    """A view of x with a dim of size 1 inserted."""
    return x.expand_dim(axis)


def dropout(x, rate, dtype=None):
    """x with elements zeroed at probability `rate`; kept elements are not rescaled."""
    out = new_tile(require_tile(x, "dropout").shape, x.dtype)
    isa.dropout(out, x, rate)
    if dtype is not None and resolve(dtype).name != x.dtype.name:
        return TABLE["copy"](out, dtype)
    return out


def random_seed(seed):
    """Seed the generator of `rand` with a (1, 1) tile."""
    if not isinstance(seed, NkiTensor):
        raise violation(
            "usage",
            "must be a (1, 1) tile",
            instruction="nl.random_seed",
            operand="seed",
            value=seed,
            hint="nl.random_seed(nl.full((1, 1), 42, dtype=nl.int32))",
        )
    isa.set_rng_seed(seed)


def rand(shape, dtype, buffer=sbuf, name=""):
    """A new tensor of uniform numbers in [0, 1): 24 random bits each."""
    out = ndarray(shape, dtype, buffer, name)
    tile = out if is_on_chip(buffer) else ndarray(shape, dtype, sbuf)
    words = ndarray(shape, uint32, sbuf)
    isa.rng(words)
    isa.tensor_scalar(words, words, TABLE["right_shift"], 8)
    isa.tensor_scalar(tile, words, multiply, 2.0**-24)
    if tile is not out:
        isa.dma_copy(out, tile)
    return out
