"""Vector Engine: selection by predicate or by range."""

from collections import namedtuple

import numpy as np

from ...issue.spec import Spec
from ...issue.timing import Vector, timing
from ...machine import dtypes as dt
from ...memory.tensor import NkiTensor
from ...rules.registers import RunTimeScalar
from ...rules.session import violation
from ...semantics import elementwise
from ..binding import MAXIMUM, core_of, instruction, load, load_scalar, op_name, save
from .constants import reduce_cmd as commands
from .dve_accumulate import accumulate, check_result, read_out
from .shared import command_of, on_chip, one_of, one_psum_input, operand, same_dtype, same_tiles

PredicatedParams = namedtuple("PredicatedParams", "reverse_pred")
SelectReduceParams = namedtuple("SelectReduceParams", "reduce_op reduce_cmd reverse_pred")
RangeSelectParams = namedtuple(
    "RangeSelectParams", "comp_op0 comp_op1 reduce_op reduce_cmd range_start"
)

FLOATS = tuple(d for d in dt.ALL if d.is_float and not d.gen4_only)


def _check_predicated(c):
    c.tensors("predicate")
    same_tiles(c, "dst", "predicate")
    c.dtypes("predicate", (dt.uint8, dt.uint16, dt.uint32))
    one_psum_input(c, "src", "predicate")
    if c["src"]:
        same_tiles(c, "dst", "src")
        same_dtype(c, "dst", "src")
    else:
        operand(c, "src")
    return "vector"


def _run_predicated(core, payload, writes, reads, params):
    dst = writes[0]
    src, predicate, _ = reads
    array = dst.array()
    mask = predicate.array()
    mask = (mask == 0 if params.reverse_pred else mask != 0).reshape(array.shape)
    if type(src) is NkiTensor:
        fill = src.array().reshape(array.shape)
    else:
        fill = np.empty((), array.dtype)
        dt.store(fill, np.asarray(src, np.float32), dst.dtype if core.options.precise else None)
    np.copyto(dt.bits(array), dt.bits(fill), where=mask)
    core.mark_masked(dst, mask)


TENSOR_COPY_PREDICATED = Spec(
    "tensor_copy_predicated",
    ("dst",),
    ("src", "predicate", "dst"),
    _check_predicated,
    _run_predicated,
    timing(Vector.PREDICATED),
    keeps=True,
)


@instruction
def tensor_copy_predicated(dst, src, predicate, reverse_pred=False, name=None):
    """dst = src where the predicate is nonzero; other elements of dst stay."""
    params = PredicatedParams(bool(reverse_pred))
    return core_of("tensor_copy_predicated").issue(
        TENSOR_COPY_PREDICATED, (dst,), (src, predicate, dst), params, name
    )


def _check_select_reduce(c):
    c.tensors("predicate", "on_true")
    same_tiles(c, "dst", "predicate", "on_true")
    one_psum_input(c, "on_true", "predicate")
    c.dtypes("predicate", (dt.int8, dt.uint8, dt.int16, dt.uint16))
    excluded = ("tfloat32", "int32", "uint32")
    name = c["on_true"].dtype.name
    c.require(name not in excluded, "dtype", f"cannot be {name}", "on_true", value=name)
    operand(c, "on_false")
    _check_maximum(c)
    allowed = ("idle", "reset_reduce", "reduce")
    command = c.params.reduce_cmd
    one_of(c, command, allowed, "value", "reduce_cmd", f"{command} is not supported")
    c.dtypes("reduce_res", FLOATS)
    return "vector"


def _check_maximum(c):
    op = c.params.reduce_op
    one_of(c, op, ("maximum",), "operator", "reduce_op", "only maximum reduces here")
    check_result(c)


def _run_select_reduce(core, payload, writes, reads, params):
    dst, result = writes
    predicate, on_true, on_false = reads
    values = elementwise.select_reduce(
        predicate.array(), load(on_true), load_scalar(on_false), params.reverse_pred
    )
    accumulate(core, "select_reduce", dst, "maximum", values, params.reduce_cmd)
    save(core, dst, values)
    read_out(core, "select_reduce", dst, result)


