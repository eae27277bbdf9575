"""Memory regions, as the kernel names them (`nl.sbuf`, ...)."""

from __future__ import annotations

from enum import Enum


class MemoryRegion(Enum):
    """Where a tensor lives."""

    sbuf = "sbuf"
    psum = "psum"
    private_hbm = "private_hbm"
    shared_hbm = "shared_hbm"

    def __str__(self) -> str:
        return self.value


REGIONS: dict[str, MemoryRegion] = {r.value: r for r in MemoryRegion}
