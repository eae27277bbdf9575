"""Hardware loops: what a body's tensors are, what an iteration costs, how long a cut loop takes.

A device loop's body is never unrolled and its tensors are allocated once (SDK nki/deep-dives/
nki-loops; nki-060-dynamic-loop-migration-guide). Each engine goes through its own instructions of
the body, so an iteration begins on an engine as soon as that engine is done with the one before,
and waits only for the operands and for the tensors that both iterations use.
"""

from __future__ import annotations

from collections import defaultdict
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..memory.allocation import access_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..issue.record import CoreTrace, LoopMark
    from ..memory.allocation import Access, Allocation
    from .timeline import Timeline

Accesses = list[tuple[tuple["Access", ...], tuple["Access", ...]]]  # writes and reads
LIMIT = 0.02


def allocated_once(trace: CoreTrace) -> tuple[Accesses, set[Allocation]] | None:
    """Operands of each instruction with the tensors of a loop's body allocated once.

    Returns:
        writes and reads of each instruction, and the tensors read for addresses; None for a
        kernel without hardware loops.
    """
    if not trace.loops:
        return None
    first = _first_made(trace)
    shadows: dict[Allocation, Allocation] = {}
    for made, original in first.items():
        shadow = shadows.get(original)
        if shadow is None:
            shadow = shadows[original] = copy(original)
        shadow.written |= made.written
        for use in (made.first_use, made.last_use):
            if use >= 0:
                shadow.first_use = use if shadow.first_use < 0 else min(shadow.first_use, use)
                shadow.last_use = max(shadow.last_use, use)
        shadows[made] = shadow
    known: dict[tuple[Allocation, object], Access] = {}

    def once(accesses: tuple[Access, ...]) -> tuple[Access, ...]:
        return tuple(
            [_moved(a, shadows, known) if a.allocation in shadows else a for a in accesses]
        )

    found = [(once(i.writes), once(i.reads)) for i in trace.instructions]
    return found, {shadows.get(a, a) for a in trace.indexed}


def _moved(
    a: Access, shadows: dict[Allocation, Allocation], known: dict[tuple[Allocation, object], Access]
) -> Access:
    key = (shadows[a.allocation], a.place)
    found = known.get(key)
    if found is None:
        found = known[key] = access_at(*key)
    return found


def _first_made(trace: CoreTrace) -> dict[Allocation, Allocation]:
    """For each tensor that a later iteration made, the one that the first made in its place."""
    first: dict[Allocation, Allocation] = {}
    start: dict[int, list[Allocation]] = {}
    for mark in trace.loops:
        made = trace.allocations[slice(*mark.made)]
        if mark.iteration == 0:
            start[mark.loop] = made
            continue
        for new, old in zip(made, start[mark.loop], strict=False):
            if new.form is not old.form:
                break  # the iterations make different tensors from here on
            first[new] = old
    # What an inner loop made first may itself have a counterpart in the outer loop's first turn.
    for new, old in first.items():
        while old in first:
            old = first[old]
        first[new] = old
    return first


def gates(trace: CoreTrace, lanes: Sequence[int]) -> dict[int, list[int]]:
    """Register loads that an instruction waits for because a loop's next iteration depends on them.

    Args:
        trace: what a core did.
        lanes: of each instruction.

    Returns:
        indices of loads, by the first instruction of each lane in an iteration.
    """
    found: defaultdict[int, list[int]] = defaultdict(list)
    for mark in trace.loops:
        if mark.waits:
            for index in {lanes[k]: k for k in range(mark.last - 1, mark.first - 1, -1)}.values():
                found[index] += [load.index for load in mark.waits]
    return found


def iteration_ends(trace: CoreTrace, engine: Sequence[str]) -> dict[int, int]:
    """How many iterations end with an instruction: each engine's last of each iteration.

    Args:
        trace: what a core did.
        engine: of each instruction, that executes or triggers it.
    """
    ends: defaultdict[int, int] = defaultdict(int)
    for mark in trace.loops:
        for index in {engine[k]: k for k in range(mark.first, mark.last)}.values():
            ends[index] += 1
    return ends


