"""Rules of advice about work that need not be done: on both cores, or at run time."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

from .candidates import Candidate, Rule
from .sketch import as_static
from .what_if import Baseline, Change

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..issue.record import CoreTrace, Instruction
    from .sketch import Sketch

MOST = 0.5  # share of what a core stores that the other core stores too


def same_work(base: Baseline) -> Iterator[Candidate]:
    """Both cores of a launch compute and store the same."""
    t = base.t
    if t.run.lnc != 2:
        return
    first = len(t.run.cores[0].instructions)
    stores = [
        k
        for k, i in enumerate(t.instructions)
        if i.engine == "dma" and not i.writes[0].allocation.on_chip
    ]
    twins = {_result(base, k): k for k in stores if k < first}
    pairs = [(twins[r], k) for k in stores if k >= first and (r := _result(base, k)) in twins]
    moved = sum(t.instructions[k].nbytes for k in stores if k >= first)
    again = sum(t.instructions[k].nbytes for _, k in pairs)
    if len(pairs) < 2 or again < MOST * moved:
        return
    half = len(pairs) // 2
    dropped = [one for one, _ in pairs[half:]] + [other for _, other in pairs[:half]]
    kept = _behind(base, set(stores) - set(dropped))
    gone = sorted(_behind(base, dropped) - kept)
    longest = max(sum(t.costs[k].interval for k in gone if (k < first) == own) for own in (0, 1))
    yield Candidate(
        "same-work-on-both-cores",
        [k for _, k in pairs],
        f"both cores store the same {again:,} bytes; let each do half: take the part of "
        "nl.program_id(0), of nl.num_programs(0) parts",
        Change(edits=(lambda sketch: _drop(sketch, gone),)),
        max(longest, sum(_packets(base, k) for k in gone) / 2),
    )


def _result(base: Baseline, k: int) -> tuple[object, ...]:
    """What a store leaves where."""
    a = base.t.instructions[k].writes[0]
    return (a.allocation, a.start, a.layout, base.flow.values[k])


def _behind(base: Baseline, ends: Iterable[int]) -> set[int]:
    """Some instructions and all whose results they depend on."""
    found: set[int] = set()
    open_ = list(ends)
    while open_:
        k = open_.pop()
        if k not in found:
            found.add(k)
            open_ += base.flow.origins[k]
    return found


def _packets(base: Baseline, k: int) -> float:
    transfer = base.t.costs[k].transfer
    return max(time for _, time in transfer.parts) if transfer else 0.0


def _drop(sketch: Sketch, gone: Iterable[int]) -> None:
    for k in gone:
        sketch.drop(k)


def run_time_operands(base: Baseline) -> Iterator[Candidate]:
    """Addresses that follow the index of a hardware loop whose bounds are known."""
    t = base.t
    known: dict[int, int] = {}
    loops: set[tuple[int, int]] = set()
    offset = 0
    for number, core in enumerate(t.run.cores):
        if core.trips:
            return  # what was not run cannot be unrolled
        for k, loop in _following_an_index(core).items():
            known[k + offset] = sum(m.loop == loop for m in core.loops)
            loops.add((number, loop))
        offset += len(core.instructions)
    if not known:
        return
    found = sorted(known)
    saved = sum(_run_time(base, t.instructions[k]) for k in found)
    yield Candidate(
        "run-time-operands",
        found,
        f"{len(found)} instructions have addresses that follow the index of a hardware loop of "
        f"{max(known.values())} iterations: run-time values, in a body whose tiles exist once. "
        "Unrolled (nl.static_range, or Python's range) they are constants, and tiles are made "
        "anew. What a run-time address costs is a guess (run_time_operand, dma_run_time)",
        Change(edits=(lambda sketch: _make_static(sketch, found),), unrolled=frozenset(loops)),
        saved + float(t.stall[found].sum()),
    )


def _run_time(base: Baseline, i: Instruction) -> float:
    p = base.parameters
    count = sum(a.dynamic for a in (*i.writes, *i.reads)) + i.plan.registers
    return p.dma_run_time if i.engine == "dma" else count * p.run_time_operand


def _following_an_index(core: CoreTrace) -> dict[int, int]:
    """Instructions whose run-time places are linear in a loop's index, with that loop."""
    loops = defaultdict(list)
    for mark in core.loops:
        loops[mark.loop].append(mark)
    found: dict[int, int] = {}
    for number, marks in loops.items():
        sizes = {m.last - m.first for m in marks}
        if len(marks) < 3 or len(sizes) > 1 or any(m.waits for m in marks):
            continue
        for j in range(sizes.pop()):
            same = [core.instructions[m.first + j] for m in marks]
            if _linear([_places(i) for i in same]):
                found.update(dict.fromkeys((m.first + j for m in marks), number))
    return found


def _places(i: Instruction) -> tuple[int, ...]:
    return tuple(a.start for a in (*i.writes, *i.reads) if a.dynamic)


def _linear(places: list[tuple[int, ...]]) -> bool:
    """True where each place moves on by the same number of elements, not 0, every time."""
    if not places[0] or len({len(p) for p in places}) > 1:
        return False
    steps = {tuple(b - a for a, b in zip(one, two, strict=True)) for one, two in pairwise(places)}
    return len(steps) == 1 and all(steps.pop())


def _make_static(sketch: Sketch, found: Iterable[int]) -> None:
    for k in found:
        i = sketch[k]
        reads, writes = (
            [as_static(a) if a.dynamic else a for a in kind] for kind in (i.reads, i.writes)
        )
        sketch.edit(k, reads=reads, writes=writes, static=True)


RULES: tuple[Rule, ...] = (same_work, run_time_operands)
