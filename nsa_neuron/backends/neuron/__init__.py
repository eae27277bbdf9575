"""The `neuron` backend: NKI kernels on a Trainium2 (`hw`), or on our simulator of one (`sim`).

Launchers (`launch/<op>.py`) lay tensors out and start kernels; `run.py` says how a kernel is
started, `buckets.py` which few shapes hardware sees; constants (`plans/`) are data; this file
decides only whether a call can be taken. Nothing here has been run on hardware yet.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import TYPE_CHECKING, Any

import torch

from nsa_neuron.backends import composite
from nsa_neuron.backends.launching import with_scale
from nsa_neuron.backends.neuron import buckets, hardware, limits, plans, run, whole
from nsa_neuron.errors import NsaError
from nsa_neuron.registry import Supported, Unsupported, Verdict, same_device

if TYPE_CHECKING:
    from nsa_neuron.registry import Lowered
    from nsa_neuron.spec import Bound, OpSpec

LAUNCHERS = "nsa_neuron.backends.neuron.launch"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
# The ops that have kernels; `nsa_attention` is made of them, or has one of its own (`whole`).
OPS = (
    "attention",
    "attention_backward",
    "compress",
    "compress_backward",
    "compressed_attention",
    "compressed_attention_backward",
    "decode",
    "gated_sum",
    "gated_sum_backward",
    "select_blocks",
    "selected_attention",
    "selected_attention_backward",
    "sliding_window_attention",
    "sliding_window_attention_backward",
)
DEVICES_OF_MODE = {"hw": hardware.DEVICES, "sim": ("cpu",)}
CORES_OF_MODE = {"hw": 2, "sim": 1}  # on trn2 AWS's compiler takes 2 for granted
LNC = "NEURON_LOGICAL_NC_CONFIG"
"""AWS's variable for the number of physical cores of a logical one (nki/get-started/about/lnc)."""


class NeuronBackend:
    """NKI kernels. See the module docstring."""

    name = "neuron"

    def modes(self) -> dict[str, str]:
        return {"hw": hardware.hindrance(), "sim": ""}

    def supports(self, bound: Bound, mode: str) -> Verdict:
        name = bound.spec.name
        if name in composite.WHOLE:
            verdict = composite.supports(bound, lambda part: self.supports(part, mode))
            if name == whole.FUSED and isinstance(verdict, Supported):
                apart = whole.hindrance(bound, mode, logical_cores(mode))
                return Supported(whole.Whole(verdict.plan, apart))
            return verdict
        if name not in OPS:
            return Unsupported("kernel", f"there is no NKI kernel for {name} yet")
        if refusal := same_device(bound.device, *DEVICES_OF_MODE[mode]):
            return refusal
        if bound.dtype not in DTYPES:
            known = "float32, float16, bfloat16"
            return Unsupported("dtype", f"{bound.dtype} is not one of {known}")
        for symbol in ("Dk", "Dv", "D"):
            if symbol in bound.sizes and bound[symbol] > MAX_HEAD_DIM:
                return Unsupported("head_dim", f"{symbol} = {bound[symbol]} > {MAX_HEAD_DIM}")
        return limits.refusal(bound, mode) or Supported(mode)

    def lower(self, bound: Bound, plan: Any) -> Lowered:
        if isinstance(plan, whole.Whole):
            launch, mode = self._whole(bound, plan), plan.mode
            if mode == "hw":  # one operator, for calls of any shape
                launch = self._of_any_shape(bound.spec)
        elif bound.spec.name in composite.WHOLE:
            launch = composite.lower(bound, plan, self.lower)
            mode = next(iter(plan.values()))  # every part has the same
        else:
            launch, mode = _launcher(bound, plan), plan
        return hardware.operation(bound.spec, launch) if mode == "hw" else launch

    def _whole(self, bound: Bound, plan: whole.Whole) -> Lowered:
        if plan.apart is None:
            return _launcher(bound, plan.mode)
        return composite.lower(bound, plan.parts, self.lower)

    def _of_any_shape(self, spec: OpSpec) -> Lowered:
        """Each call in one kernel or as parts, as its own shape allows."""

        def call(**values: Any) -> Any:
            bound = spec.bind(values)
            verdict = self.supports(bound, "hw")
            assert isinstance(verdict, Supported), verdict
            return self._whole(bound, verdict.plan)(**values)

        return call


def _launcher(bound: Bound, mode: str) -> Lowered:
    """The launcher of an op with its kernels and plan; takes the spec's arguments."""
    stem = bound.spec.stem
    module = importlib.import_module(f"{LAUNCHERS}.{stem}")
    kernels = {"hw": run.on_hardware, "sim": run.simulated}[mode](stem, logical_cores(mode))
    run_one = getattr(module, bound.spec.direction)
    launch: Lowered = functools.partial(run_one, kernels, plans.load(stem))
    if mode == "hw":
        launch = buckets.bucketed(bound.spec, launch)
    return with_scale(bound.spec, launch)


def logical_cores(mode: str) -> int:
    """Physical cores per launch: what NEURON_LOGICAL_NC_CONFIG says, else the mode's.

    Raises:
        NsaError: it says neither 1 nor 2.
    """
    text = os.environ.get(LNC) or str(CORES_OF_MODE[mode])
    if text not in ("1", "2"):
        raise NsaError(f"{LNC} is {text!r}; it must be 1 or 2, the cores of a launch")
    return int(text)


BACKEND = NeuronBackend()
