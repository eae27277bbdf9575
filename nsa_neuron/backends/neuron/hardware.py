"""The path to a Trainium through AWS's TorchNeuron, thin. Not yet run on hardware.

Documented by AWS in "How to work with NKI kernels from torch-neuronx" (SDK 2.33): a kernel runs as
`wrap_nki(kernel)[lnc](*arguments)`, whose non-tensor arguments are build-time constants, inside a
function that `nki_op` registers as a PyTorch operator. `torch.compile(backend="neuron")` sees
through such an operator to the kernels in it; nothing is differentiated, so a backward pass is an
operator of its own, as it is here anyway. Shapes are static: each one compiles again.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor  # nki_op evaluates the annotations of what it registers, here

if TYPE_CHECKING:
    from nsa_neuron.registry import Lowered
    from nsa_neuron.spec import OpSpec
    from nsa_neuron.torch_private import OpOverload

log = logging.getLogger("nsa_neuron")

VENDOR_PACKAGE = "torch_neuronx"
NAMESPACE = "nsa_trn2"
DEVICES = ("neuron", "xla", "privateuseone")
NOT_RUN = "neuron:hw has not been run on hardware yet: compare with neuron:sim before you trust it"

_operations: dict[str, OpOverload] = {}


def hindrance() -> str:
    """Why kernels cannot run on a Trainium here; empty: they can."""
    if importlib.util.find_spec(VENDOR_PACKAGE) is None:
        return f"AWS's package '{VENDOR_PACKAGE}' is not installed"
    try:
        importlib.import_module(VENDOR_PACKAGE)  # registers the device
    except ImportError as error:
        return f"AWS's package '{VENDOR_PACKAGE}' cannot be imported: {error}"
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type not in DEVICES:
        return f"torch sees no Neuron device (accelerator: {found})"
    return ""


def start(kernel: Any, lnc: int, tensors: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """Runs a kernel on `lnc` cores, or adds it to the graph that is being captured."""
    # `wrap_nki(kernel[lnc])` would silently build for one core.
    return importlib.import_module(VENDOR_PACKAGE).wrap_nki(kernel)[lnc](*tensors, **constants)


def operation(spec: OpSpec, launch: Lowered) -> OpOverload:
    """The operator `torch.ops.nsa_trn2.<op>` that runs a launcher, with the spec's schema.

    Args:
        spec: the op.
        launch: takes the spec's arguments by name, of any shape; lays out and starts kernels.
    """
    if spec.name not in _operations:
        log.warning(NOT_RUN)

        @functools.wraps(spec.reference)
        def call(*args: Any, **kwargs: Any) -> Any:
            given: dict[str, Tensor | Any] = dict(zip(spec.names, args, strict=False))
            return launch(**{**spec.defaults, **given, **kwargs})

        vendor = importlib.import_module(VENDOR_PACKAGE)
        vendor.nki_op(f"{NAMESPACE}::{spec.name}", call, mutates_args=())
        _operations[spec.name] = getattr(getattr(torch.ops, NAMESPACE), spec.name).default
    return _operations[spec.name]
