"""SBUF and PSUM in use over modelled time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..cost import Timeline
    from ..machine.trn2 import Machine
    from ..memory.allocation import Allocation

BUFFERS = ("sbuf", "psum")


def usage(
    t: Timeline, core: int, machine: Machine
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """Bytes per partition in use, as steps.

    A tensor occupies its bytes from the issue of the first instruction that touches it until the
    last one is done with them: a transfer at its end, an engine when it takes its next instruction,
    which cannot overtake. What only loads a register takes no time and counts as nothing. PSUM
    tensors count in whole banks. Tensors with an address count only where no other in use covers
    the same bytes.

    Args:
        t: a timeline.
        core: which core.
        machine: for the bank size.

    Returns:
        For "sbuf" and "psum": times in ns, and bytes from each time to the next.
    """
    spans = _spans(t, core)
    found = {}
    for buffer in BUFFERS:
        granule = machine.psum_bank_bytes if buffer == "psum" else 1
        events: list[tuple[float, int]] = []
        placed: dict[tuple[int, int], list[tuple[float, float]]] = {}
        for a, (first, last) in spans.items():
            if a.buffer != buffer:
                continue
            size = -(-a.pitch_bytes // granule) * granule
            if a.address:
                placed.setdefault((a.address[1], size), []).append((first, last))
            else:
                events += [(first, size), (last, -size)]
        for (_, size), uses in placed.items():
            for first, last in _merged(uses):
                events += [(first, size), (last, -size)]
        found[buffer] = _steps(events)
    return found


def _spans(t: Timeline, core: int) -> dict[Allocation, tuple[float, float]]:
    """First issue and last use of the users of each on-chip tensor."""
    offset = sum(len(c.instructions) for c in t.run.cores[:core])
    transfers = np.array([name.startswith("dma") for name in t.lanes])[t.lane]
    issue, end = t.issue.tolist(), np.where(transfers, t.end, t.free).tolist()
    spans: dict[Allocation, tuple[float, float]] = {}
    for k, i in enumerate(t.run.cores[core].instructions, offset):
        for a in (*i.writes, *i.reads) if i.opcode != "register_load" else ():
            allocation = a.allocation
            if not allocation.on_chip:
                continue
            before = spans.get(allocation)
            if before is None:
                spans[allocation] = (issue[k], end[k])
            else:
                spans[allocation] = (min(before[0], issue[k]), max(before[1], end[k]))
    return spans


def _merged(uses: list[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for first, last in sorted(uses):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def _steps(events: list[tuple[float, int]]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Running sum at each distinct time; at equal times room is given before it is taken."""
    if not events:
        return np.zeros(1), np.zeros(1, np.int64)
    times, changes = np.array([e[0] for e in events]), np.array([e[1] for e in events])
    at, place = np.unique(times, return_inverse=True)
    total = np.cumsum(np.bincount(place, weights=changes)).round().astype(np.int64)
    if at[0] > 0:
        at, total = np.insert(at, 0, 0.0), np.insert(total, 0, 0)
    return at, total
