"""What one DMA transfer costs: descriptors, the DMA engines that run them, who triggers it.

A transfer is cut where either side stops being contiguous; each piece is a descriptor
(docs/trainium2.md 6.5). Eight neighbouring partitions share one of 16 DMA engines. An engine needs
`dma_descriptor` ns per descriptor, `dma_hbm_run` ns for each run that is contiguous in HBM and
its bytes at `dma_rate` (the profiler's packet time), and `dma_completion` ns per transfer.
"""

from __future__ import annotations

from math import ceil, lcm
from typing import TYPE_CHECKING

from ..issue.timing import Dma

if TYPE_CHECKING:
    from ..issue.record import Instruction
    from ..memory.allocation import Access
    from ..memory.layout import Layout
    from .parameters import Parameters

ENGINES = 16
PARTITIONS_PER_ENGINE = 8


class Transfer:
    """One DMA transfer.

    Attributes:
        queue: lane it waits in: "dma-load", "dma-store", "dma-copy" (static descriptors),
            "dma-sync", "dma-scalar" (hardware descriptors) or "dma-gpsimd" (software).
        trigger: engine that triggers it.
        trigger_time: ns of that engine.
        start: ns from trigger to first byte.
        completion: ns of each engine beside the packets.
        nbytes: bytes written.
        hbm_bytes: bytes read from plus bytes written to HBM.
        descriptors: contiguous pieces.
        row_bytes: bytes per descriptor.
        hbm_runs: contiguous runs in HBM.
        uniform: ns of packets where all engines have the same, else 0.
        parts: (DMA engine, ns of packets) for each engine that takes part.
        rule: in words, for the report.
        guesses: names of the constants in it that no source gives for this machine.
    """

    __slots__ = (
        "completion",
        "descriptors",
        "guesses",
        "hbm_bytes",
        "hbm_runs",
        "nbytes",
        "parts",
        "queue",
        "row_bytes",
        "rule",
        "start",
        "trigger",
        "trigger_time",
        "uniform",
    )

    queue: str
    trigger: str
    trigger_time: float
    start: float
    completion: float
    uniform: float
    nbytes: int
    hbm_bytes: int
    descriptors: int
    row_bytes: float
    hbm_runs: int
    parts: tuple[tuple[int, float], ...]
    rule: str
    guesses: tuple[str, ...]

    def use(self, parts: tuple[tuple[int, float], ...]) -> None:
        """Set the DMA engines that take part, with the packet time of each."""
        times = {time for _, time in parts}
        self.parts = parts
        self.uniform = times.pop() if len(parts) == ENGINES and len(times) == 1 else 0.0

    @property
    def duration(self) -> float:
        """Ns from trigger to last byte on idle DMA engines."""
        return self.start + max((t for _, t in self.parts), default=0.0) + self.completion


def contiguous_run(layout: Layout, rows_apart: bool = False) -> int:
    """Elements at the end of the pattern that lie next to each other.

    Args:
        layout: of one side.
        rows_apart: dim 0 is addressed by indices, so rows are never neighbours.
    """
    first = 1 if layout.pitch or rows_apart else 0
    run = 1
    dims = list(zip(layout.shape, layout.strides, strict=True))[first:]
    for count, step in reversed(dims):
        if count == 1:
            continue
        if step != run:
            break
        run *= count
    return run


