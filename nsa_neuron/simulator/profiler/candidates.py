"""What a rule of advice proposes.

A rule looks at the instructions of each source line and yields candidates: what to say, how the
program would change, and an upper bound of what that saves (time of the lane, never the gain).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .what_if import Baseline, Change

FEW = 4  # instructions of a line below which batching is no subject


@dataclass(frozen=True)
class Candidate:
    """A change to try.

    Attributes:
        rule: name.
        indices: instructions it is about.
        message: what is slow and what to write instead.
        change: for the what-if schedule.
        bound: ns it can save at most.
        remains: ns that the change cannot save though the what-if does.
    """

    rule: str
    indices: list[int]
    message: str
    change: Change
    bound: float
    remains: float = 0.0


Rule = Callable[[Baseline], Iterator[Candidate]]


def spell(values: set[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
