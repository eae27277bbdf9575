"""A forward and its backward as CUDA graphs: one launch each instead of dozens.

Not yet run on a GPU. At 8K tokens and below, the host needs longer to launch the kernels of NSA
than the GPU needs to run them; a graph replays them at once. No op of this project waits for the
device or looks at values on it, so a graph that was captured once serves any values of its shapes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_neuron.errors import BackendUnavailable, InvalidArgument, InvalidType

WARM_UP = 3
"""Calls before the capture: the first one compiles kernels, which a capture must not."""

_OP = "graphed"


@dataclass(frozen=True)
class Graphed:
    """A captured function; call it with tensors like those it was captured with.

    Results (and gradients) lie in memory that the next call overwrites: use or copy them first.
    """

    replay: Callable[..., Any]
    samples: tuple[Tensor, ...]

    def __call__(self, *inputs: Tensor) -> Any:
        """Copies the inputs into the captured ones, replays, and gives the results.

        Raises:
            InvalidArgument: an input has another shape, dtype, device or `requires_grad`.
        """
        if len(inputs) != len(self.samples):
            found, wanted = f"{len(inputs)} tensors", f"{len(self.samples)}, as captured"
            raise InvalidArgument(_OP, "inputs", found, wanted)
        for number, (given, sample) in enumerate(zip(inputs, self.samples, strict=True)):
            if _kind(given) != _kind(sample):
                name, wanted = f"inputs[{number}]", f"{_described(sample)}, as captured"
                raise InvalidArgument(_OP, name, _described(given), wanted)
        return self.replay(*inputs)


def graphed(function: Callable[..., Any], *samples: Tensor) -> Graphed:
    """Captures `function(*samples)` and its backward as CUDA graphs.

    Args:
        function: tensors to a tensor or a tuple of them, made of this package's ops and of torch
            operations that do not wait for the device. Of a module, parameters get gradients, too;
            what a plain function closes over is read anew at every replay and gets none.
        samples: CUDA tensors of the shapes, dtypes and `requires_grad` of every later call; they
            are copied. Block ids and offsets among them must be legal ones.

    Raises:
        InvalidType: a sample is no tensor.
        InvalidArgument: a sample is not on a GPU, there is none, or NSA_CHECK_VALUES=1, which reads
            values from the device at every call and cannot be captured.
        BackendUnavailable: torch sees no CUDA device.
    """
    if not _gpu_there():
        raise BackendUnavailable("CUDA graphs need a GPU: torch sees no CUDA device")
    if not samples:
        raise InvalidArgument(_OP, "samples", "empty", "at least one CUDA tensor")
    for number, sample in enumerate(samples):
        if not isinstance(sample, Tensor):
            raise InvalidType(_OP, f"samples[{number}]", type(sample).__name__, "a tensor")
        if not _on_gpu(sample):
            raise InvalidArgument(_OP, f"samples[{number}]", f"on {sample.device}", "on a GPU")
    if os.environ.get("NSA_CHECK_VALUES") == "1":
        found, wanted = "'1'", "unset: its checks wait for the device"
        raise InvalidArgument(_OP, "NSA_CHECK_VALUES", found, wanted)
    # The capture's own inputs: every replay overwrites them.
    held = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in samples)
    replay = torch.cuda.make_graphed_callables(function, held, num_warmup_iters=WARM_UP)
    return Graphed(replay, held)


def _gpu_there() -> bool:
    return torch.cuda.is_available()


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _kind(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device, x.requires_grad


def _described(x: Tensor) -> str:
    grad = ", requires_grad" if x.requires_grad else ""
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}{grad}"
