"""A profile as Chrome trace events, which ui.perfetto.dev and chrome://tracing open.

One process per core (pid = core + 1; 0 means the idle process to Perfetto), one thread per row:

- an engine's row: one slice per instruction while it takes the engine, [issue, free); it may go on
  in the pipeline until `args.end_ns`;
- a DMA queue's rows: one slice per transfer, [first byte, last byte); as many rows as overlap;
- "<lane> active": slices while the lane executes anything; their sum is the report's busy time;
- flow arrows from whoever decided when an instruction came to that instruction;
- counters of SBUF and PSUM bytes per partition in use.

Times are rounded to whole ns, as Perfetto stores them; `ts` and `dur` are microseconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cost import Cause
from ..machine.trn2 import machine_for
from .lines import PHRASES, Lines, in_words
from .memory import usage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..cost import Timeline

Event = dict[str, Any]

TIDS_PER_CORE = 1000


def write(t: Timeline, path: str | Path) -> None:
    """Write the trace as JSON, event by event."""
    about = {
        "modelled": "true, not measured",
        "kernel": t.run.kernel,
        "target": t.run.target,
        "params": t.parameters.set,
    }
    with Path(path).open("w") as file:
        file.write('{"displayTimeUnit": "ns",\n"otherData": ' + json.dumps(about))
        file.write(',\n"traceEvents": [\n')
        separator = ""
        for event in events(t):
            file.write(separator + json.dumps(event, separators=(",", ":")))
            separator = ",\n"
        file.write("\n]}\n")


def events(t: Timeline) -> Iterator[Event]:
    """All events of a timeline."""
    rows: dict[int, tuple[int, int, int]] = {}  # instruction -> pid, tid, ts in ns
    lines = Lines()
    stall = t.stall.tolist()
    for core in range(t.run.lnc):
        pid = core + 1
        name = {"name": f"core {core} (modelled)"}
        yield {"ph": "M", "pid": pid, "tid": 0, "name": "process_name", "args": name}
        tid = core * TIDS_PER_CORE + 1
        for lane in dict.fromkeys(t.lanes):
            members = t.members(lane, core)
            if not len(members):
                continue
            yield from _thread(pid, tid, f"{lane} active")
            yield from _active(t, members, pid, tid)
            tid += 1
            first = tid
            until = t.end if lane.startswith("dma") else t.free
            for k, row, since, end in _rows(t, members, until):
                if first + row == tid:
                    yield from _thread(pid, tid, lane if not row else f"{lane} ({row + 1})")
                    tid += 1
                rows[k] = (pid, first + row, since)
                about = _about(t, lines, k, stall[k])
                event = _interval(t.instructions[k].opcode, pid, first + row, since, end)
                yield {**event, "cat": t.costs[k].engine, "args": about}
        yield from _counters(t, core, pid)
    yield from _flows(t, rows)


def _thread(pid: int, tid: int, name: str) -> Iterator[Event]:
    about = {"ph": "M", "pid": pid, "tid": tid}
    yield {**about, "name": "thread_name", "args": {"name": name}}
    yield {**about, "name": "thread_sort_index", "args": {"sort_index": tid}}


def _active(t: Timeline, members: Any, pid: int, tid: int) -> Iterator[Event]:
    """Maximal intervals in which at least one instruction executes."""
    open_since = open_until = -1.0
    for since, until in zip(t.begin[members].tolist(), t.end[members].tolist(), strict=True):
        if since > open_until:
            if open_until > open_since:
                yield _interval("active", pid, tid, round(open_since), round(open_until))
            open_since, open_until = since, until
        else:
            open_until = max(open_until, until)
    if open_until > open_since:
        yield _interval("active", pid, tid, round(open_since), round(open_until))


def _interval(name: str, pid: int, tid: int, since: int, until: int) -> Event:
    return {
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "name": name,
        "ts": since / 1e3,
        "dur": (until - since) / 1e3,
    }


def _rows(t: Timeline, members: Any, until: Any) -> Iterator[tuple[int, int, int, int]]:
    """Instruction, row, begin and end in ns; on one row no two overlap."""
    ends: list[int] = []
    begins, stops = np.rint(t.begin[members]).astype(int), np.rint(until[members]).astype(int)
    for k, since, end in zip(members.tolist(), begins.tolist(), stops.tolist(), strict=True):
        end = max(end, since + 1)
        row = next((r for r, e in enumerate(ends) if e <= since), len(ends))
        if row == len(ends):
            ends.append(end)
        else:
            ends[row] = end
        yield k, row, since, end


def _about(t: Timeline, lines: Lines, k: int, stalled: float) -> Event:
    """What a slice's details show."""
    i, cost = t.instructions[k], t.costs[k]
    about: Event = {
        "index": k,
        "line": lines.short(i),
        "cost": cost.rule,
        "end_ns": round(float(t.end[k])),
    }
    if i.name:
        about["name"] = i.name
    if cost.transfer:
        about["bytes"] = cost.transfer.nbytes
    if stalled > 0:
        about["stalled_ns"] = round(stalled)
        about["waited_for"] = in_words(t, lines, k)
    for reason, ns in t.notes.get(k, {}).items():
        about[reason] = round(ns)
    return about


def _counters(t: Timeline, core: int, pid: int) -> Iterator[Event]:
    for buffer, (at, used) in usage(t, core, machine_for(t.run.target)).items():
        name = f"{buffer.upper()} bytes per partition"
        for time, value in zip(at.tolist(), used.tolist(), strict=True):
            yield {
                "ph": "C",
                "pid": pid,
                "name": name,
                "ts": round(time) / 1e3,
                "args": {"in use": value},
            }


def _flows(t: Timeline, rows: dict[int, tuple[int, int, int]]) -> Iterable[Event]:
    """An arrow per decided wait, from the start of the one slice to the start of the other."""
    number = 0
    for k in np.flatnonzero(t.blocker >= 0).tolist():
        blocker = int(t.blocker[k])
        if blocker not in rows or k not in rows or rows[blocker][2] > rows[k][2]:
            continue
        number += 1
        name = PHRASES[Cause(int(t.cause[k]))]
        for ph, (pid, tid, ts) in (("s", rows[blocker]), ("f", rows[k])):
            event: Event = {
                "ph": ph,
                "id": number,
                "pid": pid,
                "tid": tid,
                "ts": ts / 1e3,
                "name": name,
                "cat": "dependency",
            }
            yield {**event, "bp": "e"} if ph == "f" else event
