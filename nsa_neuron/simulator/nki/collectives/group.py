"""Replica groups, and the exchange of tensors among the members of one."""

from dataclasses import dataclass
from typing import Any

from ...issue.spec import Spec
from ...issue.timing import Dma, timing
from ...memory.tensor import NKIObject, NkiTensor
from ...rules.session import violation


@dataclass
class ReplicaGroup(NKIObject):
    """Groups of ranks that take part in a collective; groups do not overlap.

    Attributes:
        groups: lists of ranks.
    """

    groups: list


def refuse(name, message, operand="", **details):
    """The error of rule "collective"."""
    return violation(
        "collective", message, instruction=f"ncc.{name}", operand=operand or None, **details
    )


def ring_of(core, replica_group, name):
    """(ranks of this rank's group in order, this rank's place in it).

    Raises:
        SimulationError: rule "collective".
    """
    lists = getattr(replica_group, "groups", None)
    if lists is None:
        raise refuse(
            name, "must be a ReplicaGroup", "replica_group", value=type(replica_group).__name__
        )
    lists = [tuple(int(r) for r in ranks) for ranks in lists]
    every = [r for ranks in lists for r in ranks]
    world = core.launch.world
    if len(set(every)) != len(every):
        raise refuse(name, "ranks may not repeat", "replica_group", value=lists)
    outside = [r for r in every if not 0 <= r < world.ranks]
    if outside:
        raise refuse(
            name,
            f"names rank {outside[0]}, the run has {world.ranks}",
            "replica_group",
            value=lists,
            limit=f"0..{world.ranks - 1}",
            hint=f"nki.simulate(kernel, ranks={max(every) + 1}) of nsa_neuron.simulator",
        )
    rank = core.launch.rank
    for ranks in lists:
        if rank in ranks:
            return ranks, ranks.index(rank)
    raise refuse(name, f"rank {rank} is in no group", "replica_group", value=lists)


def tensors_of(name, role, value, count=None):
    """The tensors of a list argument.

    Raises:
        SimulationError: rule "collective": no list, not tensors, another number than `count`.
    """
    if not isinstance(value, list | tuple) or not value:
        raise refuse(name, "is a list of tensors", role, value=type(value).__name__)
    bad = [t for t in value if not isinstance(t, NkiTensor)]
    if bad:
        raise refuse(name, "is a list of tensors", role, value=type(bad[0]).__name__)
    if count is not None and len(value) != count:
        raise refuse(name, f"must hold {count} tensors", role, value=len(value), limit=count)
    return tuple(value)


def check_memory(name, srcs, dsts, sbuf):
    """All tensors in HBM, or, where `sbuf`, a single pair in SBUF; equal dtypes."""
    regions = {"hbm" if not t.on_chip else t.memory.allocation.buffer for t in (*srcs, *dsts)}
    allowed = [{"hbm"}, {"sbuf"}] if sbuf else [{"hbm"}]
    if regions not in allowed:
        raise refuse(
            name,
            "all tensors must be in HBM" + (", or all in SBUF" if sbuf else ""),
            "srcs",
            value=sorted(regions),
            limit=["hbm", "sbuf"] if sbuf else ["hbm"],
        )
    if regions == {"sbuf"} and len(srcs) > 1:
        raise refuse(name, "several tensors only in HBM", "srcs", value=len(srcs), limit=1)
    for src, dst in zip(srcs, dsts, strict=True):
        if src.dtype.name != dst.dtype.name:
            raise refuse(
                name, "has another dtype than its source", "dsts", value=dst.dtype, limit=src.dtype
            )


def members_of(core, ranks, tensors):
    """Threads that meet: both cores of every rank where shared HBM takes part, else this core's.

    On two cores a collective on shared HBM is one operation of the logical core, so it also
    orders the two; one on SBUF is between the same core of each rank.
    """
    lnc = core.launch.lnc
    shared = any(t.memory.allocation.buffer == "shared_hbm" for t in tensors)
    cores = range(lnc) if shared else (core.index,)
    return tuple(rank * lnc + c for rank in sorted(ranks) for c in cores), shared


class Exchange:
    """Lets the ranks of a collective hand arrays to each other.

    Args:
        core: this core.
        name: of the function.
        ranks: who takes part.
        key: what tells concurrent collectives apart.
        tensors: all operands.
    """

    def __init__(self, core, name, ranks, key, tensors):
        self.core, self.name, self.ranks, self.key = core, name, ranks, (name, key)
        self.members, self.shared = members_of(core, ranks, tensors)

    def _meet(self, stage, payload):
        launch = self.core.launch
        me = launch.rank * launch.lnc + self.core.index
        if len(self.members) == 1:
            return {me: payload}
        received = launch.world.scheduler.meet(
            me, self.members, (*self.key, stage), payload, f"ncc.{self.name}"
        )
        if self.shared and launch.meeting is not None:
            launch.meeting.met()
        return received

    def swap(self, spec, reads):
        """Arrays of all ranks: {rank: [array of each tensor in `reads`]}, after all arrived."""
        self._meet("arrive", None)
        for tensor in reads:
            self.core.require_readable(tensor, spec)
        lnc = self.core.launch.lnc
        received = self._meet("swap", [t.array().copy() for t in reads])
        chosen = {}
        for member, arrays in received.items():
            rank, index = divmod(member, lnc)
            if index == self.core.index or rank not in chosen:
                chosen[rank] = arrays
        return chosen


_SPECS: dict[Any, Any] = {}


def _check(c):
    return "dma"


def _run(core, payload, writes, reads, params):
    exchange, compute, partial = core.state.pop("collective")
    compute(exchange.swap(spec_of(exchange.name, len(writes), len(reads)), reads), writes)
    for tensor in () if partial else writes:
        core.mark_written(tensor)


def spec_of(name, writes, reads):
    """The spec of a collective with so many tensors."""
    key = (name, writes, reads)
    if key not in _SPECS:
        outs = tuple(f"dsts[{i}]" for i in range(writes))
        ins = tuple(f"srcs[{i}]" for i in range(reads))
        _SPECS[key] = Spec(
            name,
            outs,
            ins,
            _check,
            _run,
            timing(Dma.COLLECTIVE),
            dma=True,
            marks_itself=True,
            checks_itself=True,
        )
    return _SPECS[key]


def issue(core, exchange, dsts, srcs, compute, params, name, partial=False):
    """Issue a collective.

    Args:
        core: this core.
        exchange: how the ranks meet.
        dsts, srcs: operands; only `srcs` are handed to the other ranks.
        compute: `compute(arrays by rank, dsts)` stores into the destinations.
        params: for the record.
        name: the kernel's `name=`.
        partial: `compute` marks what it wrote.
    """
    core.state["collective"] = (exchange, compute, partial)
    return core.issue(spec_of(exchange.name, len(dsts), len(srcs)), dsts, srcs, params, name)


def check_priority(name, priority):
    """`priority=` exists from NeuronCore-v4 on."""
    if priority is not None:
        raise violation(
            "generation",
            "exists from NeuronCore-v4 on",
            instruction=f"ncc.{name}",
            operand="priority",
            value=priority,
        )
