"""Arithmetic intensity, and what bounds a kernel: the roofline of one launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..cost import Parameters, Timeline
    from ..issue.record import Instruction

PE_SIDE = 128  # rows and columns of the multiplier array
LANES = 128  # elements per cycle of VectorE and ScalarE


@dataclass(frozen=True)
class Roofline:
    """A kernel's place under the roofs of its cores.

    Attributes:
        unit: "flop" where the kernel multiplies matrices, else "element": one per element written
            on VectorE, ScalarE and GpSimdE.
        work: how many.
        hbm_bytes: read plus written by DMA.
        intensity: work per HBM byte; infinite without HBM traffic.
        achieved: work per ns.
        roof: work per ns at most, at the dtypes in use.
        bandwidth: HBM bytes per ns at most.
        achieved_bandwidth: HBM bytes per ns.
    """

    unit: str
    work: float
    hbm_bytes: int
    intensity: float
    achieved: float
    roof: float
    bandwidth: float
    achieved_bandwidth: float

    @property
    def ridge(self) -> float:
        """Intensity from which the roof is compute."""
        return self.roof / self.bandwidth

    @property
    def bound(self) -> str:
        """ "memory" or "compute"."""
        return "memory" if self.intensity < self.ridge else "compute"

    @property
    def ceiling(self) -> float:
        """Work per ns at this intensity at most."""
        return min(self.roof, self.intensity * self.bandwidth)

    @property
    def share(self) -> float:
        """Achieved part of the ceiling; of the bandwidth where that is the ceiling."""
        if self.bound == "memory":
            return self.achieved_bandwidth / self.bandwidth
        return self.achieved / self.roof


def flops_per_ns(instruction: Instruction, p: Parameters) -> float:
    """Peak of the array for the dtype of a matmul: bf16 78.6, fp32 a quarter, fp8 pairs double."""
    peak = 2 * PE_SIDE * PE_SIDE * p.pe_clock
    if instruction.reads[1].layout.dtype.itemsize == 4:
        return peak / (p.pe_fp32_passes * p.pe_fp32_rows)
    return peak * (2 if instruction.params[4] == "double_row" else 1)


def roofline_of(t: Timeline) -> Roofline:
    """The place of a timeline."""
    p, cores = t.parameters, t.run.lnc
    flops = hbm = elements = 0
    at_peak = 0.0
    for cost, i in zip(t.costs, t.instructions, strict=True):
        if cost.transfer:
            hbm += cost.transfer.hbm_bytes
        elif cost.flops:
            flops += cost.flops
            at_peak += cost.flops / flops_per_ns(i, p)
        elif cost.engine in ("vector", "scalar", "gpsimd"):
            elements += sum(a.layout.size for a in i.writes[:1])
    if flops:
        unit, work, roof = "flop", flops, flops / at_peak * cores
    else:
        unit, work = "element", elements
        roof = LANES * (p.vector_clock + p.scalar_clock) * cores
    total = t.total or 1.0
    intensity = work / hbm if hbm else float("inf")
    return Roofline(unit, work, hbm, intensity, work / total, roof, p.hbm_stack, hbm / total)