def transfer_of(i: Instruction, p: Parameters) -> Transfer:
    """The transfer of a DMA instruction."""
    t = Transfer()
    dst, sources = i.writes[0], _sources(i)
    src = sources[0]
    indirect = (i.extra or {}).get("indirect") if isinstance(i.extra, dict) else None
    size = dst.layout.size
    runs = (
        contiguous_run(dst.layout, indirect == "scatter"),
        contiguous_run(src.layout, indirect == "gather"),
    )
    pieces = size // runs[0] + size // runs[1] - size // lcm(*runs)
    width = max(dst.layout.dtype.itemsize, src.layout.dtype.itemsize)
    moved = size * width * len(sources)
    t.nbytes = dst.nbytes
    t.hbm_bytes = sum(a.nbytes for a in (dst, *sources) if not a.allocation.on_chip)
    t.descriptors = max(pieces, ceil(moved / p.dma_packet)) * len(sources)
    t.row_bytes = moved / t.descriptors
    sides = ((dst, runs[0]), *((a, runs[1]) for a in sources))
    t.hbm_runs = sum(max(1, size // run) for a, run in sides if not a.allocation.on_chip)
    _choose_queue(i, t, dst, src, indirect, p)
    rate = p.dma_rate * _share(i, t, dst, src, p)
    if i.plan.formula is Dma.COLLECTIVE:
        rate *= p.dma_collective
    t.completion = p.dma_completion
    t.use(_spread(dst, src, t, moved, rate, p))
    t.rule = f"{t.descriptors} descriptors of {t.row_bytes:.0f} B on {len(t.parts)} DMA engines"
    if i.plan.formula is Dma.COLLECTIVE:
        t.rule += ", between devices as if they were one"
        t.guesses += ("dma_collective",)
    return t


def _sources(i: Instruction) -> list[Access]:
    """Operands that are data: not the index tensors, which come last."""
    if i.plan.formula in (Dma.COPY, Dma.TRANSPOSE, Dma.MESSAGE):
        return list(i.reads[:1])
    same = [a for a in i.reads if a.layout.size == i.writes[0].layout.size]
    return same or list(i.reads[:1])


def _choose_queue(
    i: Instruction, t: Transfer, dst: Access, src: Access, indirect: str | None, p: Parameters
) -> None:
    modes = {getattr(x, "name", None) for x in i.params}
    dynamic = dst.dynamic or src.dynamic
    if indirect or "swdge" in modes or (dynamic and "hwdge" not in modes):
        t.queue, t.trigger = "dma-gpsimd", "gpsimd"
        t.guesses = ("dma_trigger_swdge", "dma_descriptor_swdge")
        made = p.dma_trigger_swdge + p.dma_descriptor_swdge * t.descriptors
        t.trigger_time = max(made, p.dma_run_time) if dynamic and not indirect else made
        if t.trigger_time > made:
            t.guesses = ("dma_run_time",)
        t.start = p.dma_start
    elif "hwdge" in modes:
        t.trigger = "scalar" if "scalar" in modes else "sync"
        t.queue = f"dma-{t.trigger}"
        t.trigger_time = p.dma_run_time if dynamic else p.dma_trigger
        t.guesses = ("dma_run_time",) if dynamic else ()
        t.start = p.dma_start_hwdge
    else:
        t.guesses = ()
        to_chip, from_chip = dst.allocation.on_chip, src.allocation.on_chip
        kind = "copy" if to_chip == from_chip else "load" if to_chip else "store"
        t.queue, t.trigger, t.trigger_time = f"dma-{kind}", "sync", p.dma_trigger
        t.start = p.dma_start


def _share(i: Instruction, t: Transfer, dst: Access, src: Access, p: Parameters) -> float:
    """Share of the copy rate that a transposing transfer reaches."""
    if i.plan.formula is not Dma.TRANSPOSE:
        return 1.0
    if dst.layout.partitions % 128 or dst.layout.shape[-1] % 16:
        t.guesses += ("dma_transpose_other",)
        return p.dma_transpose_other
    return p.dma_transpose_sbuf if src.allocation.on_chip else p.dma_transpose


def _spread(
    dst: Access, src: Access, t: Transfer, moved: int, rate: float, p: Parameters
) -> tuple[tuple[int, float], ...]:
    """Time of each DMA engine: by partitions on chip, evenly between HBM tensors."""
    side = dst if dst.allocation.on_chip else src if src.allocation.on_chip else None
    if side is None:
        used = min(ENGINES, t.descriptors)
        shares = [(e, 1.0 / used) for e in range(used)]
    else:
        count = side.layout.partitions
        engines: dict[int, int] = {}
        for partition in range(side.partition, side.partition + count):
            e = partition // PARTITIONS_PER_ENGINE % ENGINES
            engines[e] = engines.get(e, 0) + 1
        shares = [(e, n / count) for e, n in engines.items()]
    crowded = max(1.0, t.hbm_bytes / max(moved, 1) * rate * ENGINES / p.hbm_stack)
    work = t.descriptors * p.dma_descriptor + moved * crowded / rate
    return tuple(
        (e, share * work + (max(1.0, share * t.hbm_runs) if t.hbm_runs else 0.0) * p.dma_hbm_run)
        for e, share in shares
    )
