"""The `cpu` backend: C++ kernels (`native`), or plain torch arranged for a CPU's caches (`torch`).

`native` is compiled at first use; where that cannot be (no compiler, another CPU), `torch` runs
everything, and `nsa backends` says what hinders `native`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from nsa_neuron.backends.cpu.native_mode import build
from nsa_neuron.registry import Supported, Unsupported, Verdict, same_device

if TYPE_CHECKING:
    from nsa_neuron.registry import Lowered
    from nsa_neuron.spec import Bound

MODES = {
    "native": "nsa_neuron.backends.cpu.native_mode",
    "torch": "nsa_neuron.backends.cpu.torch_mode",
}
NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class CpuBackend:
    """Every op on CPU tensors. See the module docstring."""

    name = "cpu"

    def modes(self) -> dict[str, str]:
        # The first is meant by `use_backend("cpu")`: the best that can run here.
        hindrance = build.hindrance()
        if hindrance:
            return {"torch": "", "native": hindrance}
        return {"native": "", "torch": ""}

    def supports(self, bound: Bound, mode: str) -> Verdict:
        if refusal := same_device(bound.device, "cpu"):
            return refusal
        if mode == "native" and bound.dtype not in NATIVE_DTYPES:
            reason = f"{bound.dtype} is not one of float32, float16, bfloat16; cpu:torch takes it"
            return Unsupported("dtype", reason)
        if bound.spec.name not in _implementations(mode):
            return Unsupported("kernel", f"there is no C++ kernel for {bound.spec.name} yet")
        # C++ kernels check ids where they use them, so the router need not read them as well.
        checks = ("block_indices",) if mode == "native" and "block_indices" in bound.shapes else ()
        return Supported(mode, checks)

    def lower(self, bound: Bound, plan: Any) -> Lowered:
        if plan == "native":
            from nsa_neuron.backends.cpu.native_mode import extension

            extension.load()
        return _implementations(plan)[bound.spec.name]


def _implementations(mode: str) -> dict[str, Lowered]:
    implementations: dict[str, Lowered] = importlib.import_module(MODES[mode]).IMPLEMENTATIONS
    return implementations


BACKEND = CpuBackend()
