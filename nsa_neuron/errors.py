"""The errors of nsa-neuron: one small tree; every message says what, why, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class NsaError(Exception):
    """Anything that nsa-neuron refuses or fails at."""


class InvalidArgument(NsaError, ValueError):
    """An argument breaks the contract; raised before any kernel runs.

    Attributes:
        op: the operation's name.
        argument: the argument at fault.
        found: what it is.
        expected: what it must be.
    """

    def __init__(self, op: str, argument: str, found: object, expected: str) -> None:
        super().__init__(f"{op}: argument '{argument}' is {found}; it must be {expected}")
        self.op = op
        self.argument = argument
        self.found = found
        self.expected = expected


class InvalidType(InvalidArgument, TypeError):
    """An argument is of the wrong Python type or tensor dtype."""


class CacheExhausted(NsaError, RuntimeError):
    """A key-value cache has no room for what it is given; it holds what it held before."""


class StateMismatch(NsaError, ValueError):
    """A state dict or a checkpoint is not of this model, is damaged, or of another version."""


class UnknownBackend(NsaError, LookupError):
    """A backend, mode or target of that name does not exist."""


class BackendUnavailable(NsaError, RuntimeError):
    """A backend exists but cannot run here (no device, no package); says what is missing."""


class NoLowering(NsaError, RuntimeError):
    """No backend accepts a call; carries every backend's reason.

    Attributes:
        op: the operation's name.
        reasons: one `(backend, mode, rule, reason)` for every backend that was asked.
    """

    def __init__(self, op: str, call: str, reasons: Sequence[tuple[str, str, str, str]]) -> None:
        lines = "".join(f"\n  {b}:{m} refused by rule '{r}': {why}" for b, m, r, why in reasons)
        super().__init__(f"no backend can run {op}({call})" + (lines or "\n  no backend was asked"))
        self.op = op
        self.reasons = tuple(reasons)


class UnsupportedTransform(NsaError, NotImplementedError):
    """A functional transform (vmap, double backward) that an operation does not define."""


class MissingPackage(NsaError, ImportError):
    """An optional package is not installed; says what needs it and how to install it.

    Attributes:
        package: its import name.
    """

    def __init__(self, package: str, extra: str, what: str) -> None:
        super().__init__(
            f"{what} needs {package}, which is not installed: pip install 'nsa-neuron[{extra}]'"
        )
        self.package = package


class ToolchainError(NsaError, ImportError):
    """A kernel package cannot be loaded for the toolchain that was asked for."""


class KernelFault(NsaError, RuntimeError):
    """An interpreted kernel did what is a fault or a race on a GPU; names kernel and program."""


class ContractViolation(NsaError, RuntimeError):
    """A backend returned something other than what the spec promises: a defect of the backend."""
