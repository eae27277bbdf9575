"""What to write instead: for names that NKI has not or has no more, and for wrong calls."""

from __future__ import annotations

import difflib
import inspect
import sys
from enum import Enum
from typing import TYPE_CHECKING, Any, NoReturn

from ..rules.errors import UsageError
from ..rules.legacy import NAMES, NEWER
from ..rules.session import violation

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..rules.errors import Location, SimulationError


class MissingNameError(UsageError, AttributeError):
    """A module of NKI is asked for a name that it has not; `hasattr` says False."""


def refuse_missing(module: str) -> Callable[[str], NoReturn]:
    """The `__getattr__` of a module of the façade, so that scripts, too, are told what to write."""

    def absent(name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        found = missing_name(module, name, None)
        raise MissingNameError(
            found.message,
            rule=found.rule,
            source=found.source,
            location=found.location,
            hint=found.hint,
        )

    return absent


def missing_name(module: str, name: str, where: Location | None) -> SimulationError:
    """The refusal of a name: what replaced it, or the names that are most like it.

    Args:
        module: the façade's module, as Python knows it.
        name: what was asked of it.
        where: the kernel's line; None finds it.
    """
    public = module.replace(str(__package__), "nki", 1)
    if name in NAMES:
        return violation(
            "legacy-api", f"{public}.{name} no longer exists", location=where, hint=NAMES[name]
        )
    if name in NEWER:
        return violation(
            "usage",
            f"{public}.{name} is of NKI 0.7; NKI 0.6 is simulated",
            location=where,
            hint=NEWER[name],
        )
    known = [n for n in dir(sys.modules[module]) if not n.startswith("_")]
    close = difflib.get_close_matches(name, known, 3)
    return violation(
        "usage",
        f"{public} has no {name!r}",
        location=where,
        hint=", ".join(f"{public}.{n}" for n in close),
    )


class _Member:
    """A default that is a member of an enum, as a kernel writes it."""

    def __init__(self, member: Enum) -> None:
        self._member = member

    def __repr__(self) -> str:
        return f"nisa.{type(self._member).__name__}.{self._member.name}"


def signature_of(function: Callable[..., Any]) -> str:
    """`(dst, src, engine=nisa.engine.unknown)`: a signature as a kernel would write it."""
    signature = inspect.signature(function)
    return str(
        signature.replace(
            parameters=[
                p.replace(
                    annotation=p.empty,
                    default=_Member(p.default) if isinstance(p.default, Enum) else p.default,
                )
                for p in signature.parameters.values()
            ],
            return_annotation=signature.empty,
        )
    )
