"""The vendor's `nki` package as the simulator serves it."""

from ..run.launch import Kernel
from . import collectives, compiler, dtype, isa, language, launching, meta, typing
from .launching import jit
from .remedies import Names as _Names
from .remedies import running as _running
from .typing import tensor


def simulate(kernel):
    """Make a CPU-simulated version of a kernel; see `nsa_neuron.simulator.simulate`."""
    return launching.simulate(kernel)


__all__ = [
    "Kernel",
    "collectives",
    "compiler",
    "dtype",
    "isa",
    "jit",
    "language",
    "meta",
    "simulate",
    "tensor",
    "typing",
]

_versioned = _Names(__name__)


def __getattr__(name):
    """`nki.__version__`, and the refusal of names that NKI has not."""
    return f"{_running()}.0" if name == "__version__" else _versioned(name)
