"""Collectives of tensors with static shapes."""

import numpy as np

from ...issue.current import require_core
from ...machine.dtypes import load_f32
from ...rules.registers import RunTimeScalar, VirtualRegister
from ...semantics import alu
from ..binding import op_name, save
from .group import Exchange, check_memory, check_priority, issue, refuse, ring_of, tensors_of

_OPS = ("add", "minimum", "maximum")


def _operator(op, name):
    chosen = op_name(op, f"ncc.{name}", "op")
    if chosen not in _OPS:
        raise refuse(name, "reduces by add, minimum or maximum", "op", value=chosen, limit=_OPS)
    return chosen


def _reduced(op, arrays):
    """Fold arrays in rank order; floats in fp32, integers exactly."""
    if arrays[0].dtype.kind in "iu":
        wide = [a.astype(np.int64) for a in arrays]
    else:
        wide = [load_f32(a) for a in arrays]
    total = wide[0]
    for other in wide[1:]:
        total = alu.BINARY[op](total, other)
    return total.astype(arrays[0].dtype) if arrays[0].dtype.kind in "iu" else total


def _shape(name, dst, wanted):
    """Require the shape of a destination; in HBM, the element count."""
    fits = dst.shape == wanted if dst.on_chip else dst.size == int(np.prod(wanted))
    if not fits:
        raise refuse(name, "has the wrong shape", "dsts", value=dst.shape, limit=wanted)


def _dim(name, dim, srcs, gather=False):
    allowed = (0, 1) if gather and srcs[0].on_chip else (0,)
    if dim not in allowed:
        raise refuse(name, "cannot be that dim", "collective_dim", value=dim, limit=allowed)
    if srcs[0].on_chip and srcs[0].ndim != 2:
        raise refuse(name, "must be 2-D in SBUF", "srcs", value=srcs[0].shape)


