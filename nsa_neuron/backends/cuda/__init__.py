"""The `cuda` backend: Triton kernels on an NVIDIA GPU (`hw`), or interpreted on the CPU (`sim`).

Launchers (`launch/<op>.py`) allocate results and start kernels; tile plans (`plans/`) are data;
this file decides only whether a call can be taken. The interpreter runs the same kernels on CPU
tensors, slowly: it shows correctness, never speed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from nsa_neuron.backends import composite
from nsa_neuron.backends.cuda import devices, limits, plans
from nsa_neuron.backends.launching import with_scale
from nsa_neuron.registry import Supported, Unsupported, Verdict, same_device
from nsa_neuron.toolchain import (
    DISTRIBUTION,
    KernelPackage,
    interpreter_hindrance,
    triton_interpreter,
)

if TYPE_CHECKING:
    from nsa_neuron.registry import Lowered
    from nsa_neuron.spec import Bound

PACKAGE = "cuda_kernels"
LAUNCHERS = "nsa_neuron.backends.cuda.launch"
DEVICE_OF_MODE = {"hw": "cuda", "sim": "cpu"}
# The ops that have kernels, by stem; `nsa_attention` is made of them.
STEMS = (
    "attention",
    "compress",
    "compressed_attention",
    "decode",
    "gated_sum",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
)


class CudaBackend:
    """Triton kernels. See the module docstring."""

    name = "cuda"

    def modes(self) -> dict[str, str]:
        if importlib.util.find_spec("triton") is None:
            missing = "the package 'triton' is not installed"
            return {"hw": missing, "sim": missing}
        return {"hw": devices.hindrance(), "sim": interpreter_hindrance()}

    def supports(self, bound: Bound, mode: str) -> Verdict:
        if bound.spec.name in composite.WHOLE:
            return composite.supports(bound, lambda part: self.supports(part, mode))
        stem = bound.spec.stem
        if stem not in STEMS:
            return Unsupported("kernel", f"there is no Triton kernel for {bound.spec.name} yet")
        if refusal := same_device(bound.device, DEVICE_OF_MODE[mode]):
            return refusal
        if refusal := limits.refusal(bound):
            return refusal
        gpu = _gpu_of(bound.device.index) if mode == "hw" and torch.cuda.is_available() else None
        if gpu is not None and gpu.hindrance:
            return Unsupported("gpu", gpu.hindrance)
        try:
            plan = _plan(bound, stem, _plan_device(mode, gpu))
        except plans.PlanError as error:
            return Unsupported("plan", str(error))
        return Supported((mode, plan))

    def lower(self, bound: Bound, plan: Any) -> Lowered:
        if bound.spec.name in composite.WHOLE:
            if bound.spec.direction == "backward":
                return self._lower_whole_backward(bound, plan)
            return composite.lower(bound, plan, self.lower)
        mode, constants = plan
        stem = bound.spec.stem
        launcher = importlib.import_module(f"{LAUNCHERS}.{stem}")
        kernels = kernel_package(mode).load(stem)
        launch: Lowered = functools.partial(
            getattr(launcher, bound.spec.direction), kernels, constants
        )
        if mode == "hw":
            launch = _on_device(launch, bound.device)
        return with_scale(bound.spec, launch)

    def _lower_whole_backward(self, bound: Bound, plans_of: dict[str, Any]) -> Lowered:
        mode, constants = plans_of["gated_sum_backward"]
        launcher = importlib.import_module(f"{LAUNCHERS}.nsa_attention")
        parts = composite.lower_parts(bound, plans_of, self.lower)
        kernels = kernel_package(mode).load("gated_sum")
        launch: Lowered = functools.partial(launcher.backward, kernels, constants, parts)
        return _on_device(launch, bound.device) if mode == "hw" else launch


@functools.cache
def kernel_package(mode: str) -> KernelPackage:
    """The private copy of `cuda_kernels` of a mode."""
    if mode == "sim":
        return KernelPackage(PACKAGE, triton_interpreter, DISTRIBUTION)
    return KernelPackage(PACKAGE, distribution=DISTRIBUTION)


def _on_device(launch: Lowered, device: torch.device) -> Lowered:
    """Launches where the tensors lie: Triton launches on the current device, whichever that is.

    A model spread over several GPUs calls with tensors of one while another is current.
    """

    def call(**values: Any) -> Any:
        if torch.cuda.current_device() == device.index:
            return launch(**values)
        with torch.cuda.device(device):
            return launch(**values)

    return call


def _plan(bound: Bound, stem: str, device: str) -> Any:
    dv = bound.sizes["Dv" if "Dv" in bound.sizes else "Dk" if "Dk" in bound.sizes else "D"]
    dk = bound.sizes["Dk" if "Dk" in bound.sizes else "Dv" if "Dv" in bound.sizes else "D"]
    group = bound.group if "Hq" in bound.sizes and "Hkv" in bound.sizes else 1
    dtype = str(bound.dtype).removeprefix("torch.")
    return plans.find(device, stem, dk=dk, dv=dv, dtype=dtype, group=group)


_gpu_of = functools.cache(devices.gpu)


def _plan_device(mode: str, gpu: devices.Gpu | None) -> str:
    """Whose plans serve a call; where there is no GPU, a call is explained for an H200."""
    if mode == "sim":
        return "interpret"
    return "h200" if gpu is None else gpu.plans


BACKEND = CudaBackend()
