"""Which backend runs a call, and why.

A backend says what it supports and makes callables ("lowerings"); the policy says whom to ask. An
explicit request (`use_backend`, `NSA_BACKEND`) never falls back; the automatic choice may, and
logs once why. Third parties add backends through the entry point group `nsa_neuron.backends`.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from nsa_neuron.errors import BackendUnavailable, NoLowering, NsaError, UnknownBackend

if TYPE_CHECKING:
    import torch

    from nsa_neuron.spec import Bound

log = logging.getLogger("nsa_neuron")

ENTRY_POINTS = "nsa_neuron.backends"
BUILT_IN = {
    "reference": "nsa_neuron.backends.reference:BACKEND",
    "cpu": "nsa_neuron.backends.cpu:BACKEND",
    "cuda": "nsa_neuron.backends.cuda:BACKEND",
    "neuron": "nsa_neuron.backends.neuron:BACKEND",
}
# Machines by the names that people use, wherever a backend may be named. A backend of the very name
# comes first.
TARGETS = {"trn2": "neuron", "h200": "cuda"}
# Whom to ask for tensors of a device type, best first. CPU tensors never choose a simulator by
# themselves: it is asked for by name.
AUTOMATIC = {
    "cpu": ("cpu:native", "cpu:torch", "reference:eager"),
    "cuda": ("cuda:hw", "reference:eager"),
    "neuron": ("neuron:hw", "reference:eager"),
    "xla": ("neuron:hw", "reference:eager"),
    "privateuseone": ("neuron:hw", "reference:eager"),
}
ANYWHERE = ("reference:eager",)

Lowered = Callable[..., Any]


@dataclass(frozen=True)
class Supported:
    """A backend takes a call.

    Attributes:
        plan: its own data: tile sizes, variant.
        checks: index tensors whose contents the lowering checks itself, at every call.
    """

    plan: Any = None
    checks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unsupported:
    """A backend refuses a call: the rule's name and a sentence that says why."""

    rule: str
    reason: str


Verdict = Supported | Unsupported


@runtime_checkable
class Backend(Protocol):
    """One way to run operations.

    Attributes:
        name: as in `use_backend(name)`.
    """

    name: str

    def modes(self) -> Mapping[str, str]:
        """Modes of this backend and what hinders each here: `{"hw": "no CUDA device", "sim": ""}`.

        An empty string means that the mode can run.
        """
        ...

    def supports(self, bound: Bound, mode: str) -> Verdict:
        """Whether the backend takes a call in a mode; must not raise for legal calls."""
        ...

    def lower(self, bound: Bound, plan: Any) -> Lowered:
        """The callable for a supported call; takes the spec's arguments by name."""
        ...


@dataclass(frozen=True)
class Target:
    """A backend in a mode, written `name:mode`."""

    backend: str
    mode: str

    def __str__(self) -> str:
        return f"{self.backend}:{self.mode}"


@dataclass(frozen=True)
class Refusal:
    """Why one target did not get a call."""

    target: Target
    rule: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """The outcome of a choice.

    Attributes:
        target: who runs the call.
        lowered: the callable.
        rejected: whom else was asked before, and why they refused.
        checks: see `Supported`.
    """

    target: Target
    lowered: Lowered
    rejected: tuple[Refusal, ...] = ()
    checks: tuple[str, ...] = ()


