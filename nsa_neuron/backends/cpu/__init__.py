"""The `cpu` backend: plain torch arranged for a CPU's caches (`torch`)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nsa_neuron.registry import Supported, Unsupported, Verdict, same_device

if TYPE_CHECKING:
    from nsa_neuron.registry import Lowered
    from nsa_neuron.spec import Bound


MODES = {"torch": "nsa_neuron.backends.cpu.torch_mode"}


class CpuBackend:
    """Every op on CPU tensors. See the module docstring."""

    name = "cpu"

    def modes(self) -> dict[str, str]:
        return {"torch": ""}

    def supports(self, bound: Bound, mode: str) -> Verdict:
        if refusal := same_device(bound.device, "cpu"):
            return refusal
        if bound.spec.name not in _implementations(mode):
            return Unsupported("op", f"cpu:{mode} does not implement {bound.spec.name}")
        return Supported(mode)

    def lower(self, bound: Bound, plan: Any) -> Lowered:
        lowered: Lowered = _implementations(plan)[bound.spec.name]
        return lowered


def _implementations(mode: str) -> dict[str, Lowered]:
    implementations: dict[str, Lowered] = importlib.import_module(MODES[mode]).IMPLEMENTATIONS
    return implementations


BACKEND = CpuBackend()
