"""GpSimd Engine: generated patterns and gathers."""

from collections import namedtuple
from math import prod

import numpy as np

from ...issue.spec import Spec
from ...issue.timing import GpSimd, timing
from ...machine import dtypes as dt
from ...rules.registers import RunTimeScalar, VirtualRegister, scalar
from ...rules.session import violate, violation
from ...semantics import alu
from ...semantics import gpsimd as semantics
from ..binding import EQUAL, core_of, instruction, load, op_name, save
from .shared import elements, one_of, same_dtype

IotaParams = namedtuple("IotaParams", "pattern channel_multiplier")
AffineParams = namedtuple("AffineParams", "pattern channel_multiplier on_false_value cmp_op")
LocalGatherParams = namedtuple("LocalGatherParams", "num_elem_per_idx num_valid_indices")

INT32 = range(-(2**31), 2**31)


def int32(value, what, role, register=False):
    """A compile-time int32 or, where allowed, a register."""
    if register and isinstance(value, VirtualRegister):
        return value
    run_time = isinstance(value, RunTimeScalar)
    if run_time or not hasattr(value, "__index__") or int(value) not in INT32:
        raise violation(
            "value", "is an int32", instruction=what, operand=role, value=value, limit="int32"
        )
    return int(value)


def _pattern(pattern, what):
    pairs = tuple(tuple(p) for p in pattern)
    good = 1 <= len(pairs) <= 4 and all(
        len(p) == 2 and all(hasattr(x, "__index__") for x in p) and p[1] >= 1 for p in pairs
    )
    if not good:
        raise violation(
            "value",
            "is one to four [step, count] pairs of integers",
            instruction=what,
            operand="pattern",
            value=pattern,
            limit="[[step, count], ...]",
        )
    return tuple((int(s), int(n)) for s, n in pairs)


def sbuf_only(c, *roles):
    """GpSimd reaches no PSUM."""
    for role in roles:
        c.buffers(role, "sbuf")


def _pattern_fills(c, role):
    count = prod(n for _, n in c.params.pattern)
    c.require(
        count == c[role].n,
        "element-count",
        f"makes {count} elements, {role} has {c[role].n}",
        "pattern",
        value=count,
        limit=c[role].n,
    )


def _check_iota(c):
    sbuf_only(c, "dst")
    _pattern_fills(c, "dst")
    return "gpsimd"


def _run_iota(core, payload, writes, reads, params):
    dst = writes[0]
    values = semantics.iota(
        dst.shape[0], params.pattern, scalar(reads[0]), params.channel_multiplier
    )
    save(core, dst, values)


IOTA = Spec("iota", ("dst",), ("offset",), _check_iota, _run_iota, timing(GpSimd.AFFINE))


@instruction
def iota(dst, pattern, offset=0, channel_multiplier=0, name=None):
    """dst[p, i...] = offset + p * channel_multiplier + sum(step * i)."""
    params = IotaParams(
        _pattern(pattern, "iota"), int32(channel_multiplier, "iota", "channel_multiplier")
    )
    return core_of("iota").issue(
        IOTA, (dst,), (int32(offset, "iota", "offset", True),), params, name
    )


def _check_affine_select(c):
    c.tensors("on_true_tile")
    sbuf_only(c, "dst", "on_true_tile")
    c.same_partitions("dst", "on_true_tile")
    c.same_elements("dst", "on_true_tile")
    _pattern_fills(c, "dst")
    one_of(c, c.params.cmp_op, tuple(alu.COMPARE), "operator", "cmp_op", "is no comparison")
    return "gpsimd"


def _run_affine_select(core, payload, writes, reads, params):
    (dst,), (tile, offset) = writes, reads
    same = dst.dtype is tile.dtype
    values = semantics.affine_select(
        tile.array() if same else load(tile),
        params.pattern,
        params.channel_multiplier,
        params.on_false_value,
        params.cmp_op,
        scalar(offset),
    )
    save(core, dst, values)


AFFINE_SELECT = Spec(
    "affine_select",
    ("dst",),
    ("on_true_tile", "offset"),
    _check_affine_select,
    _run_affine_select,
    timing(GpSimd.AFFINE),
)