@dataclass(frozen=True)
class Continued:
    """The loops of a run of which only the first iterations were run.

    Attributes:
        added: ns that the iterations left out take.
        left_out: how many iterations that are, inner ones of outer ones included.
        error: largest relative difference of a loop's pace in its third quarter and in its second
            half, of the iterations that were run.
    """

    added: float = 0.0
    left_out: int = 0
    error: float = 0.0

    def describe(self, run: float) -> str:
        """The sentence a report repeats; `run` is the ns of what was run."""
        return (
            f"{self.left_out:,} iterations of hardware loops were not run but continued at the "
            f"pace of those that were: {run / 1e3:.2f} us were run, {self.added / 1e3:.2f} us "
            "continued. All below the time is of the part that was run, whose pace differs by "
            f"{self.error:.2%} between its third quarter and its second half"
        )


def continued(t: Timeline) -> Continued:
    """How long the iterations take that a run left out, at the pace of those it ran.

    Raises:
        ValueError: the pace of a loop has not settled: it still changes by more than 2 %.
    """
    cores = []
    offset = 0
    for core in t.run.cores:
        cores.append(_of_core(t, core, offset))
        offset += len(core.instructions)
    worst = max(cores, key=lambda c: c.added, default=Continued())
    error = max((c.error for c in cores), default=0.0)
    if error > LIMIT:
        raise ValueError(
            f"a hardware loop has not settled: its pace still changes by {error:.1%}, more than "
            f"{LIMIT:.0%}: run more iterations"
        )
    return Continued(worst.added, worst.left_out, error)


def _of_core(t: Timeline, core: CoreTrace, offset: int) -> Continued:
    """The loops of one core: marks come inner before outer, each at the end of its iteration."""
    loops: dict[int, list[LoopMark]] = defaultdict(list)
    for mark in core.loops:
        loops[mark.loop].append(mark)
    # Of each loop: ns that it left out, its iterations and those of its inner loops, had all been
    # run, and those that were.
    known: dict[int, tuple[float, float, int]] = {}
    error = 0.0
    outermost: list[tuple[int, int]] = []  # first instruction and number
    for number, marks in sorted(loops.items(), key=lambda x: (x[1][-1].last, -x[1][0].first)):
        count, inner = len(marks), []
        while outermost and outermost[-1][0] >= marks[0].first:
            inner.append(outermost.pop()[1])
        outermost.append((marks[0].first, number))
        below, full, ran = (sum(known[n][k] for n in inner) for k in range(3))
        trips = core.trips.get(number, count)
        pace, off = _pace(t, marks, offset) if trips > count else (0.0, 0.0)
        error = max(error, off)
        added = below * trips / count + (trips - count) * pace
        known[number] = added, trips * (1 + full / count), int(ran) + count
    rows = [known[number] for _, number in outermost]
    left = sum(round(full) - ran for _, full, ran in rows)
    return Continued(sum(row[0] for row in rows), left, error)


def _pace(t: Timeline, marks: Sequence[LoopMark], offset: int) -> tuple[float, float]:
    """Ns per iteration once a loop has settled, and the error of predicting its last quarter."""
    ends = []
    latest = 0.0
    for mark in marks:
        part = t.end[offset + mark.first : offset + mark.last]
        latest = max(latest, float(part.max()) if len(part) else latest)
        ends.append(latest)
    n = len(ends)
    if n < 8:
        raise ValueError(f"a hardware loop of which {n} iterations were run: run at least 8")
    half, later = n // 2, n - n // 4
    before = (ends[later - 1] - ends[half - 1]) / (later - half)
    pace = (ends[-1] - ends[half - 1]) / (n - half)
    return pace, abs(before / pace - 1) if pace else 0.0
