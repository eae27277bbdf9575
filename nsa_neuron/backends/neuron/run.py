"""How a kernel is started: on the simulator of a NeuronCore, or by TorchNeuron on a Trainium.

A launcher gets `Kernels` and calls `kernels.<name>(*tensors, **constants)`, whatever is behind it.
Every launch of the simulator is strict: nothing is relaxed, what it would only warn of is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nsa_neuron import records, simulator
from nsa_neuron.backends.neuron import hardware
from nsa_neuron.toolchain import DISTRIBUTION, KernelPackage

if TYPE_CHECKING:
    from types import ModuleType

PACKAGE = "nki_kernels"

Start = Callable[..., Any]
"""(kernel, arguments, constants) -> what the kernel returns."""


class Kernels:
    """The kernels of a module, as functions of torch tensors that return a tuple of them.

    Args:
        module: a module of `nki_kernels`.
        start: runs one of its kernels.
        cores: physical cores of a launch, 1 or 2.
    """

    def __init__(self, module: ModuleType, start: Start, cores: int) -> None:
        self._module = module
        self._start = start
        self.cores = cores

    def __getattr__(self, name: str) -> Callable[..., tuple[Tensor, ...]]:
        kernel = getattr(self._module, name)

        def call(*tensors: Any, **constants: Any) -> tuple[Tensor, ...]:
            results = self._start(kernel, tensors, constants)
            return results if isinstance(results, tuple) else (results,)

        return call


@functools.cache
def simulated(stem: str, lnc: int = 1) -> Kernels:
    """Kernels of `nki_kernels.<stem>` on `lnc` simulated cores (1 or 2)."""

    def start(kernel: Any, tensors: tuple[Any, ...], constants: dict[str, Any]) -> Any:
        launch = simulator.simulate(kernel[lnc], data=True, relax=(), strict=True)
        results = launch(*tensors, **constants)
        records.note(launch.runs)
        return results

    return Kernels(package().load(stem), start, lnc)


@functools.cache
def on_hardware(stem: str, lnc: int) -> Kernels:
    """Kernels of `nki_kernels.<stem>` on a Trainium, on `lnc` cores. Not yet run on hardware."""

    def start(kernel: Any, tensors: tuple[Any, ...], constants: dict[str, Any]) -> Any:
        return hardware.start(kernel, lnc, tensors, constants)

    return Kernels(_vendor_package().load(stem), start, lnc)


@functools.cache
def package() -> KernelPackage:
    """The private copy of the kernels that uses the simulator's nki."""
    return KernelPackage(PACKAGE, simulator.activate, DISTRIBUTION)


@functools.cache
def _vendor_package() -> KernelPackage:
    """The private copy of the kernels that uses AWS's nki."""
    return KernelPackage(PACKAGE, distribution=DISTRIBUTION)
