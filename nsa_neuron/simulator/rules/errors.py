"""Errors of the simulator: every refusal names its rule, operand, value, limit and kernel line."""

from __future__ import annotations

import linecache
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Location:
    """A line of a user's file.

    Attributes:
        filename: path of the file as Python knows it.
        lineno: line number, from 1.
        function: name of the function the line belongs to.
    """

    filename: str
    lineno: int
    function: str

    @property
    def text(self) -> str:
        """The source line, stripped; empty where the source is not available."""
        return linecache.getline(self.filename, self.lineno).strip()

    def __str__(self) -> str:
        return f"{self.filename}:{self.lineno} in {self.function}"


class SimulationError(Exception):
    """A kernel did what the device, the compiler or the NKI documents refuse.

    Attributes:
        rule: id in `table.RULES`.
        source: where the rule is documented.
        instruction: name of the instruction or view method, or None.
        operand: name of the offending operand, or None.
        value: what the kernel gave.
        limit: what is allowed.
        location: the kernel's own line, or None outside a kernel.
        hint: what to write instead, or "".
        table: one line per operand of the instruction (role, shape, dtype, buffer, placement).
    """

    def __init__(
        self,
        message: str,
        *,
        rule: str = "usage",
        source: str = "",
        instruction: str | None = None,
        operand: str | None = None,
        value: Any = None,
        limit: Any = None,
        location: Location | None = None,
        hint: str = "",
        table: tuple[str, ...] = (),
    ) -> None:
        self.message = message
        self.rule = rule
        self.source = source
        self.instruction = instruction
        self.operand = operand
        self.value = value
        self.limit = limit
        self.location = location
        self.hint = hint
        self.table = table
        super().__init__(self._render())

    def _render(self) -> str:
        where = ".".join(p for p in (self.instruction, self.operand) if p)
        lines = [f"{where}: {self.message}" if where else self.message]
        sides = (("got", self.value), ("allowed", self.limit))
        seen = ", ".join(f"{word} {side!r}" for word, side in sides if side is not None)
        if seen:
            lines.append(f"  {seen}")
        lines.extend(f"  {row}" for row in self.table)
        if self.hint:
            lines.append(f"  write instead: {self.hint}")
        lines.append(f"  rule {self.rule}" + (f" ({self.source})" if self.source else ""))
        if self.location is not None:
            lines.append(f"  at {self.location}")
            if self.location.text:
                lines.append(f"     {self.location.text}")
        return "\n".join(lines)


class SimulationWarning(UserWarning):
    """Something that a run lets pass and a device may not, or a later version of NKI will not."""


class UsageError(SimulationError, TypeError):
    """The call itself is wrong: argument kinds, unknown keyword, an API of another era."""


class ConstraintError(SimulationError, ValueError):
    """A documented limit of an instruction, operand or view is broken."""


class UninitializedReadError(SimulationError):
    """An element is read that nothing has written."""


class OutOfBoundsError(SimulationError, IndexError):
    """An access leaves its tensor."""


class CapacityError(SimulationError):
    """More SBUF, PSUM or HBM is live at once than the machine has."""


class DeadlockError(SimulationError):
    """The cores of a launch wait for each other for ever."""


class RaceError(SimulationError):
    """Two cores touch the same shared HBM without synchronising, and one of them writes."""


class DataUnavailableError(SimulationError):
    """A shape-only run met a decision that depends on data."""
