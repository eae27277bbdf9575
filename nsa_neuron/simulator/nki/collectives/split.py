"""Collectives of run-time sizes in two parts (NKI 0.7): the sizes first, the transfer later."""

import numpy as np

from ...issue.spec import Spec
from ...issue.timing import Dma, timing
from ...rules.session import violate, violation
from ...rules.versions import require
from . import variable
from .group import refuse


def _check(c):
    return "dma"


def _run(core, payload, writes, reads, params):
    core.state["sizes"] = reads[0].array().copy()


_SPECS = {
    title: Spec(f"{title}_prepare", (), ("metadata_tensor",), _check, _run,
                timing(Dma.COLLECTIVE), dma=True)
    for title in ("all_to_all_v", "all_gather_v")
}  # fmt: skip


class _Slot:
    """The one collective of a core that is prepared and not yet triggered."""

    def __init__(self, title, instruction, prepared, metadata, flags, sizes):
        self.title, self.instruction, self.prepared = title, instruction, prepared
        self.metadata, self.flags, self.sizes = metadata, flags, sizes


def _prepare(title, srcs, dsts, group, metadata, flags, priority, name):
    what = f"{title}_prepare"
    require(f"ncc.{what}", what)
    prepared = variable.start(title, srcs, dsts, group, metadata, flags[1], priority)
    core, ring = prepared[0], prepared[3]
    if title == "all_gather_v":
        variable.four_of_two(core, ring, what)
    if core.state.get("prepared") is not None:
        raise refuse(
            what,
            f"{core.state['prepared'].title}_prepare has not been triggered yet: there is one slot",
            hint=f"ncc.{core.state['prepared'].title}_trigger(instruction) first",
        )
    instruction = core.issue(_SPECS[title], (), (metadata,), (ring, *flags), name)
    sizes = core.state.pop("sizes", None)
    core.state["prepared"] = _Slot(title, instruction, prepared, metadata, flags, sizes)
    core.unfinished = violation(
        "collective",
        "is never triggered",
        instruction=f"ncc.{what}",
        hint=f"ncc.{title}_trigger(instruction), exactly once",
    )
    return instruction


def _trigger(title, prepare_instr, name):
    what = f"{title}_trigger"
    require(f"ncc.{what}", what)
    core = variable.require_core(f"ncc.{what}")
    slot = core.state.get("prepared")
    if slot is None or slot.title != title or slot.instruction is not prepare_instr:
        waiting = "nothing" if slot is None else f"another {slot.title}_prepare"
        raise refuse(
            what,
            f"takes the instruction of the {title}_prepare that waits: {waiting} does",
            "prepare_instr",
            value=type(prepare_instr).__name__,
        )
    if slot.sizes is not None and not np.array_equal(slot.sizes, slot.metadata.array()):
        violate(
            "collective",
            "metadata_tensor changed after the prepare: which sizes hold, the public pages leave "
            "open",
            instruction=f"ncc.{what}",
            operand="prepare_instr",
        )
    core.state["prepared"] = core.unfinished = None
    select = variable.share if title == "all_gather_v" else variable.own
    known, displaced = slot.flags
    made = variable.collect(title, slot.prepared, slot.metadata, known, displaced, select, name)
    return made.depends_on(prepare_instr)


def all_to_all_v_prepare(
    srcs,
    dsts,
    replica_group,
    metadata_tensor,
    recv_counts_known=False,
    has_rdispls=False,
    priority=None,
    name=None,
):
    """Begin an all_to_all_v: reads the sizes, neither srcs nor dsts."""
    flags = (recv_counts_known, has_rdispls)
    return _prepare(
        "all_to_all_v", srcs, dsts, replica_group, metadata_tensor, flags, priority, name
    )


def all_to_all_v_trigger(prepare_instr, name=None):
    """Carry out the all_to_all_v that was prepared."""
    return _trigger("all_to_all_v", prepare_instr, name)


def all_gather_v_prepare(
    srcs,
    dsts,
    replica_group,
    metadata_tensor,
    recv_counts_known=False,
    has_rdispls=False,
    priority=None,
    name=None,
):
    """Begin an all_gather_v: reads the sizes, neither srcs nor dsts."""
    flags = (recv_counts_known, has_rdispls)
    return _prepare(
        "all_gather_v", srcs, dsts, replica_group, metadata_tensor, flags, priority, name
    )


def all_gather_v_trigger(prepare_instr, name=None):
    """Carry out the all_gather_v that was prepared."""
    return _trigger("all_gather_v", prepare_instr, name)