class Registry:
    """Backends by name, imported on first use."""

    def __init__(self) -> None:
        self._sources: dict[str, str | Backend] = dict(BUILT_IN)
        self._loaded: dict[str, Backend] = {}
        self._discovered = False
        self.generation = 0  # grows when choices made so far no longer hold
        self._fallbacks_told: set[tuple[str, str]] = set()

    def register(self, backend: Backend) -> None:
        """Adds a backend object (entry points do this without code).

        Args:
            backend: the object; its `name` is how people ask for it.

        Raises:
            UnknownBackend: another backend has that name.
        """
        if backend.name in self.names():
            raise UnknownBackend(f"a backend named '{backend.name}' exists already")
        self._sources[backend.name] = backend

    def unregister(self, name: str) -> None:
        """Removes a backend and every choice made so far."""
        self.names()  # an entry point's, too: found later, it would be there again
        self._sources.pop(name, None)
        self._loaded.pop(name, None)
        self.generation += 1

    def names(self) -> tuple[str, ...]:
        """Every backend's name: built-in, from entry points, registered."""
        if not self._discovered:
            for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
                self._sources.setdefault(point.name, point.value)
            self._discovered = True
        return tuple(self._sources)

    def resolve(self, name: str) -> str:
        """A backend's name from its own or a machine's: `h200` is `cuda`.

        Raises:
            UnknownBackend: there is none.
        """
        found = name if name in self.names() else TARGETS.get(name, name)
        if found not in self.names():
            known = ", ".join({**dict.fromkeys(self.names()), **TARGETS})
            raise UnknownBackend(f"no backend or target '{name}'; there are {known}")
        return found

    def get(self, name: str) -> Backend:
        """The backend of a name, or of a machine in `TARGETS`.

        Raises:
            UnknownBackend: there is none.
        """
        name = self.resolve(name)
        if name not in self._loaded:
            source = self._sources[name]
            if isinstance(source, str):
                point = importlib.metadata.EntryPoint(name, source, ENTRY_POINTS)
                backend: Backend = point.load()
            else:
                backend = source
            if not isinstance(backend, Backend):
                raise UnknownBackend(f"'{source}' is no backend: it lacks a member of the protocol")
            self._loaded[name] = backend
        return self._loaded[name]

    def target(self, text: str) -> Target:
        """Parses `name` or `name:mode`; without a mode, the backend's first (`hw`).

        A simulator never stands in for hardware by itself: it is asked for by name.

        Raises:
            UnknownBackend: no such backend or mode.
        """
        if not isinstance(text, str):
            raise UnknownBackend(
                f"a backend is named by text, such as 'cpu:torch', not by {text!r}"
            )
        name, _, mode = text.partition(":")
        name = self.resolve(name)
        modes = self.get(name).modes()
        if mode and mode not in modes:
            known = ", ".join(modes)
            raise UnknownBackend(f"backend '{name}' has no mode '{mode}'; it has {known}")
        return Target(name, mode or next(iter(modes)))

    def usable(self, target: Target) -> None:
        """Makes sure that a target can run here.

        Raises:
            BackendUnavailable: it cannot; says why, and which of its modes can.
        """
        modes = self.get(target.backend).modes()
        if modes[target.mode]:
            others = [f"'{target.backend}:{mode}'" for mode, why in modes.items() if not why]
            hint = f"; {' and '.join(others)} can run here" if others else ""
            raise BackendUnavailable(f"{target} cannot run here: {modes[target.mode]}{hint}")

    def ask(self, target: Target, bound: Bound) -> Verdict:
        """A target's verdict on a call; a mode that cannot run here refuses with that reason."""
        backend = self.get(target.backend)
        modes = backend.modes()
        if target.mode not in modes:
            return Unsupported("mode", f"there is no mode '{target.mode}', only {', '.join(modes)}")
        if modes[target.mode]:
            return Unsupported("available", modes[target.mode])
        return backend.supports(bound, target.mode)

    def select(self, bound: Bound, policy: str | None) -> Selection:
        """Chooses who runs a call.

        Args:
            bound: the call.
            policy: `name` or `name:mode` to ask nobody else; None: the automatic choice.

        Raises:
            NoLowering: with every reason.
            BackendUnavailable: the one asked for finds, when it lowers, that it cannot run here.
        """
        if policy is not None:
            wanted: tuple[Target, ...] = (self.target(policy),)
        else:
            names = AUTOMATIC.get(bound.device.type, ANYWHERE)
            wanted = tuple(Target(*name.split(":")) for name in names)
        rejected: list[Refusal] = []
        for target in wanted:
            verdict = self.ask(target, bound)
            if isinstance(verdict, Supported):
                try:
                    lowered = self.get(target.backend).lower(bound, verdict.plan)
                except BackendUnavailable as error:  # kernels that do not compile, say
                    if policy is not None:
                        raise
                    verdict = Unsupported("available", str(error))
                else:
                    self._tell(bound, target, rejected)
                    return Selection(target, lowered, tuple(rejected), verdict.checks)
            rejected.append(Refusal(target, verdict.rule, verdict.reason))
        reasons = [(r.target.backend, r.target.mode, r.rule, r.reason) for r in rejected]
        raise NoLowering(bound.spec.name, bound.describe(), reasons)

    def forget(self) -> None:
        """Makes every call choose again (after the environment changed)."""
        self.generation += 1

    def _tell(self, bound: Bound, target: Target, rejected: list[Refusal]) -> None:
        """Logs an automatic fall-back once per op and reason."""
        for refusal in rejected:
            key = (bound.spec.name, refusal.reason)
            if key not in self._fallbacks_told:
                self._fallbacks_told.add(key)
                log.warning(
                    "%s runs on %s: %s refused by rule '%s': %s",
                    bound.spec.name, target, refusal.target, refusal.rule, refusal.reason,
                )  # fmt: skip