@instruction
def affine_select(
    dst,
    pattern,
    channel_multiplier,
    on_true_tile,
    on_false_value,
    cmp_op=EQUAL,
    offset=0,
    name=None,
):
    """dst = on_true_tile where cmp_op(affine value, 0), else on_false_value."""
    what = "affine_select"
    if not hasattr(on_false_value, "__float__") or isinstance(on_false_value, np.ndarray):
        raise violation(
            "usage",
            "must be a compile-time number",
            instruction=what,
            operand="on_false_value",
            value=on_false_value,
            limit="float",
        )
    params = AffineParams(
        _pattern(pattern, what),
        int32(channel_multiplier, what, "channel_multiplier"),
        float(on_false_value),
        op_name(cmp_op, what, "cmp_op"),
    )
    start = int32(offset, what, "offset", True)
    return core_of(what).issue(AFFINE_SELECT, (dst,), (on_true_tile, start), params, name)


def _check_local_gather(c):
    size, valid = c.params
    c.tensors("src_buffer", "index")
    sbuf_only(c, "dst", "src_buffer", "index")
    c.same_partitions("dst", "src_buffer", "index")
    src, index = c["src_buffer"], c["index"]
    c.require(
        src.p % semantics.CORE == 0,
        "partition-limit",
        "covers whole GpSimd cores of 16 partitions",
        "src_buffer",
        value=src.p,
        limit="multiple of 16",
    )
    same_dtype(c, "src_buffer", "dst")
    c.dtypes("index", (dt.uint16,))
    sizes = (1, 2, 4, 8, 16, 32)
    one_of(c, size, sizes, "value", "num_elem_per_idx", "elements per index")
    per_core = index.n * semantics.CORE
    count = per_core if valid is None else valid
    c.require(
        1 <= count <= min(per_core, 4096),
        "tile-size",
        f"{count} indices per core",
        "num_valid_indices" if valid is not None else "index",
        value=count,
        limit=min(per_core, 4096),
    )
    elements(c, "dst", count * size)
    return "gpsimd"


def _run_local_gather(core, payload, writes, reads, params):
    src, index = reads
    size, valid = params
    try:
        values = semantics.local_gather(src.array(), index.array(), size, valid)
    except IndexError as error:
        _outside("local_gather", "index", error, src)
        return
    save(core, writes[0], values)


def _outside(what, role, error, data):
    violate(
        "oob",
        f"an index leaves the partition: {error}",
        instruction=what,
        operand=role,
        limit=f"0..{data.size // data.shape[0] - 1}",
    )


LOCAL_GATHER = Spec(
    "local_gather",
    ("dst",),
    ("src_buffer", "index"),
    _check_local_gather,
    _run_local_gather,
    timing(GpSimd.ACROSS),
)


@instruction
def local_gather(dst, src_buffer, index, num_elem_per_idx=1, num_valid_indices=None, name=None):
    """Gather within the 16 partitions of each GpSimd core, by that core's list of offsets."""
    params = LocalGatherParams(num_elem_per_idx, num_valid_indices)
    return core_of("local_gather").issue(LOCAL_GATHER, (dst,), (src_buffer, index), params, name)


def _check_gather(c):
    c.tensors("data", "indices")
    sbuf_only(c, "dst", "data", "indices")
    c.same_partitions("dst", "data", "indices")
    c.same_elements("indices", "dst")
    same_dtype(c, "data", "dst")
    c.dtypes("indices", (dt.uint32,))
    return "gpsimd"


def _run_gather(core, payload, writes, reads, params):
    data, indices = reads
    try:
        values = semantics.nc_n_gather(data.array(), indices.array())
    except IndexError as error:
        _outside("nc_n_gather", "indices", error, data)
        return
    save(core, writes[0], values)


GATHER = Spec(
    "nc_n_gather",
    ("dst",),
    ("data", "indices"),
    _check_gather,
    _run_gather,
    timing(GpSimd.ACROSS),
)


@instruction
def nc_n_gather(dst, data, indices, name=None):
    """dst[p, j] = data[p, indices[p, j]] over flattened free dims."""
    return core_of("nc_n_gather").issue(GATHER, (dst,), (data, indices), (), name)
