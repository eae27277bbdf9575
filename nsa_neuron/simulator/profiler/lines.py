"""Kernel source lines of instructions, and how a stall is put in words."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cost import Cause
from ..rules.session import locate

if TYPE_CHECKING:
    from types import CodeType

    from ..cost import Timeline
    from ..issue.record import Instruction
    from ..rules.errors import Location

Key = tuple[str, int]

PHRASES = {
    Cause.LANE: "its turn",
    Cause.RAW: "data from",
    Cause.WAR: "buffer still read by",
    Cause.WAW: "buffer still written by",
    Cause.SPACE: "room held by",
    Cause.EDGE: "ordered after",
    Cause.BANK: "PSUM bank used by",
    Cause.TRIGGER: "trigger behind",
}


class Lines:
    """Source lines, looked up once per place in the bytecode."""

    def __init__(self) -> None:
        self._known: dict[tuple[CodeType, int] | None, Location | None] = {}

    def location(self, instruction: Instruction) -> Location | None:
        """The kernel line that issued an instruction."""
        site = instruction.site
        if site not in self._known:
            self._known[site] = locate(site)
        return self._known[site]

    def key(self, instruction: Instruction) -> Key:
        """File and line, ("", 0) where unknown."""
        where = self.location(instruction)
        return (where.filename, where.lineno) if where else ("", 0)

    def short(self, instruction: Instruction) -> str:
        """`file.py:12`."""
        return short(self.key(instruction))

    def describe(self, instruction: Instruction) -> dict[str, Any]:
        """File, line, function and text."""
        where = self.location(instruction)
        if where is None:
            return {"file": "", "line": 0, "function": "", "text": ""}
        return {
            "file": where.filename,
            "line": where.lineno,
            "function": where.function,
            "text": where.text,
        }


@cache
def short(key: Key) -> str:
    """`file.py:12`."""
    return f"{Path(key[0]).name}:{key[1]}" if key[0] else "unknown line"


def lane_of(t: Timeline, index: int) -> str:
    """Name of an instruction's lane, such as "vector" or "dma-load"."""
    return t.lanes[int(t.lane[index])]


def in_words(t: Timeline, lines: Lines, index: int) -> str:
    """What an instruction waited for: "data from dma-load dma_copy at k.py:12"."""
    cause = Cause(int(t.cause[index]))
    blocker = int(t.blocker[index])
    if blocker < 0:
        return "activation table" if cause is Cause.LANE else PHRASES[cause]
    other = t.instructions[blocker]
    return f"{PHRASES[cause]} {lane_of(t, blocker)} {other.opcode} at {lines.short(other)}"
