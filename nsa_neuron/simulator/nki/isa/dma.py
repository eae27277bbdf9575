"""DMA: dma_copy with gather and scatter; sendrecv and core_barrier between two cores."""

import numpy as np

from ...access import Access
from ...context import violate, violation
from ...dtypes import bits, load_f32, store
from ...operands import Spec
from ...tensor import NkiTensor
from ..binding import core_of, enum_of, instruction, load, save
from .constants import dge_mode as dge_modes
from .constants import dma_engine as dma_engines
from .constants import engine as engines
from .constants import oob_mode as oob_modes

REACH = ("sbuf", "private_hbm", "shared_hbm")


def _check_copy(c):
    priority, dge, engine = c.params[:3]
    c.tensors("src")
    dst, src = c["dst"], c["src"]
    c.buffers("dst", *REACH)
    c.buffers("src", *REACH)
    c.require(
        dst.layout.size == src.layout.size,
        "element-count",
        f"src has {src.layout.size} elements, dst {dst.layout.size}",
        "src",
        value=src.shape,
        limit=dst.shape,
    )
    c.require(
        priority is None,
        "generation",
        "priority exists from NeuronCore-v4 on",
        "priority",
        value=priority,
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
    return "dma"


def _run_copy(core, payload, writes, reads, params):
    (dst,), (src,) = writes, reads
    save(core, dst, src.array() if dst.dtype is src.dtype else load(src))


DMA_COPY = Spec("dma_copy", ("dst",), ("src",), _check_copy, _run_copy, dma=True)


def _check_indirect(c):
    _check_copy(c)
    c.require(
        c.params[1] in (dge_modes.unknown, dge_modes.swdge),
        "dge",
        "gather and scatter need swdge",
        "dge_mode",
        value=c.params[1].name,
    )
    return "dma"


def rows_of(view, core):
    """The rows a vector-indirect view may address: an array [R, *rest], and the bound R."""
    dynamic = view.dynamic
    layout = view.access().layout
    total = view.memory.allocation.pitch_bytes // view.dtype.itemsize
    inner = sum((n - 1) * s for n, s in zip(layout.shape[1:], layout.strides[1:], strict=True))
    count = (total - 1 - inner - view.offset) // dynamic.stride + 1
    if dynamic.count is not None:
        count = min(count, dynamic.count)
    if count < 1:
        return None, 0
    table = view._view((count, *view.shape[1:]), (dynamic.stride, *view.strides[1:]))
    table.dynamic = None
    return table, count


def _run_indirect(core, payload, writes, reads, params):
    (dst,), (src, index) = writes, reads
    gather, view = core.state.pop("indirect")
    skip = params[3]
    rows = view.shape[0]
    index = index.array().reshape(-1)[:rows].astype(np.int64)
    table, count = rows_of(view, core)
    valid = (index >= 0) & (index < count)
    if not valid.all() and not skip:
        bad = int(np.argmin(valid))
        violate(
            "oob",
            f"index {bad} is {int(index[bad])}, the tensor has {count} rows",
            instruction="dma_copy",
            operand="src" if gather else "dst",
            value=int(index[bad]),
            limit=f"0..{count - 1}",
            hint="oob_mode=nisa.oob_mode.skip leaves such rows alone",
        )
    everything = bool(valid.all())
    other = dst if gather else src
    if not everything and other.shape[0] != rows:
        raise violation(
            "shape",
            "rows can be skipped only where both sides have the same rows",
            instruction="dma_copy",
            value=other.shape,
            limit=view.shape,
        )
    if not valid.any():
        return
    wanted = index[valid]
    races = core.launch.races
    tracked = races is not None or not view.memory.written.full
    rows_touched = [table[int(r) : int(r) + 1] for r in wanted] if tracked else []
    outs, ins = ((other,), rows_touched) if gather else (rows_touched, (other,))
    pending = races.begin(core.index, DMA_INDIRECT, outs, ins) if races is not None else ()
    if gather:
        for row in rows_touched:
            core.require_readable(row, DMA_INDIRECT)
        values = table.array()[wanted]
        _save_rows(core, dst, values, None if everything else valid, table.dtype)
    else:
        core.require_readable(src, DMA_INDIRECT)
        values = src.array() if everything else src.array()[valid]
        if src.dtype is not table.dtype:
            values = load(src) if everything else load(src)[valid]
        shape = (len(wanted), *view.shape[1:])
        target = np.empty(shape, table.array().dtype)
        store(target, values.reshape(shape), table.dtype if core.options.precise else None)
        bits(table.array())[wanted] = bits(target)
        for row in rows_touched:
            core.mark_written(row)
    if pending:
        races.end(core.index, DMA_INDIRECT, pending)


def _save_rows(core, dst, values, valid, dtype):
    """Store gathered rows; `valid` names the rows of dst that get one, None all."""
    if dst.dtype is not dtype:
        values = load_f32(values)
    if valid is None:
        save(core, dst, values)
        core.mark_written(dst)
        return
    for position, row in enumerate(np.flatnonzero(valid)):
        one = dst[int(row) : int(row) + 1]
        save(core, one, values[position].reshape(one.shape))
        core.mark_written(one)


DMA_INDIRECT = Spec(
    "dma_copy",
    ("dst",),
    ("src", "index"),
    _check_indirect,
    _run_indirect,
    dma=True,
    marks_itself=True,
    checks_itself=True,
)


def _anywhere(view):
    """A stand-in for an indirect view in checks and record: it may touch the whole storage."""
    stand_in = view._view(view.shape, view.strides, 0)
    stand_in.dynamic = None
    access = Access(view.memory.allocation, view.access().layout, 0, True)
    access.lo, access.hi = 0, view.memory.allocation.pitch_bytes
    stand_in._access = access
    return stand_in


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
    core = core_of("dma_copy")
    skip = enum_of(oob_modes, oob_mode, "dma_copy", "oob_mode") is oob_modes.skip
    dge = enum_of(dge_modes, dge_mode, "dma_copy", "dge_mode")
    params = (priority, dge, enum_of(engines, engine, "dma_copy", "engine"), skip)
    vector = [
        t
        for t in (dst, src)
        if type(t) is NkiTensor and t.dynamic is not None and t.dynamic.kind == "vector"
    ]
    if not vector:
        if skip:
            views = [core.static(t, DMA_COPY, [], skip=True) for t in (dst, src)]
            if any(v is None for v in views):
                return None
        return core.issue(DMA_COPY, (dst,), (src,), params, name)
    if len(vector) == 2:
        raise violation(
            "dge",
            "only one side of a transfer can be indirect",
            instruction="dma_copy",
            operand="src",
        )
    (view,) = vector
    assert view.dynamic is not None
    gather = view is src
    index = view.dynamic.index
    core.require_readable(index, DMA_INDIRECT)
    core.state["indirect"] = (gather, view)
    out, source = (dst, _anywhere(view)) if gather else (_anywhere(view), src)
    return core.issue(
        DMA_INDIRECT,
        (out,),
        (source, index),
        params,
        name,
        {"rows": view.shape[0], "indirect": "gather" if gather else "scatter"},
    )


def _check_sendrecv(c):
    _, _, _, mover = c.params
    c.tensors("src")
    dst, src = c["dst"], c["src"]
    c.buffers("dst", "sbuf")
    c.buffers("src", "sbuf")
    c.require(
        dst.shape == src.shape and dst.dtype.name == src.dtype.name,
        "shape",
        "src and dst must have the same shape and dtype",
        "dst",
        value=(dst.shape, dst.dtype.name),
        limit=(src.shape, src.dtype.name),
    )
    if mover is dma_engines.gpsimd_dma:
        limit = {4: 1024, 2: 512, 1: 256}[src.dtype.itemsize]
        used = src.n * src.dtype.itemsize
        c.require(
            used <= limit,
            "tile-size",
            f"gpsimd_dma moves {limit} bytes per partition",
            "src",
            value=used,
            limit=limit,
        )
    return "dma" if mover is dma_engines.dma else "gpsimd"


def _run_sendrecv(core, payload, writes, reads, params):
    (dst,), (src,) = writes, reads
    pipe = params[2]
    received = core.launch.meeting.meet(
        core.index, ("sendrecv", pipe), src.array().copy(), f"sendrecv(pipe_id={pipe})"
    )
    save(core, dst, received)


SENDRECV = Spec("sendrecv", ("dst",), ("src",), _check_sendrecv, _run_sendrecv, dma=True)


@instruction
def sendrecv(
    src, dst, send_to_rank, recv_from_rank, pipe_id, dma_engine=dma_engines.dma, name=None
):
    """Send src to the other core of the pair and receive its tensor into dst."""
    core = core_of("sendrecv")
    _need_pair(core, "sendrecv")
    other = 1 - core.index
    if (send_to_rank, recv_from_rank) != (other, other):
        raise violation(
            "lnc-sync",
            "ranks name the other core",
            instruction="sendrecv",
            value=(send_to_rank, recv_from_rank),
            limit=(other, other),
        )
    mover = enum_of(dma_engines, dma_engine, "sendrecv", "dma_engine")
    params = (send_to_rank, recv_from_rank, pipe_id, mover)
    return core.issue(SENDRECV, (dst,), (src,), params, name)


def _need_pair(core, name):
    if core.launch.meeting is None:
        raise violation(
            "lnc-sync",
            "needs two cores",
            instruction=name,
            value=1,
            limit=2,
            hint="launch with kernel[2](...)",
        )


def _check_barrier(c):
    c.tensors("data")
    c.buffers("data", "shared_hbm")
    return c.params[1].name


def _run_barrier(core, payload, writes, reads, params):
    core.launch.meeting.meet(core.index, ("core_barrier",), None, "core_barrier")


BARRIER = Spec(
    "core_barrier", (), ("data",), _check_barrier, _run_barrier, dma=True, checks_itself=True
)


@instruction
def core_barrier(data, cores, engine=engines.gpsimd, name=None):
    """Wait until both cores are here."""
    core = core_of("core_barrier")
    _need_pair(core, "core_barrier")
    if tuple(cores) != (0, 1):
        raise violation(
            "lnc-sync",
            "cores must be (0, 1)",
            instruction="core_barrier",
            operand="cores",
            value=tuple(cores),
            limit=(0, 1),
        )
    return core.issue(BARRIER, (), (data,), (tuple(cores), engine), name)
