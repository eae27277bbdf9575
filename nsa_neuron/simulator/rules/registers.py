"""Virtual registers: run-time scalars of an engine's sequencer."""

from __future__ import annotations

import numbers
from typing import Any, NoReturn

from .session import current_session, violation


class VirtualRegister:
    """A 32-bit register; its value is known only while the kernel runs.

    Attributes:
        value: the number held, or None when never written (or unknown in a shape-only run).
        frozen: True for a loop's induction register, which the kernel must not write.
        loaded: the instruction that loaded the value from a tensor; what uses the register waits
            for it. None for immediates and loop indices.
    """

    __slots__ = ("frozen", "loaded", "value")

    def __init__(self, state: Any = None, frozen: bool = False) -> None:
        self.value = state
        self.frozen = frozen
        self.loaded: Any = None

    def __repr__(self) -> str:
        return f"VirtualRegister({self.value})"

    def read(self) -> int:
        """The value, as an index or bound.

        Raises:
            SimulationError: nothing was ever written to the register.
        """
        if self.value is None:
            session = current_session()
            if session is not None and not session.data:
                return session.unknown_register(self)
            raise violation("register", "the register is read before anything was loaded into it")
        return int(self.value)

    def write(self, value: Any) -> None:
        """Set the value; refused for the register of a loop."""
        if self.frozen:
            raise violation("register", "the induction register of a loop cannot be written")
        self.value = value

    def __bool__(self) -> bool:
        return self.read() != 0

    def _refuse(self, *_: Any) -> NoReturn:
        raise violation(
            "register",
            "a register has no value while the kernel is built: no Python arithmetic, comparison, "
            "int() or range() on it",
            hint="compute in SBUF and register_load the result; index with .ap(scalar_offset=reg); "
            "loop with nl.fori_loop or nl.dynamic_range",
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __index__ = __int__ = __neg__ = _refuse

    def __eq__(self, other: object) -> bool:
        if isinstance(other, VirtualRegister | numbers.Number):
            self._refuse()
        return NotImplemented

    __hash__ = object.__hash__


def scalar(value: Any) -> int:
    """An int or the value of a register."""
    return value.read() if isinstance(value, VirtualRegister) else int(value)
