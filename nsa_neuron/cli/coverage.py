"""Which targets have a kernel for which op: their verdicts on a typical call, nothing is run.

The table of the README is `markdown(covered())`, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nsa_neuron.cli import shared
from nsa_neuron.conformance.targets import Place, find_targets
from nsa_neuron.ops import OPS, get
from nsa_neuron.registry import BUILT_IN, REGISTRY, Supported, Unsupported

if TYPE_CHECKING:
    from nsa_neuron.registry import Verdict
    from nsa_neuron.spec import OpSpec

HARDWARE = "hw"
MARK = "<!-- nsa backends --markdown -->"
"""Stands before and behind the table in the README."""
TITLES = {
    "cuda:sim": "cuda:sim (Triton, interpreted)",
    "cuda:hw": "cuda:hw (H200)",
    "neuron:sim": "neuron:sim (NKI, simulated)",
    "neuron:hw": "neuron:hw (Trainium2)",
}


@dataclass(frozen=True)
class Covered:
    """What a target says to an op's typical call in bfloat16, forward and backward.

    Attributes:
        op: a public op.
        forward: the verdict.
        backward: of its backward op; None: not differentiable.
    """

    op: str
    forward: Verdict
    backward: Verdict | None

    def text(self) -> str:
        """`fwd, bwd`, `fwd`, or the rule that refuses."""
        if isinstance(self.forward, Unsupported):
            return "no kernel" if self.forward.rule == "kernel" else f"no: {self.forward.rule}"
        return "fwd, bwd" if isinstance(self.backward, Supported) else "fwd"


def covered(places: Sequence[Place]) -> dict[str, list[Covered]]:
    """Every public op on every target, by target."""
    return {
        str(place.target): [_covered(spec, place) for spec in public()]
        for place in places
        if place.target.mode != "?"
    }


def public() -> list[OpSpec]:
    """The ops that people call: neither backward ops nor what autograd runs in place of one."""
    inner = {spec.backward for spec in OPS} | {f"{spec.name}_forward" for spec in OPS}
    return [spec for spec in OPS if spec.name not in inner]


def _covered(spec: OpSpec, place: Place) -> Covered:
    backward = _ask(get(spec.backward), place) if spec.backward else None
    return Covered(spec.name, _ask(spec, place), backward)


def _ask(spec: OpSpec, place: Place) -> Verdict:
    bound = shared.on_device(shared.bind(spec, {}, {}, torch.bfloat16), place.device)
    return REGISTRY.get(place.target.backend).supports(bound, place.target.mode)


def rows(cover: Mapping[str, Sequence[Covered]]) -> list[list[str]]:
    """A row per op: its name and a cell per target."""
    columns = [[each.text() for each in column] for column in cover.values()]
    return [
        [spec.name, *cells]
        for spec, cells in zip(public(), zip(*columns, strict=True), strict=True)
    ]


def markdown() -> str:
    """The README's table: this project's backends; what has not run on hardware says so."""
    # By name: a backend may put first whichever of its modes can run here.
    order = [*BUILT_IN]
    places = sorted(
        find_targets(order), key=lambda p: (order.index(p.target.backend), p.target.mode)
    )
    cover = covered(places)
    lines = ["| | " + " | ".join(TITLES.get(name, name) for name in cover) + " |"]
    lines.append("|---" * (len(cover) + 1) + "|")
    hardware = [name.endswith(f":{HARDWARE}") for name in cover]
    for op, *cells in rows(cover):
        shown = [
            (cell if not on_hardware else "not run" if cell.startswith("fwd") else "no path yet")
            for on_hardware, cell in zip(hardware, cells, strict=True)
        ]
        lines.append(f"| `{op}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def rewrite(text: str) -> str:
    """A page with the table between its two marks as it is now."""
    before, _, after = text.partition(f"{MARK}\n")
    _, _, after = after.partition(MARK)
    return f"{before}{MARK}\n{markdown()}\n{MARK}{after}"
