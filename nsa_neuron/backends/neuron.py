"""The `neuron` backend: NKI kernels on a Trainium2 (`hw`), or on our simulator (`sim`).

Kernels are listed in `KERNELS` as they are written; what is not there is refused by name. Nothing
here has been run on hardware yet.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from nsa_neuron.registry import Unsupported, Verdict

if TYPE_CHECKING:
    from nsa_neuron.registry import Lowered
    from nsa_neuron.spec import Bound

VENDOR_PACKAGE = "torch_neuronx"


class NeuronBackend:
    """NKI kernels. See the module docstring."""

    name = "neuron"

    def modes(self) -> dict[str, str]:
        missing = importlib.util.find_spec(VENDOR_PACKAGE) is None
        hindrance = f"AWS's package '{VENDOR_PACKAGE}' is not installed" if missing else ""
        return {"hw": hindrance, "sim": ""}

    def supports(self, bound: Bound, mode: str) -> Verdict:
        return Unsupported("kernel", f"there is no NKI kernel for {bound.spec.name} yet")

    def lower(self, bound: Bound, plan: Any) -> Lowered:
        raise AssertionError(f"{bound.spec.name} was lowered without a kernel")


BACKEND = NeuronBackend()
