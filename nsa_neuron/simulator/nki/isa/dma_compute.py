"""DMA: dma_compute, sums of tensors on the way, and read-modify-write of rows by index."""

import functools
from collections import namedtuple

import numpy as np

from ...issue.spec import Spec
from ...issue.timing import Dma, timing
from ...machine.dtypes import bits, load_f32, round_tf32, store, tfloat32
from ...rules.session import violation
from ...semantics import dma as semantics
from ..binding import core_of, enum_of, instruction, load, op_name, save
from .constants import oob_mode as oob_modes
from .dma import HBM, REACH, same_size
from .indirect import Rows, anywhere, flat_indices, is_vector, one_index_per_row
from .shared import one_of

ComputeParams = namedtuple("ComputeParams", "reduce_op scales unique_indices skip")


def _check_common(c):
    op, scales, _, _ = c.params
    roles = c.spec.reads
    c.tensors(*(r for r in roles if r != "index"))
    one_of(c, op, ("add",), "operator", "reduce_op", f"{op} is not supported")
    c.require(
        scales is None or (all(s == 1.0 for s in scales)),
        "value",
        "must all be 1.0",
        "scales",
        value=scales,
        limit=1.0,
    )
    for role in ("dst", *roles):
        c.buffers(role, *REACH)


def _check_compute(c):
    _check_common(c)
    count = len(c.spec.reads)
    limit = c.machine.dma_max_sources
    c.require(
        1 <= count <= limit,
        "tile-size",
        f"{count} source tensors",
        "srcs",
        value=count,
        limit=limit,
    )
    scales = c.params.scales
    c.require(
        scales is None or len(scales) == count,
        "value",
        "one scale per source",
        "scales",
        value=scales,
        limit=count,
    )
    same_size(c, "dst", *c.spec.reads)
    for o in c.operands.values():
        c.require(
            not o.access.dynamic,
            "dge",
            "addresses must be known at compile time, or be a vector_offset",
            o.role,
        )
    return "dma"


def _run_compute(core, payload, writes, reads, params):
    save(core, writes[0], semantics.compute([load(r) for r in reads]))


@functools.cache
def _compute_spec(count):
    roles = tuple(f"srcs[{i}]" for i in range(count))
    return Spec(
        "dma_compute", ("dst",), roles, _check_compute, _run_compute, timing(Dma.COMPUTE), dma=True
    )


def _check_rows(c):
    _check_common(c)
    c.require(
        c.params.unique_indices,
        "value",
        "indices must be unique: others are not supported",
        "unique_indices",
        value=False,
        limit=True,
    )
    dst, rows = c["dst"], c["rows"]
    gather = dst.buffer == "sbuf"
    c.buffers("rows" if gather else "dst", *HBM)
    c.buffers("data", "sbuf")
    same_size(c, "dst", "data", "rows")
    return "dma", (gather, rows.shape)


def _run_rows(core, payload, writes, reads, params):
    gather, shape = payload
    view = core.state.pop("indirect")
    indices = flat_indices(view, shape[0])
    if np.unique(indices).size != indices.size:
        raise violation(
            "value",
            "the indices are not unique",
            instruction="dma_compute",
            operand="srcs",
            value=indices.tolist()[:8],
            hint="dma_compute does not support repeated rows",
        )
    rows = Rows(core, "dma_compute", "srcs" if gather else "dst", view, indices, params.skip)
    if not rows.wanted.size:
        return
    rows.require_readable(core, DMA_ROWS)
    core.require_readable(reads[0], DMA_ROWS)
    races = core.launch.races
    touched = rows.views() if races is not None else []
    outs = (writes[0],) if gather else touched
    pending = races.begin(core.index, DMA_ROWS, outs, touched) if races is not None else ()
    table = rows.table.array()
    data = load(reads[0]).reshape(shape)
    picked = slice(None) if rows.valid is None else rows.valid
    total = data[picked] + _fp32(table[rows.wanted], rows.table.dtype)
    if gather:
        result = data.copy()
        result[picked] = total
        save(core, writes[0], result)
        core.mark_written(writes[0])
    else:
        target = np.empty(total.shape, table.dtype)
        store(target, total, rows.table.dtype if core.options.precise else None)
        bits(table)[rows.wanted] = bits(target)
    if pending:
        races.end(core.index, DMA_ROWS, pending)


def _fp32(values, dtype):
    values = load_f32(values)
    return round_tf32(values) if dtype is tfloat32 else values


DMA_ROWS = Spec(
    "dma_compute",
    ("dst",),
    ("data", "rows", "index"),
    _check_rows,
    _run_rows,
    timing(Dma.COMPUTE),
    dma=True,
    marks_itself=True,
    checks_itself=True,
)


@instruction
def dma_compute(
    dst,
    srcs,
    reduce_op,
    scales=None,
    unique_indices=True,
    oob_mode=oob_modes.error,
    name=None,
):
    """dst = sum of srcs in fp32; with a vector_offset, adds rows of or to an HBM tensor."""
    core = core_of("dma_compute")
    if not isinstance(srcs, list | tuple):
        raise violation(
            "usage",
            "is a list of tensors",
            instruction="dma_compute",
            operand="srcs",
            value=type(srcs).__name__,
            limit="list",
        )
    params = ComputeParams(
        op_name(reduce_op, "dma_compute", "reduce_op"),
        None if scales is None else tuple(scales),
        bool(unique_indices),
        enum_of(oob_modes, oob_mode, "dma_compute", "oob_mode") is oob_modes.skip,
    )
    if not any(is_vector(t) for t in (dst, *srcs)):
        return core.issue(_compute_spec(len(srcs)), (dst,), tuple(srcs), params, name)
    view, data = _pair(dst, srcs)
    one_index_per_row(view, "dma_compute", "srcs")
    index = view.dynamic.index
    core.require_readable(index, DMA_ROWS)
    core.state["indirect"] = view
    table = anywhere(view)
    out = table if is_vector(dst) else dst
    extra = {"rows": view.shape[0], "indirect": "scatter" if is_vector(dst) else "gather"}
    return core.issue(DMA_ROWS, (out,), (data, table, index), params, name, extra)


def _pair(dst, srcs):
    """The indirect view and the SBUF data of a read-modify-write.

    Scatter: dst is indirect and one source is the same view. Gather: one source is indirect and
    the other is dst.
    """
    indirect = [s for s in srcs if is_vector(s)]
    direct = [s for s in srcs if not is_vector(s)]
    if len(indirect) != 1 or len(direct) != 1:
        raise violation(
            "shape",
            "with a vector_offset there are two sources, one of them indirect",
            instruction="dma_compute",
            operand="srcs",
            value=len(srcs),
            limit=2,
        )
    same, other = (indirect[0], dst) if is_vector(dst) else (direct[0], dst)
    if not _same_view(same, other):
        raise violation(
            "value",
            "the source that is read and modified must be dst's view",
            instruction="dma_compute",
            operand="srcs",
            value=repr(same),
            limit=repr(other),
        )
    return indirect[0], direct[0]


def _same_view(a, b):
    same = (
        hasattr(a, "memory")
        and hasattr(b, "memory")
        and a.memory is b.memory
        and a.offset == b.offset
        and a.access().layout is b.access().layout
    )
    if not same or not is_vector(a):
        return same
    x, y = a.dynamic, b.dynamic
    return x.stride == y.stride and _same_view(x.index, y.index)
