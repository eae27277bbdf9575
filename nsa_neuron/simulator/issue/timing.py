"""Which formula of the cycle model an instruction follows, on each engine that can execute it.

Part of every `Spec`, without a default: an instruction whose time nobody has thought of cannot be
written. What a formula costs is said in `cost.instructions` and `cost.dma`; the names here say what
is known. "Unpublished" formulas are guesses, and a profile lists each that a run used.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class Tensor(Enum):
    """TensorE."""

    MULTIPLY = auto()
    TRANSPOSE = auto()


class Vector(Enum):
    """VectorE: cycles per element (SDK226's pages of the instructions; docs/trainium2.md 6.4)."""

    STREAM = auto()  # one
    ONE_INPUT = auto()  # one, a half or a quarter, by width, place and stride
    TWO_INPUTS = auto()  # one or a half
    FILL = auto()  # one or a half
    PREDICATED = auto()
    SCAN = auto()
    RECIPROCAL = auto()
    STATISTICS = auto()
    UNPUBLISHED = auto()
    COMPOSED = auto()  # an operation that no engine has, as a reciprocal and a multiply


class Scalar(Enum):
    """ScalarE."""

    STREAM = auto()
    FUNCTION = auto()  # likewise, with a function of an activation table


class GpSimd(Enum):
    """GpSimdE: little is published."""

    AFFINE = auto()
    ARITHMETIC = auto()
    ACROSS = auto()  # across partitions
    TOP_K = auto()
    UNPUBLISHED = auto()
    COMPOSED = auto()
    MESSAGE = auto()  # to the other core


class Sync(Enum):
    """A sequencer's own work."""

    REGISTER_LOAD = auto()
    REGISTER_STORE = auto()


class Dma(Enum):
    """DMA queues."""

    COPY = auto()
    TRANSPOSE = auto()
    COMPUTE = auto()
    MESSAGE = auto()  # to the other core
    COLLECTIVE = auto()  # between devices


class Meeting(Enum):
    """Both cores, on whichever engine was asked for."""

    BARRIER = auto()


Formula = Tensor | Vector | Scalar | GpSimd | Sync | Dma | Meeting

_ENGINES: dict[type[Enum], str] = {
    Tensor: "tensor",
    Vector: "vector",
    Scalar: "scalar",
    GpSimd: "gpsimd",
    Sync: "sync",
    Dma: "dma",
}
MESSAGES = frozenset({GpSimd.MESSAGE, Dma.MESSAGE})


@dataclass(frozen=True)
class Timing:
    """How long an instruction takes.

    Attributes:
        formulas: one for each engine that its check may choose.
        accumulator: its second result is read out of the engine's accumulator registers.
    """

    formulas: tuple[Formula, ...]
    accumulator: bool = False

    def on(self, engine: str) -> Formula:
        """The formula on an engine.

        Raises:
            LookupError: the timing says nothing of that engine.
        """
        for formula in self.formulas:
            if isinstance(formula, Meeting) or _ENGINES[type(formula)] == engine:
                return formula
        raise LookupError(f"no timing on {engine}, only {', '.join(map(str, self.formulas))}")


def timing(*formulas: Formula, accumulator: bool = False) -> Timing:
    """A timing: one formula for each engine that may execute the instruction."""
    return Timing(formulas, accumulator)
