"""DMA: dma_transpose, direct and by index."""

from collections import namedtuple

import numpy as np

from ...issue.spec import Spec
from ...issue.timing import Dma, timing
from ...machine import dtypes as dt
from ...machine.dtypes import bits
from ...rules.session import violation
from ...semantics import dma as semantics
from ..binding import core_of, enum_of, instruction, save
from .constants import dge_mode as dge_modes
from .constants import oob_mode as oob_modes
from .dma import HBM, REACH, no_priority
from .indirect import Rows, anywhere, is_vector
from .shared import one_of, same_dtype

TransposeParams = namedtuple("TransposeParams", "axes priority dge_mode skip")


def _check_shapes(c):
    axes, priority, _, _ = c.params
    c.tensors("src")
    dst, src = c["dst"], c["src"]
    c.buffers("dst", *REACH)
    c.buffers("src", *REACH)
    same_dtype(c, "src", "dst")
    no_priority(c, priority)
    rank = len(src.shape)
    c.require(
        rank in semantics.TRANSPOSE_AXES,
        "shape",
        f"has {rank} dims",
        "src",
        value=src.shape,
        limit="2 to 4 dims",
    )
    order = semantics.TRANSPOSE_AXES[rank]
    c.require(
        axes is None or axes == order,
        "axis",
        f"the only permutation of {rank} dims",
        "axes",
        value=axes,
        limit=order,
    )
    want = tuple(src.shape[a] for a in order)
    c.require(
        dst.shape == want, "shape", "must be src transposed", "dst", value=dst.shape, limit=want
    )
    return order


def _check_direct(c):
    order = _check_shapes(c)
    dge, skip = c.params.dge_mode, c.params.skip
    src = c["src"]
    one_of(c, dge, (dge_modes.unknown, dge_modes.hwdge), "dge", "dge_mode", "transposes by hwdge")
    c.require(
        src.dtype.itemsize in (2, 4),
        "dtype",
        "DMA transposes elements of 2 or 4 bytes",
        "src",
        value=src.dtype.name,
    )
    c.require(
        not skip or src.access.dynamic,
        "dge",
        "oob_mode.skip goes with an indirect source",
        "oob_mode",
        value="skip",
    )
    if dge is dge_modes.hwdge:
        _check_hwdge(c, src)
    return "dma", order


def _check_hwdge(c, src):
    rows, last = src.shape[0], src.shape[-1]
    if len(src.shape) == 2:
        good, limit = rows == 16, "shape[0] == 16"
    else:
        good = rows in (1, 2, 4, 8, 16) and rows * src.shape[-2] % 16 == 0
        limit = "shape[0] in 1, 2, 4, 8, 16 and shape[0] * shape[-2] % 16 == 0"
    c.require(good, "dge", "hwdge cannot transpose it", "src", value=src.shape, limit=limit)
    c.require(last <= 128, "dge", "last dim of a hwdge transpose", "src", value=last, limit=128)
    c.require(
        src.dtype.itemsize == 2,
        "dge",
        "hwdge transposes 2-byte elements",
        "src",
        value=src.dtype.name,
    )


def _run_direct(core, order, writes, reads, params):
    save(core, writes[0], reads[0].array().transpose(order))


DMA_TRANSPOSE = Spec(
    "dma_transpose", ("dst",), ("src",), _check_direct, _run_direct, timing(Dma.TRANSPOSE), dma=True
)


def _check_indirect(c):
    order = _check_shapes(c)
    src, index = c["src"], c["index"]
    dge = c.params.dge_mode
    one_of(c, dge, (dge_modes.unknown, dge_modes.swdge), "dge", "dge_mode", "gathers by swdge")
    c.buffers("src", *HBM)
    c.require(
        src.dtype.itemsize == 2,
        "dtype",
        "a gathering transpose moves 2-byte elements",
        "src",
        value=src.dtype.name,
    )
    c.dtypes("index", (dt.uint32,))
    shape = src.shape
    rows, columns = index.p, index.n
    conditions = (
        (shape[-1] <= 128, "src", "last dim", shape[-1], 128),
        (shape[0] % 16 == 0, "src", "rows", shape[0], "multiple of 16"),
        (len(shape) != 4 or 1 in shape[1:3], "src", "dims 1 and 2", shape[1:3], "one of them 1"),
        (rows * columns >= shape[0], "index", "indices", rows * columns, f">= {shape[0]}"),
        (16 <= rows <= 128 and rows % 16 == 0, "index", "rows", rows, "16..128, by 16"),
        (columns == 1 or rows == 128, "index", "rows of a 2-D index tile", rows, 128),
    )
    for good, role, what, value, limit in conditions:
        c.require(good, "shape", what, role, value=value, limit=limit)
    return "dma", order


def _run_indirect(core, order, writes, reads, params):
    dst = writes[0]
    view = core.state.pop("indirect")
    index = view.dynamic.index.array()
    indices = semantics.transpose_indices(index.reshape(index.shape[0], -1), view.shape[0])
    rows = Rows(core, "dma_transpose", "src", view, indices, params.skip)
    if not rows.wanted.size:
        return
    rows.require_readable(core, DMA_GATHER_TRANSPOSE)
    gathered = rows.table.array()[rows.wanted].transpose(order)
    if rows.valid is None:
        save(core, dst, gathered)
        core.mark_written(dst)
        return
    bits(dst.array())[..., rows.valid] = bits(gathered)
    core.mark_masked(dst, np.broadcast_to(rows.valid, dst.shape))


DMA_GATHER_TRANSPOSE = Spec(
    "dma_transpose",
    ("dst",),
    ("src", "index"),
    _check_indirect,
    _run_indirect,
    timing(Dma.TRANSPOSE),
    dma=True,
    marks_itself=True,
    checks_itself=True,
)


@instruction
def dma_transpose(
    dst,
    src,
    axes=None,
    priority=None,
    dge_mode=dge_modes.unknown,
    oob_mode=oob_modes.error,
    name=None,
):
    """dst = src with its dims permuted: (1, 0), (2, 1, 0) or (3, 1, 2, 0)."""
    what = "dma_transpose"
    core = core_of(what)
    params = TransposeParams(
        None if axes is None else tuple(axes),
        priority,
        enum_of(dge_modes, dge_mode, what, "dge_mode"),
        enum_of(oob_modes, oob_mode, what, "oob_mode") is oob_modes.skip,
    )
    if is_vector(dst):
        raise violation(
            "dge", "only src can be indirect", instruction=what, operand="dst", limit="src"
        )
    if is_vector(src):
        index = src.dynamic.index
        core.require_readable(index, DMA_GATHER_TRANSPOSE)
        core.state["indirect"] = src
        extra = {"rows": src.shape[0], "indirect": "gather"}
        return core.issue(DMA_GATHER_TRANSPOSE, (dst,), (anywhere(src), index), params, name, extra)
    if params.skip and core.static(src, DMA_TRANSPOSE, [], skip=True) is None:
        return None
    return core.issue(DMA_TRANSPOSE, (dst,), (src,), params, name)
