"""The vendor's `nki` package as the simulator serves it."""

from ..run.launch import Kernel
from . import collectives, dtype, isa, language, launching, meta, typing
from .launching import jit
from .remedies import refuse_missing as _refuse_missing
from .typing import tensor

__version__ = "0.6.0"


def simulate(kernel):
    """Make a CPU-simulated version of a kernel; see `nsa_neuron.simulator.simulate`."""
    return launching.simulate(kernel)


__all__ = [
    "Kernel",
    "collectives",
    "dtype",
    "isa",
    "jit",
    "language",
    "meta",
    "simulate",
    "tensor",
    "typing",
]

__getattr__ = _refuse_missing(__name__)
