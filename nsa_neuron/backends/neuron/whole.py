"""`nsa_attention` on a NeuronCore: one kernel where it can, else a kernel for each part."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_neuron.registry import Unsupported

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nsa_neuron.registry import Lowered
    from nsa_neuron.spec import Bound

log = logging.getLogger("nsa_neuron")

FUSED = "nsa_attention"
GROUPS = (1, 2, 4, 8, 16)
"""Heads of a group: with 32 queries 32 to 512 rows, what TensorE takes at once."""

MOST_WINDOW = 4096
MOST_BLOCKS = 4096
"""Window and selection blocks (256K tokens) whose keys and scores fit into SBUF."""

MOST_TAKEN = 32
"""Selected blocks of a query; a list for 32 queries has 48 places."""

QUERIES = 32  # of a tile


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


def hindrance(bound: Bound, mode: str) -> Unsupported | None:
    """Why one kernel cannot do a call, or need not."""
    if mode != "sim":
        return Unsupported("host", "the host decides which tiles are done again")
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
    return _selection(bound)


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


def with_parts(fused: Lowered, parts: Lowered) -> Lowered:
    """One kernel; tiles in which a row's logits or the union ask for more, again by the parts."""

    def call(**values: Any) -> Any:
        o, redo = fused(**values)
        for lane, first, end in runs(redo.bool()):
            again(o, parts, values, lane, (first, end))
        return o

    return call


def runs(marks: Tensor) -> list[tuple[int, int, int]]:
    """(row, first column, last + 1) of neighbouring marks in bool [rows, columns]."""
    edges = torch.nn.functional.pad(marks.int(), (1, 1)).diff()
    starts, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    return [(row, first, end) for (row, first), (_, end) in zip(starts, ends, strict=True)]


def again(
    o: Tensor, parts: Lowered, values: Mapping[str, Any], lane: int, tiles: tuple[int, int]
) -> None:
    """Overwrites some tiles of a kv head by what the parts make of the tokens up to their last."""
    q, tokens = values["q"], values["k_slc"].shape[1]
    b, head = divmod(lane, values["k_slc"].shape[2])
    group, past = q.shape[2] // values["k_slc"].shape[2], tokens - q.shape[1]
    first, end = (max(0, QUERIES * n - past % QUERIES) for n in tiles)
    end = min(end, q.shape[1])
    kept = past + end
    log.info("nsa_attention: queries %d to %d of kv head %d by parts", first, end - 1, head)
    given = dict(values)
    of_group = slice(head * group, (head + 1) * group)
    for name in ("q", "gates"):
        given[name] = values[name][b : b + 1, first:end, of_group]
    for name in ("k_slc", "v_slc", "k_win", "v_win"):
        given[name] = values[name][b : b + 1, :kept, head : head + 1]
    for name in ("k_cmp", "v_cmp"):
        count = max(0, (kept - values["block"]) // values["stride"] + 1)
        given[name] = values[name][b : b + 1, :count, head : head + 1]
    o[b, first:end, of_group] = parts(**given)[0]
