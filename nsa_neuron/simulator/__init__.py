"""A simulator of NeuronCore-v3 that runs NKI kernels on a CPU, strictly; NumPy and ml_dtypes only.

Names are imported when they are first used, so that the pytest plugin of this package costs a
session that simulates nothing nothing.

Example:
    >>> from nsa_neuron import simulator
    >>> with simulator.activate(target="trn2"):
    ...     import nki
    ...     out = nki.simulate(kernel)(a, b)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .activation import Activation, activate
    from .arguments import ShapeDtype
    from .core import Options
    from .errors import (
        CapacityError,
        ConstraintError,
        DataUnavailableError,
        DeadlockError,
        OutOfBoundsError,
        RaceError,
        SimulationError,
        UninitializedReadError,
        UsageError,
    )
    from .launch import Kernel, Simulated, simulate
    from .machine import TRN2, Machine
    from .profiler import Profile, profile
    from .ranks import PerRank
    from .record import Instruction, Run

_HOMES = {
    "activation": ("Activation", "activate"),
    "arguments": ("ShapeDtype",),
    "core": ("Options",),
    "errors": (
        "CapacityError",
        "ConstraintError",
        "DataUnavailableError",
        "DeadlockError",
        "OutOfBoundsError",
        "RaceError",
        "SimulationError",
        "UninitializedReadError",
        "UsageError",
    ),
    "launch": ("Kernel", "Simulated", "simulate"),
    "machine": ("TRN2", "Machine"),
    "profiler": ("Profile", "profile"),
    "ranks": ("PerRank",),
    "record": ("Instruction", "Run"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "TRN2",
    "Activation",
    "CapacityError",
    "ConstraintError",
    "DataUnavailableError",
    "DeadlockError",
    "Instruction",
    "Kernel",
    "Machine",
    "Options",
    "OutOfBoundsError",
    "PerRank",
    "Profile",
    "RaceError",
    "Run",
    "ShapeDtype",
    "Simulated",
    "SimulationError",
    "UninitializedReadError",
    "UsageError",
    "activate",
    "profile",
    "simulate",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use (PEP 562)."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    module = importlib.import_module(f"{__name__}.{home}")
    for public in _HOMES[home]:
        globals()[public] = getattr(module, public)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
