"""The run a thread is in, call sites in the kernel, and how a rule is broken."""

from __future__ import annotations

import os
from contextvars import ContextVar
from sys import _getframe
from typing import TYPE_CHECKING, Any, Protocol

from .errors import Location, SimulationError
from .table import RULES

if TYPE_CHECKING:
    from types import CodeType


Site = "tuple[CodeType, int]"

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
# Kernels that come with the package are a user's to the simulator.
_KERNELS = os.path.join(PACKAGE, "kernels") + os.sep


class _Internal(dict[str, bool]):
    """Whether a file is the simulator's own, decided when it is first asked."""

    def __missing__(self, name: str) -> bool:
        known = self[name] = name.startswith(PACKAGE) and not name.startswith(_KERNELS)
        return known


_INTERNAL = _Internal()
# The latest call site outside the simulator at each offset: a loop comes back to the same few, a
# record holds many.
SITES: dict[int, tuple[CodeType, int]] = {}


class Session(Protocol):
    """The run a thread is in, as the lower floors know it."""

    @property
    def relax(self) -> frozenset[str]:
        """Ids of rules that are noted instead of raised."""

    @property
    def data(self) -> bool:
        """False in a shape-only run."""

    @property
    def nki(self) -> str:
        """The version of NKI that is run, "0.6" or "0.7"."""

    def note(self, error: SimulationError) -> None:
        """Write down a broken rule that the user relaxed."""

    def warn(self, text: str, where: Location | None = None) -> None:
        """Note something doubtful but legal in the record."""

    def deprecated(self, what: str, instead: str) -> None:
        """Note what works and will not in a later version."""

    def unknown_register(self, register: Any) -> int:
        """The value of a register that a shape-only run cannot know."""


# The run this thread is in: a `Session`, which above `issue.current` knows as the core, or None.
# Every instruction reads it, so it is untyped, and no attribute of a `threading.local`, which takes
# three times as long.
CORE: ContextVar[Any] = ContextVar("core", default=None)
# Bound here: Python makes a method of an imported name anew at each call.
running = CORE.get
site_at = SITES.get


def current_session() -> Session | None:
    """The run this thread is in, or None outside a kernel."""
    session: Session | None = running()
    return session


def call_site(known: int = 2) -> tuple[CodeType, int] | None:
    """Code object and instruction offset of the innermost frame outside the simulator.

    Args:
        known: how many frames, first this function's and its caller's, are surely the simulator's;
            each one less to look at counts, as every instruction asks.
    """
    frame = _getframe(known)
    code = frame.f_code
    internal = _INTERNAL
    while internal[code.co_filename]:
        frame = frame.f_back  # type: ignore[assignment]
        if frame is None:
            return None
        code = frame.f_code
    last = frame.f_lasti
    site = site_at(last)
    if site is None or site[0] is not code:
        site = SITES[last] = code, last
    return site


def locate(site: tuple[CodeType, int] | None) -> Location | None:
    """File, line and function of a call site."""
    if site is None:
        return None
    code, last = site
    line = code.co_firstlineno
    for start, end, number in code.co_lines():
        if start <= last < end and number is not None:
            line = number
            break
    return Location(code.co_filename, line, code.co_name)


def violation(rule: str, message: str, **details: Any) -> SimulationError:
    """Make the error of a broken rule, with its source and the kernel's own line."""
    known = RULES[rule]
    location = details.pop("location", None) or locate(call_site())
    return known.error(message, rule=rule, source=known.source, location=location, **details)


def violate(rule: str, message: str, **details: Any) -> None:
    """Raise the error of a broken rule, or note it where the user relaxed the rule by name."""
    error = violation(rule, message, **details)
    session = current_session()
    if session is None or rule not in session.relax:
        raise error
    session.note(error)
