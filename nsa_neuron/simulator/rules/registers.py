"""Run-time scalars: virtual registers, and the `NkiScalar` of NKI 0.7."""

from __future__ import annotations

import numbers
from typing import Any, NoReturn

from .session import current_session, violation

_WIDTHS = {"int32": 32, "int64": 64}
_VALUELESS = "a run-time scalar has no value while the kernel is built"


class RunTimeScalar:
    """A number that is known only while the kernel runs.

    Attributes:
        value: the number held, or None when never written (or unknown in a shape-only run).
        loads: the instructions that loaded what the value depends on; what uses it waits for them.
            Empty for immediates and loop indices.
    """

    __slots__ = ("loads", "value")

    def __init__(self, value: Any, loads: tuple[Any, ...] = ()) -> None:
        self.value = value
        self.loads = loads

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

    def _no_value(self, *_: Any) -> NoReturn:
        raise violation(
            "register-value",
            f"{_VALUELESS}: no int(), range(), for, while or if on it",
            hint="loop with nl.fori_loop(0, n, body), or nl.while_loop(register, body); index "
            "with .ap(scalar_offset=n)",
        )

    __index__ = __int__ = __iter__ = _no_value


class VirtualRegister(RunTimeScalar):
    """A 32-bit register.

    Attributes:
        frozen: True for a loop's induction register, which the kernel must not write.
    """

    __slots__ = ("frozen",)

    def __init__(self, state: Any = None, frozen: bool = False) -> None:
        super().__init__(state)
        self.frozen = frozen

    def __repr__(self) -> str:
        return f"VirtualRegister({self.value})"

    def write(self, value: Any) -> None:
        """Set the value; refused for the register of a loop."""
        if self.frozen:
            raise violation("register", "the induction register of a loop cannot be written")
        self.value = value

    def __bool__(self) -> bool:
        session = current_session()
        if session is None or session.nki != "0.6":
            self._no_value()
        session.deprecated(
            "`while register`", "nl.while_loop(register, body); NKI 0.7 has removed it"
        )
        return self.read() != 0

    def _refuse(self, *_: Any) -> NoReturn:
        raise violation(
            "register",
            f"{_VALUELESS}: no Python arithmetic or comparison on a register",
            hint="compute in SBUF and register_load the result; index with "
            ".ap(scalar_offset=reg); from NKI 0.7 on nisa.scalar_load gives what has + - *",
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __neg__ = _refuse

    def __eq__(self, other: object) -> bool:
        if isinstance(other, RunTimeScalar | numbers.Number):
            self._refuse()
        return NotImplemented

    __hash__ = object.__hash__


class Comparison:
    """The result of comparing 32-bit scalars: it can be made, and not used."""

    __slots__ = ()

    def _unusable(self, *_: Any) -> NoReturn:
        raise violation(
            "scalar",
            "the result of comparing run-time scalars cannot be used",
            hint="compare in SBUF: nisa.tensor_scalar(dst, data, nl.less, bound)",
        )

    __bool__ = __index__ = __int__ = __and__ = __or__ = __invert__ = _unusable


class NkiScalar(RunTimeScalar):
    """One integer of fixed width, computed on the device; NKI 0.7.

    The other operand of +, - and * is a Python int or a scalar of the same dtype; the result is a
    new scalar of that dtype, and wraps.

    Attributes:
        dtype: "int32" or "int64".
    """

    __slots__ = ("dtype",)

    def __init__(self, state: Any, dtype: Any = "int32", loads: tuple[Any, ...] = ()) -> None:
        super().__init__(state, loads)
        self.dtype = dtype

    def __repr__(self) -> str:
        return f"NkiScalar({self.value}, {self.dtype})"

    def _combined(self, other: Any, sign: str, compute: Any) -> Any:
        if isinstance(other, bool) or not isinstance(other, int | NkiScalar):
            raise violation(
                "scalar",
                f"{sign} takes a Python int or another NkiScalar",
                value=type(other).__name__,
                limit=f"int, NkiScalar of {self.dtype}",
            )
        if isinstance(other, NkiScalar):
            if other.dtype != self.dtype:
                raise violation(
                    "scalar",
                    f"{sign} of {self.dtype} and {other.dtype}: dtypes must match",
                    value=str(other.dtype),
                    limit=str(self.dtype),
                    hint="load both from tensors of one dtype",
                )
            loads = tuple(dict.fromkeys((*self.loads, *other.loads)))
        else:
            bits = _WIDTHS[self.dtype]
            if not -(1 << bits - 1) <= other < 1 << bits - 1:
                raise violation("scalar", f"{other} does not fit {self.dtype}", value=other)
            loads = self.loads
        theirs = other.value if isinstance(other, NkiScalar) else other
        if self.value is None or theirs is None:
            return NkiScalar(None, self.dtype, loads)
        return NkiScalar(wrapped(compute(self.value, theirs), self.dtype), self.dtype, loads)

    def __add__(self, other: Any) -> Any:
        return self._combined(other, "+", lambda a, b: a + b)

    def __sub__(self, other: Any) -> Any:
        return self._combined(other, "-", lambda a, b: a - b)

    def __rsub__(self, other: Any) -> Any:
        return self._combined(other, "-", lambda a, b: b - a)

    def __mul__(self, other: Any) -> Any:
        return self._combined(other, "*", lambda a, b: a * b)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Any:
        return self._combined(0, "-", lambda a, b: b - a)

    def _compared(self, other: Any) -> Comparison:
        if self.dtype == "int64":
            raise violation(
                "scalar",
                "64-bit scalars have +, - and * only: no comparison",
                value=str(self.dtype),
                limit="int32",
            )
        self._combined(other, "a comparison", lambda a, b: 0)
        return Comparison()

    __lt__ = __le__ = __gt__ = __ge__ = _compared

    def __eq__(self, other: object) -> Any:
        return self._compared(other) if isinstance(other, int | NkiScalar) else NotImplemented

    def __ne__(self, other: object) -> Any:
        return self._compared(other) if isinstance(other, int | NkiScalar) else NotImplemented

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        self._no_value()

    def _undocumented(self, *_: Any) -> NoReturn:
        raise violation(
            "scalar",
            "the public pages give a scalar +, - and * only; whether it has this operation, they "
            "leave open",
            hint="compute in SBUF and nisa.scalar_load the result",
        )

    __floordiv__ = __rfloordiv__ = __truediv__ = __rtruediv__ = __mod__ = __rmod__ = _undocumented
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __pow__ = __rpow__ = _undocumented
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __invert__ = _undocumented
    __abs__ = _undocumented


def wrapped(value: int, dtype: str) -> int:
    """An integer as so many bits of two's complement hold it."""
    bits = _WIDTHS[dtype]
    half = 1 << bits - 1
    return (value + half) % (2 * half) - half


def scalar(value: Any) -> int:
    """An int or the value of a run-time scalar."""
    return value.read() if isinstance(value, RunTimeScalar) else int(value)
