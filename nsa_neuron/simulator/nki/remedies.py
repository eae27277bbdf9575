"""What to write instead: for names that NKI has not or has no more, and for wrong calls."""

from __future__ import annotations

import difflib
import dis
import inspect
import sys
from enum import Enum
from typing import TYPE_CHECKING, Any

from ..rules.errors import UsageError
from ..rules.legacy import NAMES
from ..rules.session import call_site, current_session, violation
from ..rules.versions import is_in, why_not
from ..run.launch import default_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..rules.errors import Location, SimulationError


_IMPORT_FROM = dis.opmap["IMPORT_FROM"]


class MissingNameError(UsageError, AttributeError):
    """A module of NKI is asked for a name that it has not; `hasattr` says False."""


class MissingImportError(UsageError, ImportError):
    """The same of `from nki.language import name`."""


class Names:
    """The names of a module of the façade that not every version of NKI has.

    Args:
        module: the module's name.
        versioned: those names, each with its object; which versions have it, `rules.versions` says.
    """

    def __init__(self, module: str, **versioned: Any) -> None:
        self._module = module
        self._versioned = versioned

    def find(self, name: str, version: str) -> Any:
        """The object of a name in a version.

        Raises:
            MissingNameError: the version has no such name; scripts, too, are told what to write.
        """
        if name in self._versioned and is_in(name, version):
            return self._versioned[name]
        if name.startswith("_"):
            raise AttributeError(f"module {self._module!r} has no attribute {name!r}")
        found = missing_name(self._module, name, None, version)
        kind = MissingImportError if _imports() else MissingNameError
        raise kind(
            found.message,
            rule=found.rule,
            source=found.source,
            location=found.location,
            hint=found.hint,
        )

    def __call__(self, name: str) -> Any:
        """The module's `__getattr__`: by the version that is run, or would be."""
        return self.find(name, running())

    def listed(self) -> list[str]:
        """The module's `__dir__`, by the same version."""
        version = running()
        own = vars(sys.modules[self._module])
        return sorted({*own, *(name for name in self._versioned if is_in(name, version))})


def _imports() -> bool:
    """Whether an import statement asks, not an attribute of an expression.

    Python turns an AttributeError into an ImportError without the remedy there.
    """
    site = call_site()
    return site is not None and site[0].co_code[site[1]] == _IMPORT_FROM


def running() -> str:
    """The version of NKI that the current run has; outside a run, that of `activate`."""
    session = current_session()
    return session.nki if session is not None else default_options().nki


def missing_name(
    module: str, name: str, where: Location | None, version: str = ""
) -> SimulationError:
    """The refusal of a name: what replaced it, or the names that are most like it.

    Args:
        module: the façade's module, as Python knows it.
        name: what was asked of it.
        where: the kernel's line; None finds it.
        version: of NKI; that which is run unless given.
    """
    public = module.replace(str(__package__), "nki", 1)
    version = version or running()
    if name in NAMES:
        return violation(
            "legacy-api", f"{public}.{name} no longer exists", location=where, hint=NAMES[name]
        )
    if not is_in(name, version):
        message, instead = why_not(name, version)
        return violation("version", f"{public}.{name} {message}", location=where, hint=instead)
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
