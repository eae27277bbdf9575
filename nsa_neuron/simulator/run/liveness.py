"""Capacity of SBUF and PSUM, from which tensors are live at the same time.

The compiler places a tensor for its first use and frees it after its last. So a tensor occupies its
bytes from the first instruction that touched it to the last one, in program order. Tensors that the
compiler places share partitions bytes; those with `address=` occupy exactly theirs.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from ..rules.session import locate, violate
from . import overlap

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..issue.record import CoreTrace, Run
    from ..machine.trn2 import Machine
    from ..memory.allocation import Allocation


def peak(trace: CoreTrace, buffer: str, machine: Machine) -> tuple[int, list[Allocation]]:
    """Bytes per partition live at most, and what was live then, largest first.

    PSUM tensors count in whole banks of 2 KiB.
    """
    used = [a for a in trace.allocations if a.buffer == buffer and a.last_use >= 0]
    if any(a.address for a in used):
        return _peak_with_addresses(used, machine)
    if not used:
        return 0, []
    first = np.array([a.first_use for a in used])
    after = np.array([a.last_use for a in used]) + 1
    sizes = np.array([_footprint(a, machine) for a in used])
    change = np.zeros(int(after.max()) + 1, np.int64)
    np.add.at(change, first, sizes)
    np.subtract.at(change, after, sizes)
    live = change.cumsum()
    when = int(live.argmax())
    there = [used[k] for k in np.flatnonzero((first <= when) & (after > when))]
    there.sort(key=lambda a: a.first_use)
    there.sort(key=lambda a: -a.pitch_bytes)
    return int(live[when]), there


def _peak_with_addresses(used: list[Allocation], machine: Machine) -> tuple[int, list[Allocation]]:
    """`peak` where some tensors share bytes, which count once."""
    events: list[tuple[int, int, int, Allocation]] = []
    for number, a in enumerate(used):
        events.append((a.first_use, 1, number, a))
        events.append((a.last_use + 1, 0, number, a))
    events.sort()  # the first three of each differ, so allocations are never compared
    live: dict[int, Allocation] = {}
    placed = best = 0
    at_best: list[Allocation] = []
    spans: Counter[tuple[int, int]] = Counter()
    covered = 0
    for _, start, number, a in events:
        size = _footprint(a, machine)
        if a.address is None:
            placed += size if start else -size
        else:
            span = (a.address[1], a.address[1] + size)
            spans[span] += 1 if start else -1
            if spans[span] == (1 if start else 0):
                covered = _union(s for s, users in spans.items() if users)
        if start:
            live[number] = a
        else:
            del live[number]
        if placed + covered > best:
            best, at_best = placed + covered, list(live.values())
    at_best.sort(key=lambda a: -a.pitch_bytes)
    return best, at_best


def _union(spans: Iterable[tuple[int, int]]) -> int:
    """Bytes that byte ranges [first, last) cover together."""
    total = end = 0
    for first, last in sorted(spans):
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


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
        overlap.check(trace, buffer)
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
