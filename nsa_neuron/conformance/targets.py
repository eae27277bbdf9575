"""Where the suite can run: every `backend:mode`, what hinders it here, on which device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nsa_neuron.errors import BackendUnavailable, UnknownBackend
from nsa_neuron.registry import AUTOMATIC, REGISTRY, Target


@dataclass(frozen=True)
class Place:
    """A target and whether it can run here.

    Attributes:
        target: backend and mode; the mode is `"?"` when the backend cannot be imported.
        hindrance: why it cannot run here; empty: it can.
        device: where its tensors must lie.
    """

    target: Target
    hindrance: str
    device: str


def find_targets(names: Sequence[str] = (), device: str | None = None) -> list[Place]:
    """The places of backends.

    Args:
        names: `backend` (all of its modes) or `backend:mode`, machines' names (`h200`) included;
            empty: every backend there is.
        device: where tensors must lie; default: where the automatic choice would use the target,
            else the CPU.

    Raises:
        UnknownBackend: no such backend or mode.
        BackendUnavailable: there is no such device here, or it holds no numbers.
    """
    if device and not _exists(device):
        raise BackendUnavailable(f"there is no device '{device}' here that tensors could lie on")
    places = []
    for name in names or REGISTRY.names():
        backend, _, mode = name.partition(":")
        backend = REGISTRY.resolve(backend)
        modes = _modes(backend, must_load=bool(names))
        if mode and mode not in modes:
            known = ", ".join(modes)
            raise UnknownBackend(f"backend '{backend}' has no mode '{mode}'; it has {known}")
        for each in [mode] if mode else modes:
            target = Target(backend, each)
            places.append(Place(target, modes[each], device or _device(target, modes[each])))
    return places


def _modes(name: str, must_load: bool) -> dict[str, str]:
    """Modes and hindrances; a backend nobody asked for may fail to import, and then says so."""
    try:
        return dict(REGISTRY.get(name).modes())
    except (ImportError, AttributeError) as error:
        if must_load:
            raise UnknownBackend(f"backend '{name}' cannot be imported: {error}") from error
        return {"?": f"cannot be imported: {error}"}


def _device(target: Target, hindrance: str) -> str:
    preferring = [kind for kind, order in AUTOMATIC.items() if order[0] == str(target)]
    if not preferring:
        return "cpu"
    return preferring[0] if hindrance else next(filter(_exists, preferring), preferring[0])


def _exists(device: str) -> bool:
    try:
        return torch.empty(0, device=device).device.type != "meta"
    except (RuntimeError, AssertionError, NotImplementedError):
        return False
