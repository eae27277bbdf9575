"""Scalar Engine: activation, activation_reduce."""

from collections import namedtuple

import numpy as np

from ...issue.spec import Spec
from ...issue.timing import Scalar, timing
from ...machine.dtypes import float32
from ...rules.session import running
from ...semantics import activation as functions
from ..binding import (
    Interned,
    core_of,
    finish,
    instruction,
    load,
    load_scalar,
    op_name,
    result_array,
    save,
)
from .constants import reduce_cmd as commands
from .shared import command_of, on_chip, one_of, operand, same_tiles

ActivationParams = namedtuple("ActivationParams", "op reduce_op reduce_cmd")


def _read(op, reduce_op, command):
    what = "activation"
    reduce = None if reduce_op is None else op_name(reduce_op, what, "reduce_op")
    return op_name(op, what, "op"), reduce, command_of(command, what)


def _read_reduce(op, reduce_op):
    what = "activation_reduce"
    return op_name(op, what, "op"), op_name(reduce_op, what, "reduce_op"), "reset_reduce"


_params = Interned(ActivationParams, _read)
_reduce_params = Interned(ActivationParams, _read_reduce)


def _check_activation(c):
    op, reduce_op, command = c.params
    c.tensors("data")
    same_tiles(c, "dst", "data")
    c.require(
        op != "prelu",
        "generation",
        "prelu exists from NeuronCore-v4 on, in activate2",
        "op",
        value=op,
    )
    c.require(
        op in functions.FUNCTIONS,
        "operator",
        f"{op} is no function of the Scalar Engine",
        "op",
        value=op,
        limit=sorted(functions.FUNCTIONS),
    )
    operand(c, "bias", optional=True)
    operand(c, "scale", float32)
    if c["bias"]:
        c.require(c["bias"].dtype.name != "tfloat32", "dtype", "a bias tile is not tf32", "bias")
    on_chip(c, "reduce_res")
    c.column("reduce_res")
    one_of(c, reduce_op, (None, "add"), "operator", "reduce_op", "reduces by add only")
    allowed = ("idle", "reset", "reduce", "reset_reduce")
    one_of(c, command, allowed, "value", "reduce_cmd", f"activation has no {command}")
    c.require(
        reduce_op is not None or command in ("idle", "reset"),
        "operator",
        f"{command} needs reduce_op=nl.add",
        "reduce_op",
        value=reduce_op,
        limit="add",
    )
    return "scalar", functions.VALID_RANGE.get(op)


def _run_activation(core, valid, writes, reads, params):
    dst, result = writes
    data, bias, scale = reads
    op, _, command = params
    source, add, times = load(data), load_scalar(bias), load_scalar(scale)
    if valid is not None:
        _note_range(core, op, valid, source, add, times)
    out = result_array(core, dst, data.shape)
    values = functions.activation(op, source, add, times, out)
    registers = core.accumulators["scalar"]
    first = dst.access().partition
    if command != "idle":
        registers.update("activation", first, "add", values, command)
    finish(core, dst, values, out)
    if result is not None:
        values = registers.read("activation", first, dst.shape[0])
        save(core, result, values.reshape(result.shape))


def _note_range(core, op, valid, data, bias, scale):
    """Note inputs outside the function's documented range: hardware returns garbage there."""
    values = functions.activation("copy", data, bias, scale)
    if op == "reciprocal":
        values = np.abs(values)
    low, high = float(values.min()), float(values.max())
    tolerance = np.float32(1e-6)
    if low < valid[0] * (1 + np.sign(-valid[0]) * tolerance) or high > valid[1] * (1 + tolerance):
        core.warn(
            f"activation: {op} of values in [{low:.6g}, {high:.6g}]; its documented range is "
            f"[{valid[0]:.6g}, {valid[1]:.6g}], beyond which hardware's result is undefined"
        )


ACTIVATION = Spec(
    "activation",
    ("dst", "reduce_res"),
    ("data", "bias", "scale"),
    _check_activation,
    _run_activation,
    timing(Scalar.FUNCTION, accumulator=True),
    optional=("reduce_res",),
)
ACTIVATION_REDUCE = Spec(
    "activation_reduce",
    ("dst", "reduce_res"),
    ("data", "bias", "scale"),
    _check_activation,
    _run_activation,
    timing(Scalar.FUNCTION, accumulator=True),
    optional=("reduce_res",),
)


@instruction
def activation(
    dst,
    op,
    data,
    bias=None,
    scale=1.0,
    reduce_op=None,
    reduce_res=None,
    reduce_cmd=commands.idle,
    name=None,
):
    """dst = op(data * scale + bias), with an optional running sum per partition."""
    core = running() or core_of("activation")
    params = _params[op, reduce_op, reduce_cmd]
    return core.issue(ACTIVATION, (dst, reduce_res), (data, bias, scale), params, name)


@instruction
def activation_reduce(dst, op, data, reduce_op, reduce_res, bias=None, scale=1.0, name=None):
    """`activation` that also sums its outputs of each partition into reduce_res."""
    core = running() or core_of("activation_reduce")
    params = _reduce_params[op, reduce_op]
    return core.issue(ACTIVATION_REDUCE, (dst, reduce_res), (data, bias, scale), params, name)
