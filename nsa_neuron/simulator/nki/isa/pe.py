"""Tensor Engine: nc_matmul, nc_transpose."""

from collections import namedtuple
from functools import lru_cache

import numpy as np

from ...issue.spec import Spec
from ...issue.timing import Tensor, Vector, timing
from ...machine import dtypes as dt
from ...rules.session import running, violate, violation
from ...semantics import pe as semantics
from ..binding import Interned, core_of, enum_of, instruction, save
from .constants import engine as engines
from .constants import matmul_perf_mode
from .shared import engine_of

MatmulParams = namedtuple(
    "MatmulParams",
    "is_transpose accumulate tile_position tile_size perf_mode is_stationary_onezero "
    "is_moving_onezero",
)
TransposeParams = namedtuple("TransposeParams", "engine")

_INPUTS = (dt.float8_e4m3, dt.float8_e5m2, dt.bfloat16, dt.float16, dt.tfloat32, dt.float32)
_WIDE = ("float32", "tfloat32")


def _check_matmul(c):
    transpose, _accumulate, position, size, perf, _, _ = c.params
    c.tensors("stationary", "moving")
    c.buffers("stationary", "sbuf")
    c.buffers("moving", "sbuf")
    c.buffers("dst", "psum")
    st, mv, dst = c["stationary"], c["moving"], c["dst"]
    c.dtypes("moving", _INPUTS)
    if transpose:
        _transposed_dtype(c, "stationary")
        c.require(
            perf is matmul_perf_mode.none,
            "value",
            "transpose mode excludes double_row",
            "perf_mode",
            value=perf.name,
        )
    else:
        c.dtypes("stationary", _INPUTS)
        c.dtypes("dst", (dt.float32,))
    wide = (st.dtype.name in _WIDE, mv.dtype.name in _WIDE)
    c.require(
        wide[0] == wide[1],
        "dtype-match",
        "fp32 and tf32 pair only with fp32 and tf32",
        "moving",
        value=f"{st.dtype} x {mv.dtype}",
    )
    c.same_partitions("stationary", "moving")
    double = perf is matmul_perf_mode.double_row
    pair = 2 if double else 1
    if double:
        for o in (st, mv):
            c.require(o.dtype.is_fp8, "dtype", "double_row takes fp8", o.role, value=o.dtype.name)
            c.require(
                len(o.shape) >= 3 and o.shape[1] == 2,
                "shape",
                "double_row takes [K, 2, free]",
                o.role,
                value=o.shape,
                limit="(K, 2, free)",
            )
    rows, columns = _check_tile(c, position, size, double)
    m, n = st.n // pair, mv.n // pair
    c.require(
        st.p <= rows,
        "tile-size",
        f"contracts over {st.p} partitions",
        "stationary",
        value=st.p,
        limit=rows,
    )
    c.require(m <= columns, "tile-size", f"has {m} columns", "stationary", value=m, limit=columns)
    c.require(
        n <= c.machine.moving_free,
        "tile-size",
        f"has {n} elements per partition",
        "moving",
        value=n,
        limit=c.machine.moving_free,
    )
    c.require(
        dst.p == m,
        "partition-match",
        f"has {dst.p} partitions, stationary {m} columns",
        "dst",
        value=dst.p,
        limit=m,
    )
    c.require(
        dst.n == n,
        "element-count",
        f"has {dst.n} elements per partition, moving {n}",
        "dst",
        value=dst.n,
        limit=n,
    )
    _check_bank(c)
    overlapping = any(s == 0 for s in dst.layout.strides[1:]) or _self_overlaps(dst.layout)
    return "tensor", (double, overlapping)


def _transposed_dtype(c, role):
    """A transpose keeps the dtype; PE writes fp8 as 2-byte elements or into a 2-byte stride."""
    dst, data = c["dst"], c[role]
    same = dst.dtype.name == data.dtype.name
    widened = data.dtype.is_fp8 and dst.dtype.itemsize == 2
    c.require(
        same or widened,
        "dtype-match",
        f"is {dst.dtype}, {role} is {data.dtype}",
        "dst",
        value=dst.dtype.name,
        limit=data.dtype.name,
    )


def _check_bank(c):
    bank = c.machine.psum_bank_bytes
    access = c["dst"].access
    base = access.allocation.address[1] if access.allocation.address else 0
    first, last = (base + access.lo) // bank, (base + access.hi - 1) // bank
    c.require(
        first == last,
        "psum-bank",
        f"spans banks {first}..{last}",
        "dst",
        value=access.hi - access.lo,
        limit=f"{bank} bytes in one bank",
    )


