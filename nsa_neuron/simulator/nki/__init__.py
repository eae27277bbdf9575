"""The vendor's `nki` package as the simulator serves it."""

from ..launch import Kernel, jit
from ..launch import simulate as _simulate
from . import collectives, dtype, isa, language, meta, typing
from .typing import tensor

__version__ = "0.6.0"


def simulate(kernel):
    """Make a CPU-simulated version of a kernel; see `nsa_neuron.simulator.simulate`."""
    return _simulate(kernel)


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
