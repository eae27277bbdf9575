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
    from .issue.ranks import PerRank
    from .issue.record import Instruction, Run
    from .machine.trn2 import TRN2, Machine
    from .nki.launching import simulate
    from .profiler import Profile, profile
    from .rules.errors import (
        CapacityError,
        ConstraintError,
        DataUnavailableError,
        DeadlockError,
        OutOfBoundsError,
        RaceError,
        SimulationError,
        SimulationWarning,
        UninitializedReadError,
        UsageError,
    )
    from .rules.options import Options
    from .run.activation import Activation, activate
    from .run.arguments import ShapeDtype
    from .run.launch import Kernel, Simulated

_HOMES = {
    "run.activation": ("Activation", "activate"),
    "run.arguments": ("ShapeDtype",),
    "rules.options": ("Options",),
    "rules.errors": (
        "CapacityError",
        "ConstraintError",
        "DataUnavailableError",
        "DeadlockError",
        "OutOfBoundsError",
        "RaceError",
        "SimulationError",
        "SimulationWarning",
        "UninitializedReadError",
        "UsageError",
    ),
    "run.launch": ("Kernel", "Simulated"),
    "nki.launching": ("simulate",),
    "machine.trn2": ("TRN2", "Machine"),
    "profiler": ("Profile", "profile"),
    "issue.ranks": ("PerRank",),
    "issue.record": ("Instruction", "Run"),
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
    "SimulationWarning",
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
