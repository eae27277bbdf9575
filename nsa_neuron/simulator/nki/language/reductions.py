"""Reductions over trailing free axes: `tensor_reduce` into a new SBUF tile."""

from math import prod as product

from ...machine.dtypes import float32
from ...rules.session import violation
from .. import isa
from .making import new_tile, require_tile
from .operators import TABLE


def axes_of(x, axis, name):
    """Ascending positive axes, which must be the last free ones.

    Raises:
        SimulationError: rule "axis".
    """
    given = (axis,) if isinstance(axis, int) else tuple(axis)
    rank = x.ndim
    axes = tuple(sorted(a % rank for a in given if isinstance(a, int) and -rank <= a < rank))
    trailing = tuple(range(rank - len(axes), rank))
    if not axes or len(axes) != len(given) or axes != trailing or 0 in axes:
        raise violation(
            "axis",
            "reduces the last free axes, not the partition axis",
            instruction=f"nl.{name}",
            operand="axis",
            value=axis,
            limit=f"1..{rank - 1}, ending at {rank - 1}",
        )
    return axes


def _shape(x, axes, keepdims):
    if keepdims:
        return tuple(1 if d in axes else n for d, n in enumerate(x.shape))
    return x.shape[: axes[0]]


def _reduce(name, operator, x, axis, dtype, keepdims):
    axes = axes_of(require_tile(x, name), axis, name)
    out = new_tile(_shape(x, axes, keepdims), dtype or x.dtype)
    isa.tensor_reduce(out, operator, x, axis=axes, keepdims=keepdims)
    return out


def sum(x, axis, dtype=None, keepdims=False):
    """Sum over trailing free axes."""
    return _reduce("sum", TABLE["add"], x, axis, dtype, keepdims)


def max(x, axis, dtype=None, keepdims=False):
    """Maximum over trailing free axes."""
    return _reduce("max", TABLE["maximum"], x, axis, dtype, keepdims)


def min(x, axis, dtype=None, keepdims=False):
    """Minimum over trailing free axes."""
    return _reduce("min", TABLE["minimum"], x, axis, dtype, keepdims)


def prod(x, axis, dtype=None, keepdims=False):
    """Product over trailing free axes."""
    return _reduce("prod", TABLE["multiply"], x, axis, dtype, keepdims)


def all(x, axis, dtype=None):
    """1 where every element over trailing free axes is not 0."""
    out = _reduce("all", TABLE["logical_and"], x, axis, dtype, False)
    out.memory.verdict = True
    return out


def mean(x, axis, dtype=None, keepdims=False):
    """Mean over trailing free axes, accumulated in fp32."""
    axes = axes_of(require_tile(x, "mean"), axis, "mean")
    total = _reduce("mean", TABLE["add"], x, axis, float32, keepdims)
    out = new_tile(_shape(x, axes, keepdims), dtype or x.dtype)
    count = product(x.shape[d] for d in axes)
    isa.tensor_scalar(out, total, TABLE["multiply"], 1.0 / count)
    return out


def var(x, axis, dtype=None, keepdims=False):
    """Biased variance over trailing free axes; the axes are always kept, as documented."""
    axes = axes_of(require_tile(x, "var"), axis, "var")
    middle = mean(x, axis, float32, True)
    centred = TABLE["subtract"](x, middle, float32)
    isa.tensor_tensor(centred, centred, centred, TABLE["multiply"])
    out = new_tile(_shape(x, axes, True), dtype or x.dtype)
    total = _reduce("var", TABLE["add"], centred, axis, float32, True)
    count = product(x.shape[d] for d in axes)
    isa.tensor_scalar(out, total, TABLE["multiply"], 1.0 / count)
    return out
