"""Vector Engine: instructions that reduce beside their result, into the accumulator registers."""

from collections import namedtuple

from ...issue.spec import Spec
from ...issue.timing import Vector, timing
from ...machine.dtypes import (
    bfloat16,
    float8_e4m3,
    float8_e4m3fn,
    float8_e5m2,
    float16,
    float32,
    int8,
    int16,
    uint8,
    uint16,
)
from ...semantics import alu, elementwise, reduction
from ..binding import core_of, finish, instruction, load, load_scalar, op_name, result_array, save
from .constants import reduce_cmd as commands
from .shared import (
    arithmetic,
    command_of,
    no_operand,
    on_chip,
    on_vector,
    one_of,
    operand,
    same_tiles,
    warn_simulated,
)

TensorScalarReduceParams = namedtuple(
    "TensorScalarReduceParams", "op0 reverse0 reduce_op reduce_cmd reduce_res_negate"
)
CumulativeParams = namedtuple("CumulativeParams", "op0 op1 reduce_cmd")

_NARROW = (
    *(bfloat16, float16, float32, float8_e4m3, float8_e4m3fn, float8_e5m2),
    *(uint8, uint16, int8, int16),
)


def accumulate(core, instruction, dst, op, values, command, init=None):
    """Update the Vector Engine's registers of dst's lanes; `idle` leaves them undefined."""
    registers = core.accumulators["vector"]
    first = dst.access().partition
    if command == "idle":
        registers.undefine(first, dst.shape[0])
    else:
        registers.update(instruction, first, op, values, command, init)


def read_out(core, instruction, dst, result, negate=False):
    """Store the registers of dst's lanes into a (P, 1) tile, if there is one."""
    if result is None:
        return
    registers = core.accumulators["vector"]
    values = registers.read(instruction, dst.access().partition, dst.shape[0])
    save(core, result, (-values if negate else values).reshape(result.shape))


def check_result(c, role="reduce_res"):
    """Require the tile of a reduction to be (P, 1) on chip."""
    on_chip(c, role)
    c.column(role)


def check_init(c, command, role):
    """`load_reduce` needs a start value, other commands must not have one."""
    given = c[role].value is not None
    c.require(
        given == (command == "load_reduce"),
        "value",
        "goes with reduce_cmd.load_reduce, and only with it",
        role,
        value=c[role].value,
        limit=command,
    )
    operand(c, role, float32, optional=True)


def _check_reduce(c):
    op0, _, reduce_op, command, _ = c.params
    c.tensors("data")
    same_tiles(c, "dst", "data")
    operand(c, "operand0", float32, optional=op0 in alu.UNARY)
    arithmetic(c, op0, "op0")
    one_of(
        c,
        reduce_op,
        ("add", "multiply", "maximum", "minimum"),
        "operator",
        "reduce_op",
        f"{reduce_op} does not reduce here",
    )
    allowed = ("reset_reduce", "reduce", "load_reduce")
    one_of(c, command, allowed, "value", "reduce_cmd", f"{command} is not supported")
    check_init(c, command, "reduce_init")
    check_result(c)
    return on_vector(c, op0)


def _run_reduce(core, how, writes, reads, params):
    dst, result = writes
    data, scalar, init = reads
    op0, reverse0, reduce_op, command, negate = params
    warn_simulated(core, how, op0)
    if reverse0:
        core.warn("tensor_scalar_reduce(reverse0=True) is documented as not supported yet")
    out = result_array(core, dst, data.shape)
    values = elementwise.tensor_scalar(load(data), op0, load_scalar(scalar), reverse0, out=out)
    accumulate(core, "tensor_scalar_reduce", dst, reduce_op, values, command, load_scalar(init))
    finish(core, dst, values, out)
    read_out(core, "tensor_scalar_reduce", dst, result, negate)


TENSOR_SCALAR_REDUCE = Spec(
    "tensor_scalar_reduce",
    ("dst", "reduce_res"),
    ("data", "operand0", "reduce_init"),
    _check_reduce,
    _run_reduce,
    timing(Vector.STREAM, accumulator=True),
    optional=("reduce_res",),
)


@instruction
def tensor_scalar_reduce(
    dst,
    data,
    op0,
    operand0,
    reduce_op,
    reduce_res=None,
    reverse0=False,
    reduce_cmd=commands.reset_reduce,
    reduce_init=None,
    reduce_res_negate=False,
    name=None,
):
    """dst = data op0 operand0, and its reduction over the free axes into reduce_res."""
    what = "tensor_scalar_reduce"
    op = op_name(op0, what, "op0")
    no_operand(op, operand0, what, "operand0")
    params = TensorScalarReduceParams(
        op,
        bool(reverse0),
        op_name(reduce_op, what, "reduce_op"),
        command_of(reduce_cmd, what),
        bool(reduce_res_negate),
    )
    return core_of(what).issue(
        TENSOR_SCALAR_REDUCE, (dst, reduce_res), (data, operand0, reduce_init), params, name
    )


def _check_cumulative(c):
    op0, op1, command = c.params
    c.tensors("src")
    same_tiles(c, "dst", "src")
    c.dtypes("dst", _NARROW)
    c.dtypes("src", _NARROW)
    arithmetic(c, op0, "op0")
    one_of(
        c,
        op1,
        ("add", "subtract", "multiply", "maximum", "minimum"),
        "operator",
        "op1",
        f"{op1} does not accumulate",
    )
    allowed = ("reset_reduce", "reduce", "load_reduce")
    one_of(c, command, allowed, "value", "reduce_cmd", f"{command} is not supported")
    operand(c, "imm0", float32, optional=op0 in alu.UNARY)
    check_init(c, command, "imm1")
    return on_vector(c, op0)


def _run_cumulative(core, how, writes, reads, params):
    (dst,), (src, imm0, imm1) = writes, reads
    op0, op1, command = params
    warn_simulated(core, how, op0)
    registers = core.accumulators["vector"]
    first, lanes = dst.access().partition, dst.shape[0]
    before = registers.values[first : first + lanes]
    if command == "reduce":
        before = registers.read("tensor_scalar_cumulative", first, lanes)
    scalar = load_scalar(imm0)
    values, after = reduction.tensor_scalar_cumulative(
        load(src),
        op0,
        op1,
        0.0 if scalar is None else scalar,
        before,
        command,
        load_scalar(imm1),
    )
    registers.set(first, after)
    save(core, dst, values)


TENSOR_SCALAR_CUMULATIVE = Spec(
    "tensor_scalar_cumulative",
    ("dst",),
    ("src", "imm0", "imm1"),
    _check_cumulative,
    _run_cumulative,
    timing(Vector.UNPUBLISHED),
)


@instruction
def tensor_scalar_cumulative(
    dst, src, op0, op1, imm0, imm1=None, reduce_cmd=commands.reset_reduce, name=None
):
    """Running reduction: reg = op1(op0(src[i], imm0), reg); dst[i] = reg."""
    what = "tensor_scalar_cumulative"
    op = op_name(op0, what, "op0")
    no_operand(op, imm0, what, "imm0")
    params = CumulativeParams(op, op_name(op1, what, "op1"), command_of(reduce_cmd, what))
    return core_of(what).issue(TENSOR_SCALAR_CUMULATIVE, (dst,), (src, imm0, imm1), params, name)
