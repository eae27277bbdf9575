"""Values of registers that data would set, for runs without data; each says what it assumed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..rules.registers import RunTimeScalar


class TraceExhaustedError(LookupError):
    """The kernel asks for more trip counts than the trace holds."""


@dataclass
class TripCounts:
    """Answers `simulate(..., data=False, unknown=...)` and keeps what it answered.

    Attributes:
        source: where the values come from, for the report.
        answers: values given so far.
    """

    source: str
    next_value: Callable[[int], int]
    answers: list[int] = field(default_factory=list)

    def __call__(self, register: RunTimeScalar) -> int:
        """The value of the next register that the run asks for."""
        value = self.next_value(len(self.answers))
        self.answers.append(value)
        return value

    def describe(self) -> str:
        """The sentence a report repeats."""
        n = len(self.answers)
        if not n:
            return f"no register depended on data (trip counts given: {self.source})"
        mean = sum(self.answers) / n
        return (
            f"{n} registers that data would set were taken from {self.source}: "
            f"mean {mean:.3g}, {min(self.answers)} to {max(self.answers)}"
        )


def constant(value: int) -> TripCounts:
    """The same value every time."""
    return TripCounts(f"the constant {value}", lambda k: value)


def trace(values: Sequence[int]) -> TripCounts:
    """Values in the order the kernel asks for them; asking for more is an error.

    Raises:
        TraceExhaustedError: from the run, where the trace is too short.
    """

    def at(k: int) -> int:
        if k >= len(values):
            raise TraceExhaustedError(
                f"the trace holds {len(values)} trip counts; the kernel asks for more"
            )
        return int(values[k])

    return TripCounts(f"a trace of {len(values)}", at)


def drawn(values: Sequence[int], seed: int = 0) -> TripCounts:
    """Values drawn at random from a sample, with replacement; repeatable."""
    if not values:
        raise ValueError("a distribution needs at least one value")
    generator = random.Random(seed)
    return TripCounts(
        f"a distribution of {len(values)} values (seed {seed})",
        lambda k: int(generator.choice(values)),
    )


def parse(text: str) -> TripCounts:
    """`8`, a trace `3,5,4`, or a distribution `draw:3,5,4`.

    Raises:
        ValueError: what can be written.
    """
    kind, _, rest = text.rpartition(":")
    try:
        values = [int(v) for v in rest.split(",")]
    except ValueError:
        values = []
    if not values or kind not in ("", "draw"):
        raise ValueError(f"trip counts {text!r}: write 8, a trace 3,5,4 or draw:3,5,4")
    if min(values) < 0:
        raise ValueError(f"trip counts {text!r}: {min(values)} is less than none")
    if kind == "draw":
        return drawn(values)
    return constant(values[0]) if len(values) == 1 else trace(values)
