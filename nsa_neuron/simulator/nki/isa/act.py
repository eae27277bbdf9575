"""Scalar Engine: activation, activation_reduce."""

import numpy as np

from ...operands import Spec
from ...semantics import activation as functions
from ...semantics import reduction
from ..binding import core_of, enum_of, instruction, load, load_scalar, op_name, save
from .constants import reduce_cmd as commands
from .dve import on_chip


def _check_activation(c):
    op, reduce_op, command = c.params
    c.tensors("data")
    on_chip(c, "dst", "data", "bias", "scale", "reduce_res")
    c.same_partitions("dst", "data")
    c.same_elements("dst", "data")
    c.require(
        op in functions.FUNCTIONS,
        "operator",
        f"{op} is no function of the Scalar Engine",
        "op",
        value=op,
        limit=sorted(functions.FUNCTIONS),
    )
    for role in ("bias", "scale", "reduce_res"):
        c.column(role)
    if c["scale"]:
        c.require(
            c["scale"].dtype.name == "float32",
            "dtype",
            "a scale tile is float32",
            "scale",
            value=c["scale"].dtype.name,
            limit="float32",
        )
    if c["bias"]:
        c.require(c["bias"].dtype.name != "tfloat32", "dtype", "a bias tile is not tf32", "bias")
    c.require(
        reduce_op in (None, "add"),
        "operator",
        "reduces by add only",
        "reduce_op",
        value=reduce_op,
        limit="add",
    )
    c.require(command != "load_reduce", "value", "activation has no load_reduce", "reduce_cmd")
    return "scalar"


def _run_activation(core, payload, writes, reads, params):
    dst, result = writes[0], writes[1]
    data, bias, scale = reads
    op, _, command = params
    values = functions.activation(op, load(data), load_scalar(bias), load_scalar(scale))
    if command != "idle":
        p0, p = dst.access().partition, dst.shape[0]
        registers = core.accumulators.get("scalar")
        if registers is None:
            registers = core.accumulators["scalar"] = np.zeros((128, 1), np.float32)
        part = registers[p0 : p0 + p]
        part[...] = reduction.accumulate("add", values, part, command)
    save(core, dst, values)
    if result is not None:
        registers = core.accumulators.get("scalar")
        p0, p = dst.access().partition, dst.shape[0]
        if registers is None:
            registers = np.zeros((128, 1), np.float32)
        save(core, result, registers[p0 : p0 + p].reshape(result.shape))


ACTIVATION = Spec(
    "activation",
    ("dst", "reduce_res"),
    ("data", "bias", "scale"),
    _check_activation,
    _run_activation,
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
    core = core_of("activation")
    command = enum_of(commands, reduce_cmd, "activation", "reduce_cmd").name
    reduce = None if reduce_op is None else op_name(reduce_op, "activation", "reduce_op")
    params = (op_name(op, "activation", "op"), reduce, command)
    return core.issue(ACTIVATION, (dst, reduce_res), (data, bias, scale), params, name)


@instruction
def activation_reduce(dst, op, data, reduce_op, reduce_res, bias=None, scale=1.0, name=None):
    """`activation` that also sums its outputs of each partition into reduce_res."""
    return activation(
        dst, op, data, bias, scale, reduce_op, reduce_res, commands.reset_reduce, name
    )