def _divided(name, shape, count):
    if shape[0] % count:
        raise refuse(
            name,
            f"dim 0 does not divide by the {count} ranks of the group",
            "srcs",
            value=shape,
            limit=f"multiple of {count}",
        )
    return (shape[0] // count, *shape[1:])


def _start(name, srcs, dsts, replica_group, priority, sbuf=True):
    core = require_core(f"ncc.{name}")
    check_priority(name, priority)
    srcs = tensors_of(name, "srcs", srcs)
    dsts = tensors_of(name, "dsts", dsts, len(srcs))
    check_memory(name, srcs, dsts, sbuf)
    ring, place = ring_of(core, replica_group, name)
    return core, srcs, dsts, ring, place, Exchange(core, name, ring, ring, (*srcs, *dsts))


def all_reduce(srcs, dsts, replica_group, op, priority=None, name=None):
    """dst = op over the ranks of src."""
    core, srcs, dsts, ring, _, exchange = _start("all_reduce", srcs, dsts, replica_group, priority)
    chosen = _operator(op, "all_reduce")
    for src, dst in zip(srcs, dsts, strict=True):
        _shape("all_reduce", dst, src.shape)

    def compute(arrays, outs):
        for i, dst in enumerate(outs):
            values = _reduced(chosen, [arrays[r][i] for r in ring])
            save(core, dst, values.reshape(dst.shape))

    issue(core, exchange, dsts, srcs, compute, (chosen, ring), name)


def all_gather(srcs, dsts, replica_group, collective_dim, priority=None, name=None):
    """dst = the ranks' src, concatenated along a dim."""
    core, srcs, dsts, ring, _, exchange = _start("all_gather", srcs, dsts, replica_group, priority)
    _dim("all_gather", collective_dim, srcs, gather=True)
    for src, dst in zip(srcs, dsts, strict=True):
        wanted = list(src.shape)
        wanted[collective_dim] *= len(ring)
        _shape("all_gather", dst, tuple(wanted))

    def compute(arrays, outs):
        for i, dst in enumerate(outs):
            joined = np.concatenate([arrays[r][i] for r in ring], axis=collective_dim)
            save(core, dst, joined.reshape(dst.shape))

    issue(core, exchange, dsts, srcs, compute, (collective_dim, ring), name)


def reduce_scatter(srcs, dsts, replica_group, collective_dim, op, priority=None, name=None):
    """dst = this rank's part, along dim 0, of op over the ranks of src."""
    core, srcs, dsts, ring, place, exchange = _start(
        "reduce_scatter", srcs, dsts, replica_group, priority
    )
    chosen = _operator(op, "reduce_scatter")
    _dim("reduce_scatter", collective_dim, srcs)
    for src, dst in zip(srcs, dsts, strict=True):
        _shape("reduce_scatter", dst, _divided("reduce_scatter", src.shape, len(ring)))

    def compute(arrays, outs):
        for i, dst in enumerate(outs):
            parts = [np.split(arrays[r][i], len(ring))[place] for r in ring]
            save(core, dst, _reduced(chosen, parts).reshape(dst.shape))

    issue(core, exchange, dsts, srcs, compute, (chosen, collective_dim, ring), name)


def all_to_all(srcs, dsts, replica_group, collective_dim, priority=None, name=None):
    """Part k of dst, along dim 0, is this rank's part of rank k's src."""
    core, srcs, dsts, ring, place, exchange = _start(
        "all_to_all", srcs, dsts, replica_group, priority, sbuf=False
    )
    _dim("all_to_all", collective_dim, srcs)
    for src, dst in zip(srcs, dsts, strict=True):
        _divided("all_to_all", src.shape, len(ring))
        _shape("all_to_all", dst, src.shape)

    def compute(arrays, outs):
        for i, dst in enumerate(outs):
            parts = [np.split(arrays[r][i], len(ring))[place] for r in ring]
            save(core, dst, np.concatenate(parts).reshape(dst.shape))

    issue(core, exchange, dsts, srcs, compute, (collective_dim, ring), name)


def collective_permute(srcs, dsts, source_target_pairs, priority=None, name=None):
    """For each pair (source, target): target's dst = source's src."""
    core = require_core("ncc.collective_permute")
    check_priority("collective_permute", priority)
    srcs = tensors_of("collective_permute", "srcs", srcs, 1)
    dsts = tensors_of("collective_permute", "dsts", dsts, 1)
    check_memory("collective_permute", srcs, dsts, sbuf=False)
    _shape("collective_permute", dsts[0], srcs[0].shape)
    pairs = tuple((int(s), int(t)) for s, t in source_target_pairs)
    ranks, rank = core.launch.world.ranks, core.launch.rank
    for side in zip(*pairs, strict=True):
        if len(set(side)) != len(side) or not all(0 <= r < ranks for r in side):
            raise refuse(
                "collective_permute",
                "each rank is the source of at most one pair and the target of one",
                "source_target_pairs",
                value=pairs,
                limit=f"ranks 0..{ranks - 1}",
            )
    involved = sorted({r for pair in pairs for r in pair})
    if rank not in involved:
        return
    source = next((s for s, t in pairs if t == rank), None)
    exchange = Exchange(core, "collective_permute", involved, pairs, (*srcs, *dsts))

    def compute(arrays, outs):
        for dst in outs:
            save(core, dst, arrays[source][0].reshape(dst.shape))

    issue(core, exchange, dsts if source is not None else (), srcs, compute, (pairs,), name)


def _channels(name, core, lists, channel_ids, replica_group):
    """Tensors per channel of each list argument, flattened; the group; this rank's place."""
    ids = tuple(channel_ids)
    if ids != tuple(range(len(ids))) or not 1 <= len(ids) <= 4:
        raise refuse(
            name,
            "are 0, 1, ... of at most 4 channels",
            "channel_ids",
            value=ids,
            limit=(0, 1, 2, 3),
        )
    flat = []
    for role, value in lists.items():
        if not isinstance(value, list | tuple) or len(value) != len(ids):
            given = len(value) if isinstance(value, list | tuple) else type(value).__name__
            raise refuse(name, "holds one list per channel", role, value=given, limit=len(ids))
        flat.append(tuple(tensors_of(name, role, channel, 1)[0] for channel in value))
    ring, place = ring_of(core, replica_group, name)
    return flat, ring, place


def collective_permute_implicit(
    srcs_by_channel,
    dsts_by_channel,
    replica_group,
    channel_ids=[0],  # noqa: B006  (the documented default)
    priority=None,
    name=None,
):
    """Ring step: dst = src of the predecessor in the group."""
    title = "collective_permute_implicit"
    core = require_core(f"ncc.{title}")
    check_priority(title, priority)
    lists = {"srcs_by_channel": srcs_by_channel, "dsts_by_channel": dsts_by_channel}
    (srcs, dsts), ring, place = _channels(title, core, lists, channel_ids, replica_group)
    for src, dst in zip(srcs, dsts, strict=True):
        _shape(title, dst, src.shape)
    before = ring[place - 1]
    exchange = Exchange(core, title, ring, ring, (*srcs, *dsts))

    def compute(arrays, outs):
        for i, dst in enumerate(outs):
            save(core, dst, arrays[before][i].reshape(dst.shape))

    issue(core, exchange, dsts, srcs, compute, (ring, tuple(channel_ids)), name)


def collective_permute_implicit_reduce(
    srcs0_by_channel,
    srcs1_by_channel,
    dsts_by_channel,
    replica_group,
    op,
    channel_ids=[0],  # noqa: B006  (the documented default)
    priority=None,
    name=None,
):
    """Ring step: dst = op(src0, src1) of the predecessor in the group."""
    title = "collective_permute_implicit_reduce"
    core = require_core(f"ncc.{title}")
    check_priority(title, priority)
    chosen = _operator(op, title)
    lists = {
        "srcs0_by_channel": srcs0_by_channel,
        "srcs1_by_channel": srcs1_by_channel,
        "dsts_by_channel": dsts_by_channel,
    }
    (left, right, dsts), ring, place = _channels(title, core, lists, channel_ids, replica_group)
    for a, b, dst in zip(left, right, dsts, strict=True):
        _shape(title, dst, a.shape)
        _shape(title, dst, b.shape)
    before = ring[place - 1]
    exchange = Exchange(core, title, ring, ring, (*left, *right, *dsts))

    def compute(arrays, outs):
        for i, dst in enumerate(outs):
            pair = [arrays[before][i], arrays[before][len(outs) + i]]
            save(core, dst, _reduced(chosen, pair).reshape(dst.shape))

    params = (chosen, ring, tuple(channel_ids))
    issue(core, exchange, dsts, (*left, *right), compute, params, name)


def collective_permute_implicit_current_processing_rank_id(
    iteration_id, replica_group, channel_id=0, name=None
):
    """Register: rank whose data is here after `iteration_id` ring steps; itself at 0."""
    title = "collective_permute_implicit_current_processing_rank_id"
    core = require_core(f"ncc.{title}")
    ring, place = ring_of(core, replica_group, title)
    if isinstance(iteration_id, RunTimeScalar):
        iteration_id = iteration_id.read()
    return VirtualRegister(ring[(place - iteration_id) % len(ring)])


def rank_id(name=None):
    """Register: this rank."""
    return VirtualRegister(require_core("ncc.rank_id").launch.rank)
