"""Two cores of a pair: sendrecv and core_barrier."""

from collections import namedtuple

from ...issue.spec import Spec
from ...issue.timing import Dma, GpSimd, Meeting, timing
from ...rules.session import violation
from ..binding import core_of, enum_of, instruction, save
from .constants import dma_engine as dma_engines
from .constants import engine as engines
from .shared import engine_of

SendrecvParams = namedtuple("SendrecvParams", "send_to_rank recv_from_rank pipe_id dma_engine")
BarrierParams = namedtuple("BarrierParams", "cores engine")


def _check_sendrecv(c):
    mover = c.params.dma_engine
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
    pipe = params.pipe_id

    def deliver(values):
        save(core, dst, values)
        core.mark_written(dst)

    what = f"sendrecv(pipe_id={pipe})"
    message = core.launch.meeting.exchange(
        core.index, ("sendrecv", pipe), src.array().copy(), deliver, what
    )
    if message is not None:
        core.pending.append((dst.access(), message, what))


SENDRECV = Spec(
    "sendrecv",
    ("dst",),
    ("src",),
    _check_sendrecv,
    _run_sendrecv,
    timing(Dma.MESSAGE, GpSimd.MESSAGE),
    dma=True,
    marks_itself=True,
)


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
    params = SendrecvParams(send_to_rank, recv_from_rank, pipe_id, mover)
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
    return c.params.engine.name


def _run_barrier(core, payload, writes, reads, params):
    core.launch.meeting.meet(core.index, ("core_barrier",), None, "core_barrier")


BARRIER = Spec(
    "core_barrier",
    (),
    ("data",),
    _check_barrier,
    _run_barrier,
    timing(Meeting.BARRIER),
    dma=True,
    checks_itself=True,
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
    params = BarrierParams((0, 1), engine_of(engine, "core_barrier"))
    return core.issue(BARRIER, (), (data,), params, name)