def _check_tile(c, position, size, double):
    m = c.machine
    if not position and not size:
        return m.partitions, m.stationary_free
    ok = len(position) == 2 and len(size) == 2
    c.require(
        ok,
        "tile-position",
        "set both tile_position and tile_size, two integers each",
        value=(position, size),
    )
    (row, column), (rows, columns) = position, size
    for name, start, extent in (("row", row, rows), ("column", column, columns)):
        c.require(
            extent in (32, 64, 128),
            "tile-position",
            f"{name} size",
            value=extent,
            limit=(32, 64, 128),
        )
        c.require(
            start % extent == 0 and 0 <= start and start + extent <= m.partitions,
            "tile-position",
            f"{name} position",
            value=start,
            limit=f"multiple of {extent}",
        )
    c.require(
        not (double and (column or columns != 128)),
        "tile-position",
        "double_row excludes column tiling",
        value=(position, size),
    )
    return rows, columns


def _self_overlaps(layout):
    """True when the free pattern visits an element twice."""
    step = 1
    for stride, count in sorted(
        (abs(s), n) for s, n in zip(layout.strides[1:], layout.shape[1:], strict=True) if n > 1
    ):
        if stride < step:
            return True
        step = stride * (count - 1) + step
    return False


def _run_matmul(core, payload, writes, reads, params):
    transpose, accumulate = params[:2]
    double, overlapping = payload
    (dst,), (stationary, moving) = writes, reads
    mv = semantics.operand(moving.array(), moving.dtype)
    out = dst.array()
    if transpose:
        try:
            raw = semantics.transpose_mode(stationary.array(), mv)
        except ValueError as error:
            raise violation(
                "value",
                str(error),
                instruction="nc_matmul",
                operand="moving",
                limit="an identity or permutation matrix",
                hint="is_transpose=False for an ordinary product",
            ) from None
        _save_transposed(core, dst, raw)
        core.mark_written(dst)
        return
    st = semantics.operand(stationary.array(), stationary.dtype)
    memory, access = dst.memory, dst.access()
    group = memory.group()
    if overlapping:
        product = (semantics.matmul_double_row if double else semantics.matmul)(st, mv)
        _overlapping(core, dst, product, accumulate)
        return
    known = True if group.full else group.covers(access)
    if accumulate is None:
        accumulate = known if known or not group.touches(access) else None
    elif accumulate and not known:
        _unopened(core, dst)
    if accumulate is not False and memory.foreign is not None:
        _foreign(core, dst)
    _one_group(core, access, accumulate)
    if accumulate is False and out.flags.c_contiguous:
        k = st.shape[0] * (2 if double else 1)
        semantics.matmul(st.reshape(k, -1), mv.reshape(k, -1), out.reshape(out.shape[0], -1))
    else:
        product = (semantics.matmul_double_row if double else semantics.matmul)(st, mv)
        written = group.mask(access) if accumulate is None else False
        semantics.psum_update(out, product, accumulate, written)
    if not group.full:
        group.add(access)
    if not memory.written.full:
        memory.written.add(access)
    if accumulate is False and memory.foreign is not None:
        memory.foreign.remove(access)


def _overlapping(core, dst, product, accumulate):
    """A destination that visits elements more than once: the flat rows are updated in order."""
    memory, access = dst.memory, dst.access()
    group = memory.group()
    width = memory.allocation.pitch_bytes // dst.dtype.itemsize
    rows = dst._view((dst.shape[0], width), (width, 1), access.p0 * width)
    column = access.start - access.p0 * width
    index = np.array(column)
    for size, stride in zip(dst.shape[1:], dst.strides[1:], strict=True):
        index = index[..., None] + np.arange(size) * stride
    index = index.ravel()
    array = rows.array()
    known = np.array(group.mask(rows.access()))
    for row in range(array.shape[0]):
        semantics.psum_update_overlapping(array[row], index, product[row], accumulate, known[row])
    group.add(access)
    memory.written.add(access)


def _one_group(core, access, accumulate):
    """Warn where a matmul goes on with a group after another one began in its PSUM bank.

    A group that a matmul into the whole bank began is one, whichever slices go on with it.
    """
    begun = core.state.setdefault("groups", {})
    allocation = access.allocation
    bank = access.lo // core.machine.psum_bank_bytes
    key = allocation.id, bank, access.p0
    if not accumulate:
        begun[key] = access
        return
    latest = begun.get(key)
    if latest is not None and not _meet(latest, access):
        core.warn(
            "nc_matmul goes on with a group after another group began in the same PSUM bank: exact "
            "in AWS's simulator, wrong on the device as a third party reports of trn1; finish one "
            "first, give it a bank of its own, or begin with one matmul into the whole bank"
        )


def _meet(a, b):
    """Whether two places of a bank, from one partition on, have an element in common."""
    first, second = a.layout, b.layout
    if not a.overlaps(b) or first.dtype is not second.dtype or (first.dense and second.dense):
        return a.overlaps(b)
    return _interlock(first, second, a.start - b.start)


@lru_cache(maxsize=4096)
def _interlock(first, second, apart):
    """`_meet` of strided places, whose hulls say too much. apart: elements between their starts."""
    found = []
    for layout, start in ((first, apart), (second, 0)):
        at = np.array([start])
        for size, stride in zip(layout.shape[1:], layout.strides[1:], strict=True):
            at = (at[:, None] + np.arange(size) * stride).ravel()
        found.append(at)
    return bool(np.isin(found[0], found[1]).any())


