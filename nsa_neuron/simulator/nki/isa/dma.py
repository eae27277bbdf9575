"""DMA: dma_copy, with gather and scatter of rows."""

from collections import namedtuple

import numpy as np

from ...issue.spec import Spec
from ...issue.timing import Dma, timing
from ...machine.dtypes import bits, int64, load_f32, store
from ...memory.tensor import NkiTensor
from ...rules.session import running, violation
from ..binding import Interned, core_of, enum_of, instruction, load, save
from .constants import dge_mode as dge_modes
from .constants import engine as engines
from .constants import oob_mode as oob_modes
from .indirect import Rows, anywhere, flat_indices, is_vector, one_index_per_row
from .shared import engine_of

REACH = ("sbuf", "private_hbm", "shared_hbm")
HBM = ("private_hbm", "shared_hbm")

CopyParams = namedtuple("CopyParams", "priority dge_mode engine skip")
_params = Interned(CopyParams)
_SKIP = oob_modes.skip


def no_priority(c, priority):
    """`priority=` belongs to NeuronCore-v4."""
    c.require(
        priority is None,
        "generation",
        "priority exists from NeuronCore-v4 on",
        "priority",
        value=priority,
    )


def same_size(c, first, *roles):
    """Require equal element counts over all dims."""
    want = c[first].layout.size
    for role in roles:
        c.require(
            c[role].layout.size == want,
            "element-count",
            f"has {c[role].layout.size} elements, {first} has {want}",
            role,
            value=c[role].shape,
            limit=c[first].shape,
            hint=_broadcast(c[role], c[first]),
        )


def _broadcast(src, dst):
    """How a smaller source is repeated, where only dims of size 1 differ."""
    dims = [d for d, (s, n) in enumerate(zip(src.shape, dst.shape, strict=False)) if s != n]
    fits = len(src.shape) == len(dst.shape) and all(src.shape[d] == 1 for d in dims)
    if not fits or (src.tensor.on_chip and 0 in dims):
        return ""
    repeats = "".join(f".broadcast({d}, {dst.shape[d]})" for d in dims)
    return f"{src.tensor.name or src.role}{repeats}"


def _check_copy(c):
    priority, dge, engine, _ = c.params
    c.tensors("src")
    dst, src = c["dst"], c["src"]
    c.buffers("dst", *REACH)
    c.buffers("src", *REACH)
    same_size(c, "dst", "src")
    no_priority(c, priority)
    c.require(
        dst.dtype is src.dtype or int64 not in (dst.dtype, src.dtype),
        "dtype-match",
        "int64 is copied, not converted: DMA converts through fp32",
        "src",
        value=src.dtype.name,
        limit=dst.dtype.name,
    )
    if dge is dge_modes.hwdge:
        c.require(
            dst.dtype.name == src.dtype.name,
            "dge",
            "hwdge moves bytes: dtypes must match",
            "dst",
            value=dst.dtype.name,
            limit=src.dtype.name,
        )
        c.require(
            engine.name in ("unknown", "sync", "scalar"),
            "dge",
            "hwdge is triggered by sync or scalar",
            "engine",
            value=engine.name,
        )
    else:
        c.require(
            engine is engines.unknown,
            "dge",
            "engine= goes with dge_mode.hwdge",
            "engine",
            value=engine.name,
        )
    dynamic = dst.access.dynamic or src.access.dynamic
    c.require(
        not (dge is dge_modes.none and dynamic),
        "dge",
        "an address known at run time needs a DGE",
        "dge_mode",
        value=dge.name,
        limit=("unknown", "swdge", "hwdge"),
    )
    return "dma"


def _run_copy(core, payload, writes, reads, params):
    (dst,), (src,) = writes, reads
    save(core, dst, src.array() if dst.dtype is src.dtype else load(src))


DMA_COPY = Spec(
    "dma_copy", ("dst",), ("src",), _check_copy, _run_copy, timing(Dma.COPY), dma=True, wide=True
)


def _check_indirect(c):
    _check_copy(c)
    dge = c.params.dge_mode
    c.require(
        dge in (dge_modes.unknown, dge_modes.swdge),
        "dge",
        "gather and scatter need swdge",
        "dge_mode",
        value=dge.name,
        limit=("unknown", "swdge"),
    )
    return "dma"


