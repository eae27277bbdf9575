"""A simulator of NeuronCore-v3 that runs NKI kernels on a CPU, strictly; NumPy and ml_dtypes only.

Example:
    >>> from nsa_neuron import simulator
    >>> with simulator.activate(target="trn2"):
    ...     import nki
    ...     out = nki.simulate(kernel)(a, b)
"""

from __future__ import annotations

from .activate import Activation, activate
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
from .record import Instruction, Run

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
    "RaceError",
    "Run",
    "ShapeDtype",
    "Simulated",
    "SimulationError",
    "UninitializedReadError",
    "UsageError",
    "activate",
    "simulate",
]
