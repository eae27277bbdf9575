"""SBUF and PSUM in use over modelled time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..run.coverage import QUARTERS, Coverage, quarters, quarters_of

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
        For "sbuf" and "psum": times in ns, and bytes from each time to the next, on average over
        the partitions: two tiles of 64 partitions may lie beside one another.
    """
    spans = _spans(t, core)
    found = {}
    for buffer in BUFFERS:
        granule = machine.psum_bank_bytes if buffer == "psum" else 1
        events: list[tuple[float, float]] = []
        placed: list[tuple[float, float, Allocation]] = []
        for a, (first, last) in spans.items():
            if a.buffer != buffer:
                continue
            if a.address:
                placed.append((first, last, a))
            else:
                size = -(-a.pitch_bytes // granule) * granule * quarters(a, machine) / QUARTERS
                events += [(first, size), (last, -size)]
        found[buffer] = _steps(events + _covered(placed, granule, machine))
    return found


def _covered(
    placed: list[tuple[float, float, Allocation]], granule: int, machine: Machine
) -> list[tuple[float, float]]:
    """Changes of the bytes that tensors with addresses cover, each byte counted once."""
    ranges = {}
    for _, _, a in placed:
        assert a.address is not None
        size = -(-a.pitch_bytes // granule) * granule
        ranges[a] = (a.address[1], a.address[1] + size)
    covers = [Coverage(ranges.values()) for _ in range(QUARTERS)]
    changes = []
    order = [(first, 1, k) for k, (first, _, _) in enumerate(placed)]
    order += [(last, 0, k) for k, (_, last, _) in enumerate(placed)]
    for time, start, k in sorted(order):
        a = placed[k][2]
        first, last = ranges[a]
        for quarter in quarters_of(a, machine):
            before = covers[quarter].covered
            covers[quarter].change(first, last, 1 if start else -1)
            changes.append((time, (covers[quarter].covered - before) / QUARTERS))
    return changes


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


def _steps(events: list[tuple[float, float]]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Running sum at each distinct time; at equal times room is given before it is taken."""
    if not events:
        return np.zeros(1), np.zeros(1, np.int64)
    times, changes = np.array([e[0] for e in events]), np.array([e[1] for e in events])
    at, place = np.unique(times, return_inverse=True)
    total = np.cumsum(np.bincount(place, weights=changes)).round().astype(np.int64)
    if at[0] > 0:
        at, total = np.insert(at, 0, 0.0), np.insert(total, 0, 0)
    return at, total


def envelope(
    at: NDArray[np.float64], used: NDArray[np.int64], total: float, bins: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps to draw, up to `total` ns: all of them, or the most in use in each of so many bins."""
    at, most = np.append(at, total), np.append(used, used[-1]).astype(float)
    if len(at) <= 2 * bins:
        return at, most
    edges = np.linspace(0.0, total, bins + 1)
    starts = np.searchsorted(at, edges[:-1], side="right") - 1  # the step in use as a bin begins
    top = np.maximum.reduceat(most, starts)
    top[:-1] = np.maximum(top[:-1], most[starts[1:]])  # a step may begin in one bin and outlast it
    return edges, np.append(top, top[-1])
