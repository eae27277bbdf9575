"""Vector Engine: copies and element-wise arithmetic of two tensors."""

from collections import namedtuple
from numbers import Integral

import numpy as np

from ...issue.spec import Spec
from ...issue.timing import GpSimd, Scalar, Vector, timing
from ...machine.dtypes import store_bits
from ...rules.session import running, violation
from ...semantics import alu, elementwise
from ..binding import Interned, core_of, finish, instruction, load, op_name, result_array, save
from .constants import engine as engines
from .shared import (
    arithmetic,
    engine_for,
    engine_of,
    integers,
    on_chip,
    one_psum_input,
    same_tiles,
    warn_simulated,
)

EngineParams = namedtuple("EngineParams", "engine")
TensorTensorParams = namedtuple("TensorTensorParams", "op engine")
_copy_params = Interned(EngineParams, lambda engine: (engine_of(engine, "tensor_copy"),))
_fill_params = Interned(EngineParams, lambda engine: (engine_of(engine, "memset"),))
_two_params = Interned(
    TensorTensorParams,
    lambda op, engine: (
        op_name(op, "tensor_tensor", "op"),
        engine_of(engine, "tensor_tensor"),
    ),
)


def _check_copy(c):
    c.tensors("src")
    same_tiles(c, "dst", "src")
    return engine_for(c, c.params.engine, "vector", "vector", "scalar", "gpsimd")


def _run_copy(core, payload, writes, reads, params):
    (dst,), (src,) = writes, reads
    through_fp32 = dst.dtype is not src.dtype or params.engine is engines.scalar
    save(core, dst, load(src) if through_fp32 else src.array())


COPY = Spec(
    "tensor_copy",
    ("dst",),
    ("src",),
    _check_copy,
    _run_copy,
    timing(Vector.ONE_INPUT, Scalar.STREAM, GpSimd.ARITHMETIC),
)


@instruction
def tensor_copy(dst, src, engine=engines.unknown, name=None):
    """dst = src; bit-exact between equal dtypes, through fp32 otherwise and on Scalar."""
    core = running() or core_of("tensor_copy")
    return core.issue(COPY, (dst,), (src,), _copy_params[engine,], name)


def _check_memset(c):
    on_chip(c, "dst")
    value = c["value"].value
    integer = isinstance(value, Integral)
    c.require(
        hasattr(value, "__float__"),
        "usage",
        "is a compile-time number",
        "value",
        value=type(value).__name__,
        limit="int or float",
    )
    c.require(
        integer or not c["dst"].dtype.is_integer,
        "value",
        "an integer tensor takes an integer",
        "value",
        value=value,
        limit="int",
    )
    return engine_for(c, c.params.engine, "vector", "vector", "gpsimd")


def _run_memset(core, payload, writes, reads, params):
    dst = writes[0]
    out = dst.array()
    value = reads[0]
    if out.dtype.kind in "iu":
        info = np.iinfo(out.dtype)
        if not info.min <= value <= info.max:
            raise violation(
                "value",
                f"does not fit {dst.dtype}",
                instruction="memset",
                operand="value",
                value=value,
                limit=(int(info.min), int(info.max)),
            )
        out[...] = value
    else:
        out[...] = out.dtype.type(value)


MEMSET = Spec(
    "memset",
    ("dst",),
    ("value",),
    _check_memset,
    _run_memset,
    timing(Vector.FILL, GpSimd.ARITHMETIC),
)


@instruction
def memset(dst, value, engine=engines.unknown, name=None):
    """Fill dst with a constant."""
    core = running() or core_of("memset")
    return core.issue(MEMSET, (dst,), (value,), _fill_params[engine,], name)


def _check_tensor_tensor(c):
    op, asked = c.params
    c.tensors("data1", "data2")
    same_tiles(c, "dst", "data1", "data2")
    one_psum_input(c, "data1", "data2")
    operands = (c["dst"], c["data1"], c["data2"])
    if op in alu.BITVEC_BINARY:
        integers(c, op, "dst", "data1", "data2")
        return engine_for(c, asked, "vector", "vector"), "bits"
    arithmetic(c, op, "op", unary=False, tensor=True)
    if op in alu.SIMULATION_ONLY:
        return c.composed(engine_for(c, asked, "vector", "vector", "gpsimd")), "simulated"
    exact = op != "power" and all(o.dtype.name in ("int32", "uint32") for o in operands)
    sbuf = all(o.buffer == "sbuf" for o in operands)
    default = "gpsimd" if op == "power" or (exact and sbuf) else "vector"
    chosen = engine_for(c, asked, default, "vector", "gpsimd")
    c.require(
        op != "power" or chosen == "gpsimd", "engine", "power runs on gpsimd", "op", value=chosen
    )
    return chosen, "integer" if exact and chosen == "gpsimd" else "fp32"


def _run_tensor_tensor(core, how, writes, reads, params):
    (dst,), (a, b), op = writes, reads, params.op
    if how == "fp32" or how == "simulated":
        warn_simulated(core, how, op)
        out = result_array(core, dst, a.shape)
        finish(core, dst, elementwise.tensor_tensor(load(a), load(b), op, out), out)
        return
    x, y = a.array(), b.array()
    if y.shape != x.shape:
        y = y.reshape(x.shape)
    if how == "integer":
        save(core, dst, alu.integer(op, x, y, dst.array().dtype))
    else:
        store_bits(dst.array(), alu.bitvec(op, x, y))


TENSOR_TENSOR = Spec(
    "tensor_tensor",
    ("dst",),
    ("data1", "data2"),
    _check_tensor_tensor,
    _run_tensor_tensor,
    timing(Vector.TWO_INPUTS, GpSimd.ARITHMETIC),
)


@instruction
def tensor_tensor(dst, data1, data2, op, engine=engines.unknown, name=None):
    """dst = data1 op data2, element by element; exact for 32-bit integers on GpSimd."""
    core = running() or core_of("tensor_tensor")
    return core.issue(TENSOR_TENSOR, (dst,), (data1, data2), _two_params[op, engine], name)