SELECT_REDUCE = Spec(
    "select_reduce",
    ("dst", "reduce_res"),
    ("predicate", "on_true", "on_false"),
    _check_select_reduce,
    _run_select_reduce,
    timing(Vector.UNPUBLISHED, accumulator=True),
    optional=("reduce_res",),
)


@instruction
def select_reduce(
    dst,
    predicate,
    on_true,
    on_false,
    reduce_res=None,
    reduce_cmd=commands.idle,
    reduce_op=MAXIMUM,
    reverse_pred=False,
    name=None,
):
    """dst = on_true where the predicate is nonzero, else on_false; optional maximum."""
    what = "select_reduce"
    params = SelectReduceParams(
        op_name(reduce_op, what, "reduce_op"), command_of(reduce_cmd, what), bool(reverse_pred)
    )
    return core_of(what).issue(
        SELECT_REDUCE, (dst, reduce_res), (predicate, on_true, on_false), params, name
    )


def _check_range_select(c):
    op0, op1, _, command, start = c.params
    c.tensors("on_true_tile", "bound0", "bound1")
    same_tiles(c, "dst", "on_true_tile")
    c.dtypes("on_true_tile", FLOATS)
    for role in ("bound0", "bound1"):
        on_chip(c, role)
        c.column(role)
        c.dtypes(role, (dt.float32,))
    compare = ("equal", "less", "less_equal", "greater", "greater_equal")
    for role, op in (("comp_op0", op0), ("comp_op1", op1)):
        one_of(c, op, compare, "operator", role, f"{op} is no comparison of range_select")
    last = start + c["dst"].n
    c.require(
        -(2**24) <= start and last <= 2**24,
        "value",
        f"indices reach {last}; fp32 counts exactly to 2**24",
        "range_start",
        value=start,
        limit=2**24 - c["dst"].n,
    )
    allowed = ("idle", "reset", "reset_reduce", "reduce")
    one_of(c, command, allowed, "value", "reduce_cmd", f"{command} is not supported")
    _check_maximum(c)
    return "vector"


def _run_range_select(core, payload, writes, reads, params):
    dst, result = writes
    data, bound0, bound1 = reads
    values = elementwise.range_select(
        load(data), params.comp_op0, params.comp_op1, load(bound0), load(bound1), params.range_start
    )
    accumulate(core, "range_select", dst, "maximum", values, params.reduce_cmd)
    save(core, dst, values)
    read_out(core, "range_select", dst, result)


RANGE_SELECT = Spec(
    "range_select",
    ("dst", "reduce_res"),
    ("on_true_tile", "bound0", "bound1"),
    _check_range_select,
    _run_range_select,
    timing(Vector.STREAM),
    optional=("reduce_res",),
)


@instruction
def range_select(
    dst,
    on_true_tile,
    comp_op0,
    comp_op1,
    bound0,
    bound1,
    reduce_cmd=commands.reset_reduce,
    reduce_res=None,
    reduce_op=MAXIMUM,
    range_start=0,
    on_false_value=float(elementwise.FP32_MIN),
    name=None,
):
    """Keep elements whose index satisfies both comparisons; FP32_MIN elsewhere; maximum."""
    what = "range_select"
    if np.float32(on_false_value) != elementwise.FP32_MIN:
        raise violation(
            "value",
            "must be FP32_MIN",
            instruction=what,
            operand="on_false_value",
            value=on_false_value,
            limit=float(elementwise.FP32_MIN),
        )
    if not hasattr(range_start, "__index__") or isinstance(range_start, RunTimeScalar):
        raise violation(
            "usage",
            "must be a compile-time integer",
            instruction=what,
            operand="range_start",
            value=range_start,
            limit="int",
        )
    params = RangeSelectParams(
        op_name(comp_op0, what, "comp_op0"),
        op_name(comp_op1, what, "comp_op1"),
        op_name(reduce_op, what, "reduce_op"),
        command_of(reduce_cmd, what),
        int(range_start),
    )
    return core_of(what).issue(
        RANGE_SELECT, (dst, reduce_res), (on_true_tile, bound0, bound1), params, name
    )
