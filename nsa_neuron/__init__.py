"""nsa-neuron: Native Sparse Attention for PyTorch on Trainium2, H200 and any CPU.

Public functions live here and as `torch.ops.nsa.*`. Importing this package alone imports nothing
heavy: `nsa_neuron.simulator` works without torch. The ops are registered as soon as both this
package and torch are imported, in whichever order.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def _public_names() -> dict[str, str]:
    """The modules of the public names, as the stub beside this file imports them.

    A stub read at run time is what keeps type checkers and lazy imports from needing a list each
    (Scientific Python's SPEC 1).
    """
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text())
    imports = [each for each in stub.body if isinstance(each, ast.ImportFrom)]
    return {
        alias.asname: str(each.module)
        for each in imports
        for alias in each.names
        if alias.asname is not None
    }


_HOME_OF = _public_names()

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    """Imports public names and submodules on first use (PEP 562)."""
    if name in _HOME_OF:
        try:
            value = getattr(importlib.import_module(_HOME_OF[name]), name)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            from nsa_neuron.errors import MissingPackage

            raise MissingPackage("torch", "torch", f"nsa_neuron.{name}") from None
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "torch" in sys.modules:
    importlib.import_module("nsa_neuron.library")
else:
    from nsa_neuron._when_imported import when_imported

    when_imported("torch", "nsa_neuron.library")
