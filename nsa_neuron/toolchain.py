"""Loads private copies of kernel packages, for hardware or for simulation.

Kernel packages (`nki_kernels`, `cuda_kernels`, a third party's) import a vendor's toolchain at the
top: `import nki`, `import triton`. Which toolchain that is gets decided while the import runs, so a
package that serves both the hardware and a simulator is imported once for each, into modules that
nobody else sees. Copies live side by side: one process can hold the compiled and the interpreted
version of one kernel.
"""

from __future__ import annotations

import importlib
import sys
import threading
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from nsa_neuron.errors import ToolchainError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

Environment = AbstractContextManager[object]

DISTRIBUTION = "nsa-neuron"  # what our own kernel packages call themselves

_import_lock = threading.RLock()


class KernelPackage:
    """A private copy of a kernel package, imported within an environment.

    Args:
        name: the package's import name, such as `"cuda_kernels"`.
        environment: makes the context in which modules are imported: it decides what the vendor's
            names mean there (`simulator.activate`, Triton's interpreter switch). Default: none, so
            the vendor's own packages are used.
        distribution: what the package must call itself in `DISTRIBUTION`; default: anything. Names
            like `cuda_kernels` are short: another package of that name may come first on the path.

    Modules are imported on first use and kept; modules of one copy share their imports of each
    other. Only imports at module level see the environment.
    """

    def __init__(
        self,
        name: str,
        environment: Callable[[], Environment] = nullcontext,
        distribution: str | None = None,
    ) -> None:
        self.name = name
        self._distribution = distribution
        self._environment = environment
        self._modules: dict[str, ModuleType] = {}

    def load(self, stem: str) -> ModuleType:
        """Returns the private copy of module `stem` (`"attention"`, `"decode.split"`).

        Raises:
            ToolchainError: the module or something it imports does not exist, or the package is
                somebody else's.
        """
        full = f"{self.name}.{stem}" if stem else self.name
        with _import_lock:
            if full not in self._modules:
                self._import(full)
            return self._modules[full]

    def _import(self, full: str) -> None:
        try:
            with self._private_modules(), self._environment():
                self._make_sure(importlib.import_module(self.name))
                importlib.import_module(full)
        except ImportError as error:
            raise ToolchainError(f"cannot load kernels '{full}': {error}") from error

    def _make_sure(self, package: ModuleType) -> None:
        """Refuses a package of the same name that comes from elsewhere."""
        if self._distribution is None:
            return
        found = getattr(package, "DISTRIBUTION", None)
        if found != self._distribution:
            place = package.__file__ or list(package.__path__)
            raise ToolchainError(
                f"'{self.name}' at {place} is not {self._distribution}'s: another package of that "
                "name comes first on sys.path; remove or rename it"
            )

    @contextmanager
    def _private_modules(self) -> Iterator[None]:
        """Swaps this copy's modules into `sys.modules`, and whatever was there back afterwards."""
        public = self._take_out()
        sys.modules.update(self._modules)
        try:
            yield
            self._modules = self._take_out()
        finally:
            self._take_out()
            sys.modules.update(public)

    def _take_out(self) -> dict[str, ModuleType]:
        prefix = f"{self.name}."
        names = [name for name in sys.modules if name == self.name or name.startswith(prefix)]
        return {name: sys.modules.pop(name) for name in names}


def interpreter_hindrance() -> str:
    """Why Triton's interpreter cannot run kernels here; empty: it can.

    In Triton 3.6 a scalar is an array of one element that `range` converts with `int()`, which
    numpy refuses since 2.4; Triton 3.7 squeezes it first.
    """
    import numpy
    import triton

    if _release(numpy.__version__) < (2, 4) or _release(triton.__version__) >= (3, 7):
        return ""
    return (
        f"Triton {triton.__version__}'s interpreter cannot loop over range(tensor) with numpy "
        f"{numpy.__version__}; install triton>=3.7 or numpy<2.4"
    )


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


@contextmanager
def triton_interpreter() -> Iterator[None]:
    """Environment in which `@triton.jit` makes interpreted kernels (CPU tensors, no GPU needed).

    They run under the rules of `interpreted_watch`.

    Raises:
        ToolchainError: this interpreter cannot run them, see `interpreter_hindrance`.
    """
    import triton

    if hindrance := interpreter_hindrance():
        raise ToolchainError(hindrance)
    from triton.runtime import interpreter

    from nsa_neuron.interpreted_grid import StrictFunction
    from nsa_neuron.interpreted_language import interpret_library_functions

    interpret_library_functions()
    plain = interpreter.InterpretedFunction
    interpreter.InterpretedFunction = StrictFunction
    try:
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True
            yield
    finally:
        interpreter.InterpretedFunction = plain
