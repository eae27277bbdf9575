"""What an instruction is, and what checking one leaves for the next of its kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..rules.errors import SimulationError
    from .timing import Formula, Timing


class Spec:
    """What an instruction is.

    Attributes:
        opcode: its `nisa` name.
        writes, reads: roles of the operands, in the order `issue` gets them.
        check: `check(c: checker.Checker) -> engine` or `-> (engine, payload)`; raises through `c`.
        run: `run(core, payload, writes, reads, params)`: the arithmetic and the store.
        timing: the cycle model's formula on each engine.
        dma: True where operands are not bound by partition rules.
        marks_itself: True where `run` notes what it wrote (masked or partial writes).
        optional: roles in `writes` that may be None.
        checks_itself: True where `run` looks for unwritten elements and races itself (indirect
            operands, whose record covers more than they touch) or has none (barriers).
        keeps: True where part of `dst`, which is then the last of `reads` too, may stay as it is,
            written or not; `run` marks what it wrote.
        wide: True where operands may have 64 bits: what moves elements and computes nothing.
        checked: how many of `reads` are looked through for unwritten elements (a slice's end).
    """

    __slots__ = (
        "check",
        "checked",
        "checks_itself",
        "dma",
        "marks_itself",
        "opcode",
        "optional",
        "reads",
        "run",
        "timing",
        "wide",
        "writes",
    )

    def __init__(
        self,
        opcode: str,
        writes: tuple[str, ...],
        reads: tuple[str, ...],
        check: Callable[[Any], Any],
        run: Callable[..., None],
        timing: Timing,
        dma: bool = False,
        marks_itself: bool = False,
        checks_itself: bool = False,
        optional: tuple[str, ...] = (),
        keeps: bool = False,
        wide: bool = False,
    ) -> None:
        self.opcode = opcode
        self.writes = writes
        self.reads = reads
        self.check = check
        self.run = run
        self.timing = timing
        self.dma = dma
        self.marks_itself = marks_itself or keeps
        self.checked = 0 if checks_itself else -1 if keeps else None
        self.checks_itself = checks_itself
        self.optional = optional
        self.wide = wide


class Plan:
    """The result of checking a signature.

    Attributes:
        engine: what executes it.
        formula: how long it takes there.
        accumulator: a result is read out of the engine's accumulator registers.
        timing: the spec's, for what another engine would take.
        doubtful: True where a rule is broken that is relaxed, or an operand leaves its tensor.
        payload: anything that `run` needs, worked out once.
        violations: broken rules that are relaxed.
        registers: how many operands are values of registers.
    """

    __slots__ = (
        "accumulator",
        "doubtful",
        "engine",
        "formula",
        "payload",
        "registers",
        "timing",
        "violations",
    )

    def __init__(
        self,
        engine: str,
        timing: Timing,
        formula: Formula,
        accumulator: bool,
        payload: Any,
        violations: list[SimulationError],
        registers: int,
        inside: bool,
    ) -> None:
        self.doubtful = bool(violations) or not inside
        self.engine = engine
        self.timing = timing
        self.formula = formula
        self.accumulator = accumulator
        self.payload = payload
        self.violations = violations
        self.registers = registers
