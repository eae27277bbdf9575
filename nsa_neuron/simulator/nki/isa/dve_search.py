"""Vector Engine: search in a partition, and shuffles between partitions of a quadrant."""

from collections import namedtuple

import numpy as np

from ...issue.spec import Spec
from ...issue.timing import Vector, timing
from ...machine.dtypes import store_bits, uint16, uint32
from ...rules.session import violation
from ...semantics import search
from ..binding import core_of, instruction, load, save
from .shared import elements, on_chip, same_dtype, same_tiles

ReplaceParams = namedtuple("ReplaceParams", "imm")
ShuffleParams = namedtuple("ShuffleParams", "shuffle_mask")


def _searched(c, role):
    """8 to 16,384 elements per partition."""
    low, high = c.machine.search_free
    n = c[role].n
    c.require(
        low <= n <= high,
        "tile-size",
        f"has {n} elements per partition",
        role,
        value=n,
        limit=(low, high),
    )


def _check_max8(c):
    c.tensors("src")
    on_chip(c, "dst", "src")
    c.same_partitions("dst", "src")
    _searched(c, "src")
    elements(c, "dst", 8)
    return "vector"


def _run_max8(core, payload, writes, reads, params):
    save(core, writes[0], search.max8(load(reads[0])))


MAX8 = Spec("max8", ("dst",), ("src",), _check_max8, _run_max8, timing(Vector.STREAM))


@instruction
def max8(dst, src, name=None):
    """dst = the 8 largest elements of each partition, descending."""
    return core_of("max8").issue(MAX8, (dst,), (src,), (), name)


def _check_find(c):
    c.tensors("data", "vals")
    on_chip(c, "dst", "data", "vals")
    c.same_partitions("dst", "data", "vals")
    _searched(c, "data")
    elements(c, "vals", 8)
    elements(c, "dst", 8)
    c.dtypes("dst", (uint16, uint32))
    return "vector"


def _run_find(core, payload, writes, reads, params):
    data, vals = reads
    store_bits(writes[0].array(), search.nc_find_index8(load(data), load(vals)))


FIND_INDEX8 = Spec(
    "nc_find_index8", ("dst",), ("data", "vals"), _check_find, _run_find, timing(Vector.STREAM)
)


@instruction
def nc_find_index8(dst, data, vals, name=None):
    """dst = index in data of each of 8 values per partition; all ones where there is none."""
    return core_of("nc_find_index8").issue(FIND_INDEX8, (dst,), (data, vals), (), name)


def _check_replace(c):
    c.tensors("data", "vals")
    same_tiles(c, "dst", "data")
    on_chip(c, "vals", "dst_idx")
    c.same_partitions("dst", "vals", "dst_idx")
    _searched(c, "data")
    elements(c, "vals", 8)
    if c["dst_idx"]:
        elements(c, "dst_idx", 8)
        c.dtypes("dst_idx", (uint16, uint32))
    return "vector"


def _run_replace(core, payload, writes, reads, params):
    dst, indices = writes
    data, vals = reads
    values, index = search.nc_match_replace8(load(data), load(vals), params.imm)
    save(core, dst, values)
    if indices is not None:
        store_bits(indices.array(), index)


MATCH_REPLACE8 = Spec(
    "nc_match_replace8",
    ("dst", "dst_idx"),
    ("data", "vals"),
    _check_replace,
    _run_replace,
    timing(Vector.STREAM),
    optional=("dst_idx",),
)


@instruction
def nc_match_replace8(dst, data, vals, imm, dst_idx=None, name=None):
    """dst = data with one match of each of 8 values replaced by imm; optionally their indices."""
    params = ReplaceParams(_number(imm, "nc_match_replace8", "imm"))
    return core_of("nc_match_replace8").issue(
        MATCH_REPLACE8, (dst, dst_idx), (data, vals), params, name
    )


def _number(value, what, role):
    if not hasattr(value, "__float__") or isinstance(value, np.ndarray):
        raise violation(
            "usage",
            "must be a compile-time number",
            instruction=what,
            operand=role,
            value=value,
            limit="float",
        )
    return float(value)


def _check_shuffle(c):
    mask = c.params.shuffle_mask
    c.tensors("src")
    dst, src = c["dst"], c["src"]
    on_chip(c, "dst", "src")
    same_dtype(c, "dst", "src")
    c.same_elements("dst", "src")
    c.require(
        len(mask) == 32 and all(0 <= m < 32 or m == search.KEEP for m in mask),
        "value",
        "is 32 partitions of a quadrant, or 255",
        "shuffle_mask",
        value=mask,
        limit="32 of 0..31, 255",
    )
    active = -(-max(dst.p, src.p) // 32) * 32
    allowed = {32: (0, 32, 64, 96), 64: (0, 64)}.get(active, (0,))
    for o in (dst, src):
        c.require(
            o.p0 in allowed,
            "start-partition",
            f"{active} active partitions cannot start at {o.p0}",
            o.role,
            value=o.p0,
            limit=allowed,
        )
    target = np.arange(dst.p)
    entry = np.asarray(mask)[target % 32]
    source = (target - target % 32 + entry)[entry != search.KEEP]
    c.require(
        source.size == 0 or int(source.max()) < src.p,
        "bounds",
        "the mask reads a partition that src does not have",
        "shuffle_mask",
        value=int(source.max()) if source.size else None,
        limit=src.p - 1,
    )
    return "vector", entry != search.KEEP


def _run_shuffle(core, moved, writes, reads, params):
    (dst,), (src, _) = writes, reads
    save(core, dst, search.nc_stream_shuffle(dst.array(), src.array(), params.shuffle_mask))
    core.mark_masked(dst, np.repeat(moved, dst.size // dst.shape[0]))


STREAM_SHUFFLE = Spec(
    "nc_stream_shuffle",
    ("dst",),
    ("src", "dst"),
    _check_shuffle,
    _run_shuffle,
    timing(Vector.STREAM),
    keeps=True,
)


@instruction
def nc_stream_shuffle(dst, src, shuffle_mask, name=None):
    """dst partition i of each quadrant = src partition shuffle_mask[i]; 255 keeps dst."""
    params = ShuffleParams(tuple(int(m) for m in shuffle_mask))
    return core_of("nc_stream_shuffle").issue(STREAM_SHUFFLE, (dst,), (src, dst), params, name)