REGISTRY = Registry()
# `NSA_BACKEND` is read once, when this module is imported.
_requested: ContextVar[str | None] = ContextVar(
    "nsa_neuron_backend", default=os.environ.get("NSA_BACKEND") or None
)
requested = _requested.get
"""The backend asked for here: `use_backend`, else `NSA_BACKEND`, else None (automatic)."""


def check_environment() -> None:
    """Makes sure that `NSA_BACKEND`, if it is set, names a backend and mode that can run here.

    Raises:
        UnknownBackend, BackendUnavailable: it does not; says so, and what there is.
    """
    name = os.environ.get("NSA_BACKEND")
    if not name:
        return
    try:
        REGISTRY.usable(REGISTRY.target(name))
    except NsaError as error:
        raise type(error)(f"NSA_BACKEND is '{name}': {error}") from None


@contextmanager
def use_backend(name: str, mode: str | None = None) -> Iterator[Target]:
    """Runs every nsa op inside on one backend; a call that it refuses raises.

    It holds in the current thread or asyncio task, and in backward passes of what was called in it.
    A thread that starts inside begins without it, as with every `contextvars` variable; start it
    with `contextvars.copy_context().run` to carry it over. `NSA_BACKEND` holds everywhere.

    Args:
        name: `"cpu"`, `"reference"`, `"cuda"`, `"neuron"`, a third party's, or a machine
            (`"h200"`, `"trn2"`); or `"name:mode"`.
        mode: `"hw"`, `"sim"`, `"torch"`, `"eager"`; default: its first, the hardware.

    Raises:
        UnknownBackend: no such backend or mode.
        BackendUnavailable: it cannot run here.
    """
    target = REGISTRY.target(f"{name}:{mode}" if mode else name)
    REGISTRY.usable(target)
    token = _requested.set(str(target))
    try:
        yield target
    finally:
        _requested.reset(token)


@contextmanager
def requesting(policy: str | None) -> Iterator[None]:
    """Restores a request that was made elsewhere (another thread); None changes nothing."""
    if policy is None:
        yield
        return
    token = _requested.set(policy)
    try:
        yield
    finally:
        _requested.reset(token)


def same_device(device: torch.device, *types: str) -> Unsupported | None:
    """The refusal of a backend whose kernels read tensors of certain device types only."""
    if device.type in types:
        return None
    return Unsupported("device", f"tensors are on '{device}', not on {' or '.join(types)}")
