"""`nsa_attention` on a NeuronCore: one kernel where it can, else a kernel for each part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nsa_neuron.backends.neuron import plans
from nsa_neuron.backends.neuron.launch import nsa_attention as fused
from nsa_neuron.backends.neuron.limits import MOST_INSTRUCTIONS
from nsa_neuron.registry import Unsupported

if TYPE_CHECKING:
    from nsa_neuron.spec import Bound

FUSED = "nsa_attention"
GROUPS = (1, 2, 4, 8, 16)
"""Heads of a group: with 32 queries 32 to 512 rows, what TensorE takes at once."""

MOST_WINDOW = 4096
SHORT_WINDOW = 512
LOOPED_BLOCKS = 16_384
"""Window, and selection blocks (1M tokens) whose scores fit into SBUF in hardware loops, beside a
short window; beside a longer one, half as many."""

MOST_TAKEN = 32
"""Selected blocks of a query; a list for 32 queries has 48 places."""

LOOPED_INSTRUCTIONS = 16_000
"""Of the looped kernel for a kv head, at most, beside its first tiles, whatever the length
(`tests/neuron/test_neuron_programs.py` counts them)."""


@dataclass(frozen=True)
class Whole:
    """The plan of a call.

    Attributes:
        parts: the plan of each part.
        apart: why the parts run as kernels of their own; None: one kernel does it all.
    """

    parts: dict[str, Any]
    apart: Unsupported | None

    @property
    def mode(self) -> str:
        """`hw` or `sim`, the same for every part."""
        mode: str = next(iter(self.parts.values()))
        return mode


def hindrance(bound: Bound, mode: str, cores: int) -> Unsupported | None:
    """Why one kernel cannot do a call on so many cores a launch."""
    if bound.dtype != torch.bfloat16:
        return Unsupported("dtype", f"{bound.dtype} is not bfloat16")
    if bound.packed:
        return Unsupported("packed", "positions of packed queries are data")
    if (bound["d"], bound["m"]) != (16, 64):
        return Unsupported("geometry", f"d, m = {bound['d']}, {bound['m']} are not 16, 64")
    if bound.group not in GROUPS:
        return Unsupported("group", f"Hq / Hkv = {bound.group} is not one of {GROUPS}")
    if bound["Dk"] > 192 or bound["Dv"] > 128:
        return Unsupported("head_dim", f"Dk, Dv = {bound['Dk']}, {bound['Dv']} > 192, 128")
    return _selection(bound) or _program(bound, mode, cores)


def _selection(bound: Bound) -> Unsupported | None:
    forced = (bound.scalars["num_initial"], bound.scalars["num_local"])
    if min(forced) < 1:
        return Unsupported("forced", f"num_initial, num_local = {forced} are not both above 0")
    if bound["n"] > MOST_TAKEN:
        return Unsupported("selected", f"n = {bound['n']} > {MOST_TAKEN}")
    if bound["w"] > MOST_WINDOW:
        return Unsupported("window", f"w = {bound['w']} > {MOST_WINDOW}")
    longest = fused.MOST_TOKENS
    if loop_of(bound):
        longest = LOOPED_BLOCKS * bound["m"] // (1 if bound["w"] <= SHORT_WINDOW else 2)
    if bound["T"] > longest:
        return Unsupported("length", f"{bound['T']} tokens > {longest}")
    return None


def _program(bound: Bound, mode: str, cores: int) -> Unsupported | None:
    """The simulator takes any program, in time."""
    lanes = math.ceil(bound["B"] * bound["Hkv"] / cores)
    count = instructions(bound, lanes)
    if mode == "sim" or count <= MOST_INSTRUCTIONS:
        return None
    reason = (
        f"its program has about {count:,} instructions > {MOST_INSTRUCTIONS:,}, what AWS's "
        "compiler takes"
    )
    return Unsupported("program", reason)


def loop_of(bound: Bound) -> fused.Loop | None:
    """The kernel's hardware loop over queries, if it is not unrolled."""
    forced = (bound.scalars["num_initial"], bound.scalars["num_local"])
    sizes = (bound["B"] * bound["Hkv"], bound["S"], bound["T"])
    plan = plans.load(FUSED)
    return fused.loop_of(plan, sizes, bound["l"], bound["n"], forced, bound["w"])


def instructions(bound: Bound, lanes: int) -> int:
    """About how many the kernel has for so many kv heads of batch rows."""
    loop = loop_of(bound)
    if loop is None:
        return fused.instructions(lanes, bound["S"], bound["T"], bound["w"])
    first = fused.TOKENS * loop.begin  # tiles before it are unrolled
    unrolled = max(0, first - bound["T"] + bound["S"])
    return lanes * LOOPED_INSTRUCTIONS + fused.instructions(lanes, unrolled, first, bound["w"])
