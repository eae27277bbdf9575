"""Rules of advice about DMA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..cost import Cause
from .candidates import FEW, Candidate, Rule, spell
from .lines import short
from .what_if import CAUSE, Baseline, Change, changed, with_transfer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..cost import Parameters
    from ..cost.dma import Transfer
    from ..cost.instructions import Cost

GOOD_ROW = 2048  # bytes per descriptor that reach full rate (SDK nki-dma-overview)


def _of(base: Baseline, k: int) -> Transfer:
    """The transfer of an instruction that is one."""
    transfer = base.t.costs[k].transfer
    assert transfer is not None
    return transfer


def _transfers(base: Baseline) -> Iterator[list[int]]:
    """DMA transfers, line by line."""
    for indices in base.by_line.values():
        found = [k for k in indices if base.t.costs[k].transfer]
        if found:
            yield found


def small_rows(base: Baseline) -> Iterator[Candidate]:
    """Descriptors under 2 KiB: their fixed time outweighs their bytes."""
    p = base.t.parameters
    for line in _transfers(base):
        found = [k for k in line if _of(base, k).row_bytes < GOOD_ROW]
        if not found:
            continue
        costs = changed(base.t, found, lambda c: _longer_rows(c, p))
        rows = {round(_of(base, k).row_bytes) for k in found}
        saved = _packets_saved(base, costs)
        yield Candidate(
            "dma-small-rows",
            found,
            f"descriptors of {spell(rows)} bytes; take at least {GOOD_ROW} contiguous bytes per "
            "row on both sides (a wider tile, or another layout in HBM)",
            Change(costs=costs),
            saved,
        )


def _longer_rows(cost: Cost, p: Parameters) -> Cost:
    """The transfer with its bytes in rows of 2 KiB."""
    t = cost.transfer
    assert t is not None
    moved = t.descriptors * t.row_bytes
    rows = max(1.0, moved / GOOD_ROW)
    runs = min(t.hbm_runs, rows)
    less = (t.descriptors - rows) * p.dma_descriptor + (t.hbm_runs - runs) * p.dma_hbm_run
    packets = sum(time for _, time in t.parts)
    keep = max(0.0, 1 - less / packets) if packets else 1.0
    swdge = p.dma_descriptor_swdge * (t.descriptors - rows) if t.trigger == "gpsimd" else 0.0
    return with_transfer(
        cost,
        parts=tuple((e, time * keep) for e, time in t.parts),
        trigger_time=t.trigger_time - swdge,
    )


def _packets_saved(base: Baseline, costs: dict[int, Cost]) -> float:
    """Ns that the busiest DMA engine of each transfer is spared."""
    saved = 0.0
    for k, new in costs.items():
        old, less = base.t.costs[k].transfer, new.transfer
        assert old is not None and less is not None
        saved += max((t for _, t in old.parts), default=0.0) + old.completion + old.trigger_time
        saved -= max((t for _, t in less.parts), default=0.0) + less.completion + less.trigger_time
    return saved


def few_engines(base: Baseline) -> Iterator[Candidate]:
    """Transfers that touch few partitions use few of the 16 DMA engines."""
    for line in _transfers(base):
        found = [k for k in line if len(_of(base, k).parts) <= 8]
        if not found:
            continue
        costs = changed(base.t, found, _spread)
        counts = {len(_of(base, k).parts) for k in found}
        yield Candidate(
            "dma-few-engines",
            found,
            f"each transfer uses {spell(counts)} of 16 DMA engines (8 partitions share one); "
            "move tiles of 128 partitions",
            Change(costs=costs),
            _packets_saved(base, costs),
        )


def _spread(cost: Cost) -> Cost:
    assert cost.transfer is not None
    work = sum(time for _, time in cost.transfer.parts)
    return with_transfer(cost, parts=tuple((e, work / 16) for e in range(16)))


def small_transfers(base: Baseline) -> Iterator[Candidate]:
    """Many transfers of a few KiB: trigger and completion are paid for each."""
    for line in _transfers(base):
        found = [k for k in line if _of(base, k).nbytes < 64 * 1024]
        if len(found) < FEW:
            continue
        sizes = {_of(base, k).nbytes for k in found}
        together = min(len(found), max(2, 64 * 1024 // max(sizes)))
        costs = changed(
            base.t,
            found,
            lambda c, n=together: with_transfer(  # type: ignore[misc]
                c,
                completion=c.transfer.completion / n,
                trigger_time=c.transfer.trigger_time / n,
            ),
        )
        yield Candidate(
            "dma-small-transfers",
            found,
            f"{len(found)} transfers of {spell(sizes)} bytes; move {together} in one dma_copy",
            Change(costs=costs),
            _packets_saved(base, costs),
        )


def reloads(base: Baseline) -> Iterator[Candidate]:
    """The same bytes of HBM loaded again."""
    seen: set[object] = set()
    written = {a.allocation for i in base.t.instructions for a in i.writes}
    for line in _transfers(base):
        again = []
        for k in line:
            i = base.t.instructions[k]
            source = i.reads[0]
            if source.allocation.on_chip or source.dynamic or source.allocation in written:
                continue
            core = base.t.lane_core[base.t.lane[k]]
            key = (core, source.allocation, source.start, source.layout)
            if key in seen:
                again.append(k)
            seen.add(key)
        if again:
            yield _reload(base, again)


def _reload(base: Baseline, again: list[int]) -> Candidate:
    costs = changed(
        base.t,
        again,
        lambda c: with_transfer(c, parts=(), start=0.0, completion=0.0, trigger_time=0.0),
    )
    nbytes = sum(_of(base, k).nbytes for k in again)
    return Candidate(
        "hbm-reload",
        again,
        f"{nbytes:,} bytes are loaded that were loaded before; load them once, outside the loop, "
        "and keep them in SBUF",
        Change(costs=costs),
        _packets_saved(base, costs) + float(base.t.stall[again].sum()),
    )


def single_buffer(base: Baseline) -> Iterator[Candidate]:
    """Transfers that wait until a tile they refill is free: no overlap of load and use.

    All such lines are one candidate: freeing one buffer helps little while another still waits.
    """
    kinds = (int(Cause.WAR), int(Cause.WAW))
    t = base.t
    refills: list[list[int]] = []
    for line in _transfers(base):
        on_chip = [k for k in line if t.instructions[k].writes[0].allocation.on_chip]
        if any(code & CAUSE in kinds for k in on_chip for code in base.program.deps[k]):
            refills.append(on_chip)
    every = sorted(k for line in refills for k in line)
    waits = [k for k in every if t.cause[k] in kinds]
    if waits:
        places = [short(base.lines.key(t.instructions[line[0]])) for line in refills]
        yield Candidate(
            "single-buffer",
            every,
            f"transfers wait until the tile they overwrite is free ({', '.join(places)}); make the "
            "tile inside the loop, or two of them in turn, so that the next load overlaps with the "
            "work",
            Change(without=(every, kinds)),
            float(t.stall[waits].sum()),
        )


def blocked_queue(base: Baseline) -> Iterator[Candidate]:
    """A transfer that waits at the head of its queue holds up those of other lines behind it."""
    t = base.t
    for line in _transfers(base):
        queue = t.lane[line[0]]
        if not any(t.costs[k].transfer for k in _others(base, line, int(queue))):
            continue
        waits = float(t.stall[line].sum())
        if waits and t.lanes[queue] != "dma-sync":
            yield Candidate(
                "dma-queue-blocked",
                line,
                f"waits at the head of queue {t.lanes[queue]}, with transfers of other lines "
                "behind it; issue it later, or on a queue of its own (dge_mode.hwdge)",
                Change(lanes=dict.fromkeys(line, "dma-sync")),
                waits,
            )


def _others(base: Baseline, line: list[int], queue: int) -> Iterator[int]:
    """Transfers of other lines in the same queue after the first of a line."""
    key = base.lines.key(base.t.instructions[line[0]])
    for other, indices in base.by_line.items():
        if other != key:
            yield from (k for k in indices if base.t.lane[k] == queue and k > line[0])


RULES: tuple[Rule, ...] = (
    small_rows,
    few_engines,
    small_transfers,
    reloads,
    single_buffer,
    blocked_queue,
)
