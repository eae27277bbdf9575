"""What `tune.py` measures: the entries of `tune_candidates.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DESIGNS = ("by_query", "by_block")
"""Designs of selected attention; `by_overlap` chooses between them."""


@dataclass(frozen=True)
class Unit:
    """A kernel to tune, and how: `direction` is `fwd`, `bwd` or `eager` (decode).

    rho: topics of its inputs, where it is not the run's.
    """

    stage: str
    direction: str
    op: str
    kernel: str
    candidates: tuple[dict[str, Any], ...]
    rho: float | None = None

    @staticmethod
    def of(data: dict[str, Any]) -> Unit:
        return Unit(data["stage"], data["pass"], data["op"], data["kernel"], tuple(data["try"]))


@dataclass(frozen=True)
class Crossover:
    """A pass whose designs are compared: `kernel` is the one that walks the union in it."""

    stage: str
    direction: str
    op: str
    kernel: str

    def units(self, rhos: tuple[float, float]) -> list[Unit]:
        """What is measured, at inputs of either kind."""
        designs = tuple({"strategy": design} for design in DESIGNS)
        names = (self.stage, self.direction, self.op, "dispatch")
        return [Unit(*names, designs, rho) for rho in rhos]