def _unopened(core, dst):
    violate(
        "psum-accumulate",
        "accumulate=True, but no matmul has written this location",
        instruction="nc_matmul",
        operand="dst",
        table=(repr(dst),),
        hint="accumulate=(i > 0), or leave accumulate out",
    )


def _foreign(core, dst):
    if dst.memory.foreign.touches(dst.access()) and dst.memory.group().touches(dst.access()):
        violate(
            "psum-foreign",
            "the location was written by memset, copy or transpose before",
            instruction="nc_matmul",
            operand="dst",
            table=(repr(dst),),
            hint="accumulate=False for the first matmul of the group",
        )


MATMUL = Spec(
    "nc_matmul",
    ("dst",),
    ("stationary", "moving"),
    _check_matmul,
    _run_matmul,
    timing(Tensor.MULTIPLY),
    marks_itself=True,
)


@instruction
def nc_matmul(
    dst,
    stationary,
    moving,
    is_stationary_onezero=False,
    is_moving_onezero=False,
    is_transpose=False,
    accumulate=None,
    tile_position=(),
    tile_size=(),
    perf_mode=matmul_perf_mode.none,
    name=None,
):
    """dst[M, N] (+)= stationary[K, M].T @ moving[K, N] on the Tensor Engine."""
    core = running() or core_of("nc_matmul")
    if type(perf_mode) is not matmul_perf_mode:
        perf_mode = enum_of(matmul_perf_mode, perf_mode, "nc_matmul", "perf_mode")
    if accumulate is not None and type(accumulate) is not bool:
        accumulate = _flag(accumulate)
    flags = is_transpose, is_stationary_onezero, is_moving_onezero
    if tile_position or tile_size or perf_mode is not _PLAIN_MODE or flags != _NO_FLAGS:
        params = _params[
            bool(is_transpose),
            accumulate,
            tuple(tile_position) if tile_position else (),
            tuple(tile_size) if tile_size else (),
            perf_mode,
            bool(is_stationary_onezero),
            bool(is_moving_onezero),
        ]
    else:
        params = _PLAIN[accumulate]  # nearly always: seven arguments take longer to look up
    return core.issue(MATMUL, (dst,), (stationary, moving), params, name)


_params = Interned(MatmulParams)
_PLAIN_MODE = matmul_perf_mode.none
_NO_FLAGS = (False, False, False)
_PLAIN = {a: _params[False, a, (), (), _PLAIN_MODE, False, False] for a in (None, False, True)}
_transpose_params = Interned(TransposeParams, lambda engine: (engine_of(engine, "nc_transpose"),))


def _flag(value):
    """`accumulate=` as a bool; numbers that Python code computes count, registers do not."""
    if not hasattr(value, "__bool__") or hasattr(value, "read") or hasattr(value, "memory"):
        raise violation(
            "usage",
            "is True, False or None",
            instruction="nc_matmul",
            operand="accumulate",
            value=type(value).__name__,
            limit=(True, False, None),
        )
    return bool(value)


def _check_transpose(c):
    c.tensors("data")
    dst, data = c["dst"], c["data"]
    _transposed_dtype(c, "data")
    c.require(
        (dst.p, dst.n) == (data.n, data.p),
        "shape",
        "must be data transposed",
        "dst",
        value=dst.shape,
        limit=(data.n, data.p),
    )
    asked = c.params.engine
    default = "tensor" if dst.buffer == "psum" and data.buffer == "sbuf" else "vector"
    chosen = c.choose_engine(asked, default, "tensor", "vector")
    limit = 128 if chosen == "tensor" else 32
    c.require(
        data.p <= limit and data.n <= limit,
        "tile-size",
        f"is [{data.p}, {data.n}]",
        "data",
        value=(data.p, data.n),
        limit=(limit, limit),
    )
    if chosen == "tensor":
        c.buffers("data", "sbuf")
        c.buffers("dst", "psum")
    return chosen


def _run_transpose(core, payload, writes, reads, params):
    (dst,), (data,) = writes, reads
    _save_transposed(core, dst, semantics.transpose(data.array()))


def _save_transposed(core, dst, raw):
    out = dst.array()
    if out.dtype.itemsize != raw.dtype.itemsize:
        raw = semantics.widen_fp8(raw).view(out.dtype)
    save(core, dst, raw.reshape(dst.shape))


TRANSPOSE = Spec(
    "nc_transpose",
    ("dst",),
    ("data",),
    _check_transpose,
    _run_transpose,
    timing(Tensor.TRANSPOSE, Vector.STREAM),
)


@instruction
def nc_transpose(dst, data, engine=engines.unknown, name=None):
    """dst[F, P] = data[P, F], bit-exact, on the Tensor or Vector Engine."""
    core = running() or core_of("nc_transpose")
    return core.issue(TRANSPOSE, (dst,), (data,), _transpose_params[engine,], name)
