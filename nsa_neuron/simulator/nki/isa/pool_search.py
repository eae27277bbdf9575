"""GpSimd Engine: segments, nonzero elements, top-k, reduction over partitions."""

from collections import namedtuple

import numpy as np

from ...issue.spec import Spec
from ...issue.timing import GpSimd, timing
from ...machine import dtypes as dt
from ...machine.dtypes import store_bits
from ...rules.session import violate
from ...semantics import gpsimd as semantics
from ..binding import core_of, instruction, load, op_name, save
from .pool import int32, sbuf_only
from .shared import elements, integers, one_of

NonzeroParams = namedtuple("NonzeroParams", "index_offset padding_val")
TopkParams = namedtuple("TopkParams", "n k")
PartitionReduceParams = namedtuple("PartitionReduceParams", "op")


def _check_bounds(c):
    c.tensors("segment_ids")
    sbuf_only(c, "dst", "segment_ids")
    ids = c["segment_ids"]
    c.require(
        ids.p == 1 and c["dst"].p == 1,
        "partition-limit",
        "uses one partition",
        "segment_ids",
        value=(ids.p, c["dst"].p),
        limit=1,
    )
    elements(c, "dst", 2 * ids.n)
    for role in ("dst", "segment_ids"):
        c.dtypes(role, (dt.float32, dt.int32))
    return "gpsimd"


def _run_bounds(core, payload, writes, reads, params):
    ids = reads[0].array()
    negative = ids < 0
    if negative.any():
        violate(
            "value",
            "segment ids are not negative",
            instruction="sequence_bounds",
            operand="segment_ids",
            value=ids[negative].ravel()[0].item(),
            limit=">= 0",
        )
    save(core, writes[0], semantics.sequence_bounds(ids))


SEQUENCE_BOUNDS = Spec(
    "sequence_bounds", ("dst",), ("segment_ids",), _check_bounds, _run_bounds, timing(GpSimd.ACROSS)
)


@instruction
def sequence_bounds(dst, segment_ids, name=None):
    """dst = first index and index after the last of the segment each element belongs to."""
    return core_of("sequence_bounds").issue(SEQUENCE_BOUNDS, (dst,), (segment_ids,), (), name)


def _check_nonzero(c):
    c.tensors("src")
    sbuf_only(c, "dst", "src")
    c.same_partitions("dst", "src")
    elements(c, "dst", c["src"].n + 1)
    c.dtypes("src", (dt.float32, dt.int32))
    c.dtypes("dst", (dt.int32,))
    return "gpsimd"


def _run_nonzero(core, payload, writes, reads, params):
    dst, src = writes[0], reads[0]
    rows = range(0, dst.shape[0], semantics.CORE)
    for row in rows:
        core.require_readable(src[row : row + 1], NONZERO)
    values = semantics.nonzero_with_count(
        dst.array(),
        src.array(),
        params.index_offset,
        params.padding_val,
        dst.access().partition,
    )
    save(core, dst, values)
    mask = np.zeros(dst.shape, np.bool_)
    mask[:: semantics.CORE] = True
    core.mark_masked(dst, mask)


NONZERO = Spec(
    "nonzero_with_count",
    ("dst",),
    ("src", "dst"),
    _check_nonzero,
    _run_nonzero,
    timing(GpSimd.ACROSS),
    marks_itself=True,
    checks_itself=True,
)


@instruction
def nonzero_with_count(dst, src, index_offset=0, padding_val=-1, name=None):
    """Indices of nonzero elements, padding, their count; on partitions 0, 16, ..., 112 only."""
    what = "nonzero_with_count"
    params = NonzeroParams(
        int32(index_offset, what, "index_offset"), int32(padding_val, what, "padding_val")
    )
    return core_of(what).issue(NONZERO, (dst,), (src, dst), params, name)


def _check_topk(c):
    n, k = c.params
    c.tensors("src")
    src = c["src"]
    sbuf_only(c, "val_dst", "idx_dst", "src")
    c.same_partitions("val_dst", "idx_dst", "src")
    c.same_elements("val_dst", "idx_dst")
    c.dtypes("src", (dt.bfloat16,))
    c.dtypes("val_dst", (dt.bfloat16,))
    c.dtypes("idx_dst", (dt.uint32,))
    c.require(
        src.p % semantics.CORE == 0,
        "partition-limit",
        "covers whole groups of 16 partitions",
        "src",
        value=src.p,
        limit="multiple of 16",
    )
    c.require(8 <= n < 65536, "value", "elements searched", "n", value=n, limit="8..65535")
    c.require(
        src.n * semantics.CORE >= n,
        "shape",
        f"holds {src.n * semantics.CORE} elements per group",
        "src",
        value=src.shape,
        limit=f"free size >= {-(-n // semantics.CORE)}",
    )
    c.require(
        1 <= k <= n and k < 32768,
        "shape",
        f"asks for {k} of {n}",
        "val_dst",
        value=k,
        limit=min(n, 32767),
    )
    return "gpsimd"


def _run_topk(core, payload, writes, reads, params):
    values, indices = semantics.topk(load(reads[0]), params.n, params.k)
    save(core, writes[0], values)
    store_bits(writes[1].array(), indices)


TOPK = Spec("topk", ("val_dst", "idx_dst"), ("src",), _check_topk, _run_topk, timing(GpSimd.TOP_K))


@instruction
def topk(val_dst, idx_dst, src, n, name=None):
    """The k largest of n elements per group of 16 partitions, ascending, and their indices."""
    k = val_dst.size // val_dst.shape[0] if hasattr(val_dst, "shape") else 0
    params = TopkParams(int32(n, "topk", "n"), k)
    return core_of("topk").issue(TOPK, (val_dst, idx_dst), (src,), params, name)


def _check_partition_reduce(c):
    op = c.params.op
    c.tensors("data")
    sbuf_only(c, "dst", "data")
    allowed = ("add", "average", "maximum", "bitwise_or", "bitwise_and")
    one_of(c, op, allowed, "operator", "op", f"{op} does not reduce over partitions")
    c.require(
        c["dst"].p == 1,
        "partition-match",
        "the result is one partition",
        "dst",
        value=c["dst"].p,
        limit=1,
    )
    c.same_elements("data", "dst")
    if op.startswith("bitwise"):
        integers(c, op, "dst", "data")
    return "gpsimd"


def _run_partition_reduce(core, payload, writes, reads, params):
    dst, data = writes[0], reads[0]
    if params.op.startswith("bitwise"):
        store_bits(dst.array(), semantics.tensor_partition_reduce(data.array(), params.op))
    else:
        save(core, dst, semantics.tensor_partition_reduce(load(data), params.op))


PARTITION_REDUCE = Spec(
    "tensor_partition_reduce",
    ("dst",),
    ("data",),
    _check_partition_reduce,
    _run_partition_reduce,
    timing(GpSimd.ACROSS),
)


@instruction
def tensor_partition_reduce(dst, op, data, name=None):
    """dst = reduction of data over its partitions."""
    params = PartitionReduceParams(op_name(op, "tensor_partition_reduce", "op"))
    return core_of("tensor_partition_reduce").issue(PARTITION_REDUCE, (dst,), (data,), params, name)
