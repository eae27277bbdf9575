"""The core that the current thread simulates, and how a rule is broken."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Any

from .checks import RULES
from .errors import Location, SimulationError

if TYPE_CHECKING:
    from types import CodeType

    from .core import NeuronCore

Site = "tuple[CodeType, int]"

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
# Kernels that come with the package are a user's to the simulator.
_KERNELS = tuple(_PACKAGE + name for name in ("bench_kernels.py", "validation_kernels"))


class _Internal(dict[str, bool]):
    """Whether a file is the simulator's own, decided when it is first asked."""

    def __missing__(self, name: str) -> bool:
        known = self[name] = name.startswith(_PACKAGE) and not name.startswith(_KERNELS)
        return known


_INTERNAL = _Internal()
# The latest call site at each offset: a loop comes back to the same few, a record holds many.
_SITES: dict[int, tuple[CodeType, int]] = {}


class _State(threading.local):
    core: NeuronCore | None = None


STATE = _State()


def current_core() -> NeuronCore | None:
    """The core this thread simulates, or None outside a kernel."""
    return STATE.core


def require_core(what: str) -> NeuronCore:
    """The current core; outside a kernel an error that names the API.

    Raises:
        UsageError: no kernel is being simulated.
    """
    core = STATE.core
    if core is None:
        raise violation(
            "usage",
            "called outside a kernel",
            instruction=what,
            hint="decorate the function with @nki.jit; call it through nki.simulate(kernel)(...)",
        )
    return core


def call_site(known: int = 2) -> tuple[CodeType, int] | None:
    """Code object and instruction offset of the innermost frame outside the simulator.

    Args:
        known: how many frames, first this function's and its caller's, are surely the simulator's;
            each one less to look at counts, as every instruction asks.
    """
    frame = sys._getframe(known)
    internal = _INTERNAL
    while internal[frame.f_code.co_filename]:
        frame = frame.f_back  # type: ignore[assignment]
        if frame is None:
            return None
    code, last = frame.f_code, frame.f_lasti
    site = _SITES.get(last)
    if site is None or site[0] is not code:
        site = _SITES[last] = code, last
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
    core = STATE.core
    if core is None or rule not in core.options.relax:
        raise error
    core.trace.relaxed.append(error)
