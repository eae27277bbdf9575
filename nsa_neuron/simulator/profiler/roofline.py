"""What bounds a kernel, counted so that needless work does not look like more of it.

Work is what the kernel's results need: a matrix product that is computed twice (on both cores, or
again in a loop) counts once, and so does a byte of HBM that is moved twice. Time is all there was.
So a kernel that does less for the same results is nearer to its roof, never further away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..cost.dma import ENGINES
from .flow import Flow, first_of_each
from .needed import needed_bytes

if TYPE_CHECKING:
    from ..cost import Parameters, Timeline
    from ..issue.record import Instruction

PE_SIDE = 128  # rows and columns of the multiplier array


@dataclass(frozen=True)
class Roofline:
    """A kernel's place under the roofs of its cores; rates are per ns.

    Attributes:
        flops: of matrix products, each counted once.
        flops_done: of all that were computed.
        needed_bytes: of HBM, see `needed.needed_bytes`.
        hbm_bytes: read plus written by DMA.
        total: ns.
        peak: flops at most, at the dtypes in use; 0 without matrix products.
        hbm: HBM bytes at most.
        dma: HBM bytes at most that the DMA engines of the launch's cores can carry, in the mix of
            loads, stores and copies at hand.
    """

    flops: int
    flops_done: int
    needed_bytes: int
    hbm_bytes: int
    total: float
    peak: float
    hbm: float
    dma: float

    @property
    def unit(self) -> str:
        """ "flop" where the kernel multiplies matrices, else "byte"; "none" without HBM too."""
        return "flop" if self.flops else "byte" if self.needed_bytes else "none"

    @property
    def bandwidth(self) -> float:
        """HBM bytes that can move at most: the lower of two ceilings."""
        return min(self.hbm, self.dma)

    @property
    def intensity(self) -> float:
        """Flops per needed HBM byte; infinite without HBM traffic."""
        return self.flops / self.needed_bytes if self.needed_bytes else float("inf")

    @property
    def ridge(self) -> float:
        """Intensity from which the roof is compute."""
        return self.peak / self.bandwidth

    @property
    def bound(self) -> str:
        """ "compute", "HBM", "DMA engines" or "none": whose ceiling is the lowest."""
        if self.unit == "none" or (self.unit == "flop" and self.intensity >= self.ridge):
            return "compute" if self.flops else "none"
        return "HBM" if self.hbm <= self.dma else "DMA engines"

    @property
    def achieved(self) -> float:
        """Work of the unit per ns."""
        work = self.flops if self.flops else self.needed_bytes
        return work / self.total if self.total else 0.0

    @property
    def ceiling(self) -> float:
        """Work of the unit per ns at most."""
        if self.flops:
            return min(self.peak, self.intensity * self.bandwidth)
        return self.bandwidth

    @property
    def share(self) -> float | None:
        """Achieved part of the ceiling, None where there is none."""
        return None if self.unit == "none" else self.achieved / self.ceiling

    @property
    def achieved_bandwidth(self) -> float:
        """HBM bytes that moved per ns, needed or not."""
        return self.hbm_bytes / self.total if self.total else 0.0


def flops_per_ns(instruction: Instruction, p: Parameters) -> float:
    """Peak of the array for the dtype of a matmul: bf16 78.6, fp32 a quarter, fp8 pairs double."""
    peak = 2 * PE_SIDE * PE_SIDE * p.pe_clock
    if instruction.reads[1].layout.dtype.itemsize == 4:
        return peak / (p.pe_fp32_passes * p.pe_fp32_rows)
    return peak * (2 if instruction.params.perf_mode == "double_row" else 1)


def roofline_of(t: Timeline) -> Roofline:
    """The place of a timeline."""
    p, cores = t.parameters, t.run.lnc
    multiplies = [k for k, cost in enumerate(t.costs) if cost.flops]
    done = sum(t.costs[k].flops for k in multiplies)
    at_peak = sum(t.costs[k].flops / flops_per_ns(t.instructions[k], p) for k in multiplies)
    useful = first_of_each(Flow(t.run).values) if multiplies else ()
    transfers = [cost.transfer for cost in t.costs if cost.transfer]
    moved = sum(x.hbm_bytes for x in transfers)
    carried = sum(x.nbytes for x in transfers if x.hbm_bytes)
    return Roofline(
        flops=sum(t.costs[k].flops for k in multiplies if k in useful),
        flops_done=done,
        needed_bytes=needed_bytes(t.run),
        hbm_bytes=moved,
        total=t.total,
        peak=done / at_peak * cores if done else 0.0,
        hbm=p.hbm_stack,
        dma=ENGINES * p.dma_rate * cores * (moved / carried if carried else 1.0),
    )
