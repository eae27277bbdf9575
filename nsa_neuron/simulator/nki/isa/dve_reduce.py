"""Vector Engine: reductions, statistics and scans."""

from collections import namedtuple

from ...issue.spec import Spec
from ...issue.timing import Vector, timing
from ...machine.dtypes import store_bits
from ...rules.session import running
from ...semantics import alu, reduction
from ..binding import Interned, core_of, instruction, load, load_scalar, op_name, save
from .shared import (
    arithmetic,
    elements,
    gen3,
    integers,
    on_chip,
    on_vector,
    one_psum_input,
    operand,
    same_tiles,
    warn_simulated,
)

ReduceParams = namedtuple("ReduceParams", "op axis negate keepdims")
ScanParams = namedtuple("ScanParams", "op0 op1 reverse0 reverse1")
_reduce_params = Interned(ReduceParams)


def _check_tensor_reduce(c):
    op, axis, negate, _keepdims = c.params
    c.tensors("data")
    on_chip(c, "dst", "data")
    c.same_partitions("dst", "data")
    data = c["data"]
    rank = len(data.shape)
    axes = tuple(sorted(a % rank for a in axis if -rank <= a < rank))
    trailing = axes == tuple(range(rank - len(axes), rank)) and len(axes) == len(axis)
    c.require(
        bool(axes) and 0 not in axes and trailing,
        "axis",
        "reduces trailing free axes only",
        "axis",
        value=axis,
        limit=f"1..{rank - 1}",
    )
    gen3(c, op, "op")
    c.require(
        op in alu.REDUCTIONS,
        "operator",
        f"{op} does not reduce",
        "op",
        value=op,
        limit=sorted(alu.REDUCTIONS),
    )
    if op in alu.BITVEC:
        integers(c, op, "dst", "data")
        c.require(not negate, "value", "goes with arithmetic operators", "negate", value=negate)
    kept = 1
    for size in data.shape[1 : rank - len(axes)]:
        kept *= size
    elements(c, "dst", kept)
    return "vector", axes


def _run_tensor_reduce(core, axes, writes, reads, params):
    (dst,), (data,) = writes, reads
    op, _, negate, _ = params
    if op in alu.BITVEC:
        store_bits(dst.array(), reduction.tensor_reduce_bitvec(data.array(), op, axes))
        return
    save(core, dst, reduction.tensor_reduce(load(data), op, axes, negate))


TENSOR_REDUCE = Spec(
    "tensor_reduce",
    ("dst",),
    ("data",),
    _check_tensor_reduce,
    _run_tensor_reduce,
    timing(Vector.STREAM),
)


@instruction
def tensor_reduce(dst, op, data, axis, negate=False, keepdims=False, name=None):
    """dst = reduction of data over trailing free axes."""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    params = _reduce_params[op_name(op, "tensor_reduce", "op"), axes, bool(negate), bool(keepdims)]
    core = running() or core_of("tensor_reduce")
    return core.issue(TENSOR_REDUCE, (dst,), (data,), params, name)


def _check_scan(c):
    op0, op1, _, _ = c.params
    c.tensors("data0", "data1")
    same_tiles(c, "dst", "data0", "data1")
    one_psum_input(c, "data0", "data1")
    operand(c, "initial")
    arithmetic(c, op0, "op0", unary=False)
    arithmetic(c, op1, "op1", unary=False)
    return on_vector(c, op0, op1)


def _run_scan(core, how, writes, reads, params):
    (dst,), (data0, data1, initial) = writes, reads
    warn_simulated(core, how, *params[:2])
    values = reduction.tensor_tensor_scan(load(data0), load(data1), load_scalar(initial), *params)
    save(core, dst, values)


TENSOR_TENSOR_SCAN = Spec(
    "tensor_tensor_scan",
    ("dst",),
    ("data0", "data1", "initial"),
    _check_scan,
    _run_scan,
    timing(Vector.SCAN),
)


@instruction
def tensor_tensor_scan(
    dst, data0, data1, initial, op0, op1, reverse0=False, reverse1=False, name=None
):
    """dst[i] = op1(op0(data0[i], dst[i - 1]), data1[i]) along the free axes, from `initial`."""
    what = "tensor_tensor_scan"
    ops = op_name(op0, what, "op0"), op_name(op1, what, "op1")
    params = ScanParams(*ops, bool(reverse0), bool(reverse1))
    return core_of(what).issue(TENSOR_TENSOR_SCAN, (dst,), (data0, data1, initial), params, name)


def _check_bn_stats(c):
    c.tensors("data")
    on_chip(c, "dst", "data")
    c.same_partitions("dst", "data")
    limit = c.machine.bn_stats_free
    c.require(
        c["data"].n <= limit,
        "tile-size",
        f"has {c['data'].n} elements per partition",
        "data",
        value=c["data"].n,
        limit=limit,
        hint="one bn_stats per 512 elements, then one bn_aggr over all their results",
    )
    elements(c, "dst", 6)
    return "vector"


def _run_bn_stats(core, payload, writes, reads, params):
    save(core, writes[0], reduction.bn_stats(load(reads[0])))


BN_STATS = Spec(
    "bn_stats", ("dst",), ("data",), _check_bn_stats, _run_bn_stats, timing(Vector.STREAM)
)


@instruction
def bn_stats(dst, data, name=None):
    """dst = count, mean, variance * count of even elements, then of odd ones."""
    return core_of("bn_stats").issue(BN_STATS, (dst,), (data,), (), name)


def _check_bn_aggr(c):
    c.tensors("data")
    on_chip(c, "dst", "data")
    c.same_partitions("dst", "data")
    c.require(
        c["data"].n % 3 == 0,
        "shape",
        "holds triples of count, mean, variance * count",
        "data",
        value=c["data"].n,
        limit="multiple of 3",
    )
    elements(c, "dst", 2)
    return "vector"


def _run_bn_aggr(core, payload, writes, reads, params):
    save(core, writes[0], reduction.bn_aggr(load(reads[0])))


BN_AGGR = Spec(
    "bn_aggr", ("dst",), ("data",), _check_bn_aggr, _run_bn_aggr, timing(Vector.STATISTICS)
)


@instruction
def bn_aggr(dst, data, name=None):
    """dst = mean and variance of what `bn_stats` counted."""
    return core_of("bn_aggr").issue(BN_AGGR, (dst,), (data,), (), name)
