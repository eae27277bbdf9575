"""Every backend's modes: which can run here, and what hinders the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nsa_neuron.cli import shared
from nsa_neuron.conformance.targets import find_targets
from nsa_neuron.terminal import table

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    shared.add_json(parser)


def run(args: argparse.Namespace) -> int:
    places = find_targets()
    if args.json:
        rows = [
            {
                "backend": place.target.backend,
                "mode": place.target.mode,
                "available": not place.hindrance,
                "reason": place.hindrance,
                "device": place.device,
            }
            for place in places
        ]
        shared.print_json(rows)
        return 0
    lines = [[str(place.target), place.hindrance or "available", place.device] for place in places]
    styles = ["dim" if place.hindrance else "good" for place in places]
    print(table("", ["target", "here", "tensors on"], lines, styles))
    return 0
