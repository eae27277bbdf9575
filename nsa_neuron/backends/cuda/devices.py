"""Which GPUs have tile plans, and which of them a device gets.

A plan is shipped for machines it was compiled for: on others its shared memory may not fit, and
matrix products would be other instructions. So a GPU that is not listed is refused before anything
is launched, by what it is and what it lacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

COMPILED_FOR = (9, 0)
SHARED_BYTES = 232_448
"""Shared memory a block of the shipped plans may use: what sm_90 has (`nsa compile-check`)."""

_H200_MEMORY = 120 * 2**30
"""Bytes between an H100's memory (80 or 96 GB) and an H200's (141 GB)."""


@dataclass(frozen=True)
class Gpu:
    """What decides about plans.

    Attributes:
        name: as the driver says. capability: major and minor. shared_bytes: the most of a block.
        memory: bytes of the device.
    """

    name: str
    capability: tuple[int, int]
    shared_bytes: int
    memory: int

    @property
    def plans(self) -> str:
        """The plan folder: `"h200"`, or `"h100"` for the same chip with slower, smaller memory."""
        return "h200" if "H200" in self.name or self.memory > _H200_MEMORY else "h100"

    @property
    def hindrance(self) -> str:
        """Why no shipped plan may run on it; empty: they may."""
        if self.capability != COMPILED_FOR:
            major, minor = self.capability
            return (
                f"{self.name} is sm_{major}{minor}; the tile plans are compiled for sm_90 "
                "(H100, H200) only"
            )
        if self.shared_bytes < SHARED_BYTES:
            return (
                f"{self.name} has {self.shared_bytes} bytes of shared memory per block; the tile "
                f"plans need up to {SHARED_BYTES}"
            )
        return ""


def gpu(index: int | None = None) -> Gpu:
    """The GPU of an index (default: the current one)."""
    number = torch.cuda.current_device() if index is None else index
    properties: Any = torch.cuda.get_device_properties(number)  # its stubs lack a field
    return Gpu(
        properties.name,
        (properties.major, properties.minor),
        properties.shared_memory_per_block_optin,
        properties.total_memory,
    )


def hindrance() -> str:
    """Why kernels cannot run on a GPU here; empty: they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return gpu().hindrance
