"""Every backend's modes, what hinders them here, and which ops each has a kernel for.

An op's cell is the target's verdict on a typical call in bfloat16, whether or not it can run here;
nothing is run. `nsa conform` runs them, `nsa explain OP` tells verdicts on calls of other sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nsa_neuron.cli import coverage, shared
from nsa_neuron.conformance.targets import find_targets
from nsa_neuron.registry import REGISTRY, requested
from nsa_neuron.terminal import table

if TYPE_CHECKING:
    import argparse

    from nsa_neuron.conformance.targets import Place


def configure(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="the README's table of kernels")
    form.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    if args.markdown:
        print(coverage.markdown())
        return 0
    policy = requested() and str(REGISTRY.target(str(requested())))
    places = find_targets()
    cover = coverage.covered(places)
    if args.json:
        shared.print_json([_row(place, cover, policy) for place in places])
        return 0
    asked = f"by NSA_BACKEND={requested()}"
    lines = [
        [
            str(place.target), place.hindrance or "available", place.device,
            asked if str(place.target) == policy else "",
        ]
        for place in places
    ]  # fmt: skip
    styles = ["dim" if place.hindrance else "good" for place in places]
    print(table("", ["target", "here", "tensors on", "requested"], lines, styles))
    print()
    print(table("kernels", ["op", *cover], coverage.rows(cover)))
    return 0


def _row(
    place: Place, cover: dict[str, list[coverage.Covered]], policy: str | None
) -> dict[str, object]:
    name = str(place.target)
    return {
        "backend": place.target.backend,
        "mode": place.target.mode,
        "available": not place.hindrance,
        "reason": place.hindrance,
        "device": place.device,
        "requested": name == policy,
        "kernels": {each.op: each.text() for each in cover.get(name, [])},
    }
