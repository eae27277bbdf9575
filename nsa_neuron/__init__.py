"""nsa-neuron: Native Sparse Attention for PyTorch on Trainium2, H200 and any CPU.

Public functions live here and as `torch.ops.nsa.*`. Importing this package alone imports nothing
heavy: `nsa_neuron.simulator` works without torch. The ops are registered as soon as both this
package and torch are imported, in whichever order.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nsa_neuron.compile import explain
    from nsa_neuron.errors import NsaError
    from nsa_neuron.functional import (
        attention,
        compress,
        compressed_attention,
        decode,
        gated_sum,
        nsa_attention,
        select_blocks,
        selected_attention,
        sliding_window_attention,
    )
    from nsa_neuron.registry import use_backend

_HOMES = {
    "nsa_neuron.functional": (
        "attention",
        "compress",
        "compressed_attention",
        "decode",
        "gated_sum",
        "nsa_attention",
        "select_blocks",
        "selected_attention",
        "sliding_window_attention",
    ),
    "nsa_neuron.registry": ("use_backend",),
    "nsa_neuron.compile": ("explain",),
    "nsa_neuron.errors": ("NsaError",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "NsaError",
    "__version__",
    "attention",
    "compress",
    "compressed_attention",
    "decode",
    "explain",
    "gated_sum",
    "nsa_attention",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
    "use_backend",
]


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
