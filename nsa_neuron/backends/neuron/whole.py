"""`nsa_attention` on a NeuronCore: one kernel where it can, else a kernel for each part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nsa_neuron.backends.neuron.limits import MOST_INSTRUCTIONS
from nsa_neuron.registry import Unsupported

if TYPE_CHECKING:
    from nsa_neuron.spec import Bound

FUSED = "nsa_attention"
GROUPS = (1, 2, 4, 8, 16)
"""Heads of a group: with 32 queries 32 to 512 rows, what TensorE takes at once."""

MOST_WINDOW = 4096
MOST_BLOCKS = 4096
"""Window and selection blocks (256K tokens) whose keys and scores fit into SBUF."""

MOST_TAKEN = 32
"""Selected blocks of a query; a list for 32 queries has 48 places."""

QUERIES = 32  # of a tile

OF_LANE, OF_TILE, OF_KEYS = 3_500, 390, 19
"""Instructions of a kv head, of a tile of 32 queries, and of one against 128 keys."""


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
    if bound["T"] > MOST_BLOCKS * bound["m"]:
        return Unsupported("length", f"{bound['T']} tokens > {MOST_BLOCKS * bound['m']}")
    return None


def _program(bound: Bound, mode: str, cores: int) -> Unsupported | None:
    """The simulator takes any program, in time."""
    count = instructions(bound, cores)
    if mode == "sim" or count <= MOST_INSTRUCTIONS:
        return None
    reason = (
        f"its program has about {count:,} instructions > {MOST_INSTRUCTIONS:,}, what AWS's "
        "compiler takes"
    )
    return Unsupported("program", reason)


def instructions(bound: Bound, cores: int) -> int:
    """About how many instructions the kernel has on a core: it is unrolled over tiles of queries
    and of compressed keys (`tests/neuron/test_neuron_nsa_attention.py` counts them)."""
    tiles = bound["S"] / QUERIES + 1
    keys = (bound["T"] - bound["S"] / 2) / bound["d"] / 128  # tiles of them, on average
    near = bound["w"] / 128 + 1
    lanes = math.ceil(bound["B"] * bound["Hkv"] / cores)
    return int(lanes * (OF_LANE + tiles * (OF_TILE + OF_KEYS * (keys + near))))
