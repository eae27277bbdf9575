"""Capacity of SBUF and PSUM, from which tensors are live at the same time.

The compiler frees a tensor after its last use. So a tensor occupies its bytes from the first
instruction after it was made to the last one that touched it, in program order. Tensors that the
compiler places share partitions bytes; those with `address=` occupy exactly theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .context import locate, violate

if TYPE_CHECKING:
    from .machine import Machine
    from .memory import Allocation
    from .record import CoreTrace, Run


def peak(trace: CoreTrace, buffer: str, machine: Machine) -> tuple[int, list[Allocation]]:
    """Bytes per partition live at most, and what was live then, largest first.

    PSUM tensors count in whole banks of 2 KiB.
    """
    events: list[tuple[int, int, int, Allocation]] = []
    for number, a in enumerate(trace.allocations):
        if a.buffer == buffer and a.last_use >= 0:
            events.append((a.created, 1, number, a))
            events.append((a.last_use + 1, 0, number, a))
    events.sort(key=lambda e: e[:3])
    live: dict[int, Allocation] = {}
    now = best = 0
    at_best: list[Allocation] = []
    addressed: dict[tuple[int, int], int] = {}
    for _, start, number, a in events:
        size = _footprint(a, machine)
        span = (a.address[1], size) if a.address else None
        if start:
            live[number] = a
            if span is None or _count(addressed, span, 1):
                now += size
        else:
            del live[number]
            if span is None or _count(addressed, span, -1):
                now -= size
        if now > best:
            best, at_best = now, list(live.values())
    at_best.sort(key=lambda a: -a.pitch_bytes)
    return best, at_best


def _count(spans: dict[tuple[int, int], int], span: tuple[int, int], step: int) -> bool:
    """Count users of an address span; True when it becomes used or unused."""
    before = spans.get(span, 0)
    spans[span] = before + step
    return before == 0 or before + step == 0


def _footprint(a: Allocation, machine: Machine) -> int:
    if a.buffer == "psum":
        bank = machine.psum_bank_bytes
        return -(-a.pitch_bytes // bank) * bank
    return a.pitch_bytes


def check(trace: CoreTrace, machine: Machine) -> dict[str, int]:
    """Refuse a run that needs more SBUF or PSUM than there is; return the peaks.

    Raises:
        CapacityError: the largest live tensors and the lines that made them.
    """
    peaks = {}
    for buffer, limit in (("sbuf", machine.sbuf_bytes), ("psum", machine.psum_bytes)):
        peaks[buffer], live = peak(trace, buffer, machine)
        if peaks[buffer] > limit:
            rows = tuple(
                f"{a.pitch_bytes:>8} bytes per partition: {a.name or 'tensor'} {list(a.shape)} "
                f"{a.dtype}, made at {locate(a.site)}"
                for a in live[:8]
            )
            violate(
                f"{buffer}-capacity",
                f"{len(live)} tensors are live at once",
                value=peaks[buffer],
                limit=limit,
                table=rows,
                location=locate(live[0].site),
            )
        _check_overlap(trace, buffer)
    return peaks


def check_hbm(run: Run, machine: Machine) -> int:
    """Refuse a run whose arguments and HBM tensors exceed the stack its cores share; bytes live.

    Raises:
        CapacityError: the largest tensors and the lines that made them.
    """
    live = [
        a
        for core in run.cores
        for b in ("shared_hbm", "private_hbm")
        for a in peak(core, b, machine)[1]
    ]
    live = sorted([*run.arguments, *live], key=lambda a: -a.pitch_bytes)
    total = sum(a.pitch_bytes for a in live)
    if total > machine.hbm_bytes:
        violate(
            "hbm-capacity",
            f"{len(live)} tensors are live at once",
            value=total,
            limit=machine.hbm_bytes,
            table=tuple(
                f"{a.pitch_bytes:>14} bytes: {a.name or 'tensor'} {list(a.shape)} {a.dtype}"
                + (f", made at {locate(a.site)}" if a.site else ", an argument")
                for a in live[:8]
            ),
            location=locate(next((a.site for a in live if a.site), None)),
        )
    return total


def _check_overlap(trace: CoreTrace, buffer: str) -> None:
    """Refuse two addressed tensors that overlap in place and time, unless one is the other's alias.

    Tensors at the very same address with the same extent are aliases on purpose only when their
    lifetimes do not meet; a partial overlap while both live is refused too.
    """
    placed = [a for a in trace.allocations if a.buffer == buffer and a.address and a.last_use >= 0]
    placed.sort(key=lambda a: a.created)
    active: list[Allocation] = []
    for a in placed:
        active = [b for b in active if b.last_use > a.created]
        for b in active:
            if _meet(a, b):
                violate(
                    "address-overlap",
                    f"{a.name or a.shape} at {a.address} overlaps {b.name or b.shape} at "
                    f"{b.address}, which is still used later",
                    value=a.address,
                    location=locate(a.site),
                    table=(f"the other was made at {locate(b.site)}",),
                )
        active.append(a)


def _meet(a: Allocation, b: Allocation) -> bool:
    assert a.address is not None and b.address is not None
    return (
        a.address[0] < b.address[0] + b.partitions
        and b.address[0] < a.address[0] + a.partitions
        and a.address[1] < b.address[1] + b.pitch_bytes
        and b.address[1] < a.address[1] + a.pitch_bytes
    )