def _run_indirect(core, payload, writes, reads, params):
    (dst,), (src, _) = writes, reads
    gather, view = core.state.pop("indirect")
    count = view.shape[0]
    role = "src" if gather else "dst"
    indices = flat_indices(view, count)
    rows = Rows(core, "dma_copy", role, view, indices, params.skip)
    other = dst if gather else src
    if rows.valid is not None and other.shape[0] != count:
        raise violation(
            "shape",
            "rows can be skipped only where both sides have the same rows",
            instruction="dma_copy",
            operand="dst" if gather else "src",
            value=other.shape,
            limit=view.shape,
        )
    if not rows.wanted.size:
        return
    races = core.launch.races
    tracked = races is not None or not view.memory.written.full
    touched = rows.views() if tracked else []
    outs, ins = ((other,), touched) if gather else (touched, (other,))
    pending = races.begin(core.index, DMA_INDIRECT, outs, ins) if races is not None else ()
    if gather:
        for row in touched:
            core.require_readable(row, DMA_INDIRECT)
        _save_rows(core, dst, rows.table.array()[rows.wanted], rows)
    else:
        core.require_readable(src, DMA_INDIRECT)
        _scatter(core, src, view, rows)
        for row in touched:
            core.mark_written(row)
    if pending:
        races.end(core.index, DMA_INDIRECT, pending)


def _save_rows(core, dst, values, rows):
    """Store gathered rows; those with an invalid index stay."""
    if dst.dtype is not rows.table.dtype:
        values = load_f32(values)
    if rows.valid is None:
        save(core, dst, values)
        core.mark_written(dst)
        return
    for position, row in enumerate(np.flatnonzero(rows.valid)):
        one = dst[int(row) : int(row) + 1]
        save(core, one, values[position].reshape(one.shape))
        core.mark_written(one)


def _scatter(core, src, view, rows):
    table = rows.table
    values = src.array() if src.dtype is table.dtype else load(src)
    values = values.reshape(view.shape)
    if rows.valid is not None:
        values = values[rows.valid]
    target = np.empty((rows.wanted.size, *view.shape[1:]), table.array().dtype)
    store(target, values, table.dtype if core.options.precise else None)
    bits(table.array())[rows.wanted] = bits(target)


DMA_INDIRECT = Spec(
    "dma_copy",
    ("dst",),
    ("src", "index"),
    _check_indirect,
    _run_indirect,
    timing(Dma.COPY),
    dma=True,
    marks_itself=True,
    checks_itself=True,
    wide=True,
)


@instruction
def dma_copy(
    dst,
    src,
    priority=None,
    oob_mode=oob_modes.error,
    dge_mode=dge_modes.unknown,
    engine=engines.unknown,
    name=None,
):
    """dst = src between HBM and SBUF, casting through fp32; gathers and scatters rows."""
    core = running() or core_of("dma_copy")
    skip = enum_of(oob_modes, oob_mode, "dma_copy", "oob_mode") is _SKIP
    dge = enum_of(dge_modes, dge_mode, "dma_copy", "dge_mode")
    if priority is not None and type(priority) is not int:
        priority = repr(priority)  # refused; what is no number may have no hash
    params = _params[priority, dge, engine_of(engine, "dma_copy"), skip]
    if not is_vector(dst) and not is_vector(src):
        if skip:
            views = [core.static(t, DMA_COPY, [], skip=True) for t in (dst, src)]
            if any(v is None for v in views):
                return None
        return core.issue(DMA_COPY, (dst,), (src,), params, name)
    vector = [t for t in (dst, src) if is_vector(t)]
    if len(vector) == 2 or not isinstance(dst, NkiTensor) or not isinstance(src, NkiTensor):
        raise violation(
            "dge",
            "one side of a transfer can be indirect, the other is a tensor",
            instruction="dma_copy",
            operand="src",
        )
    (view,) = vector
    gather = view is src
    one_index_per_row(view, "dma_copy", "src" if gather else "dst")
    index = view.dynamic.index
    core.require_readable(index, DMA_INDIRECT)
    core.state["indirect"] = (gather, view)
    out, source = (dst, anywhere(view)) if gather else (anywhere(view), src)
    extra = {"rows": view.shape[0], "indirect": "gather" if gather else "scatter"}
    return core.issue(DMA_INDIRECT, (out,), (source, index), params, name, extra)
