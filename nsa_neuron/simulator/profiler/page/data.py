"""What the page of a profile shows, ready for JSON; times in ns unless a name says otherwise."""

from __future__ import annotations

import base64
import linecache
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cost import Cause
from ...machine.trn2 import machine_for
from ..lines import PHRASES, Lines
from ..memory import envelope, usage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...cost import Timeline
    from ..lines import Key

AROUND = 6  # lines of source shown before the first and after the last that issued something
STEPS = 4000  # steps of a memory curve


def collect(t: Timeline, facts: dict[str, Any]) -> dict[str, Any]:
    """Everything: the report, the instructions, the source, the memory."""
    lines = Lines()
    keys = [lines.key(i) for i in t.instructions]
    numbers = {key: n for n, key in enumerate(dict.fromkeys(keys))}
    names = {name: n for n, name in enumerate(dict.fromkeys(i.opcode for i in t.instructions))}
    rules = {rule: n for n, rule in enumerate(dict.fromkeys(c.rule for c in t.costs))}
    transfers = np.array([name.startswith("dma") for name in t.lanes], bool)
    moves = transfers[t.lane] if len(t.lane) else np.zeros(0, bool)
    steps = t.critical_path()
    return {
        "facts": facts,
        "total": t.total,
        "lanes": _lanes(t),
        "opcodes": list(names),
        "rules": list(rules),
        "causes": [PHRASES[cause] for cause in Cause],
        "count": len(t.instructions),
        "instructions": {
            "start": _array(t.start, "<f8"),
            "issue": _array(t.issue, "<f8"),
            "begin": _array(t.begin, "<f8"),
            "until": _array(np.where(moves, t.end, t.free), "<f8"),
            "end": _array(t.end, "<f8"),
            "blocker": _array(t.blocker, "<i4"),
            "line": _array([numbers[key] for key in keys], "<i4"),
            "opcode": _array([names[i.opcode] for i in t.instructions], "<i2"),
            "rule": _array([rules[c.rule] for c in t.costs], "<i4"),
            "lane": _array(t.lane, "<i2"),
            "cause": _array(t.cause, "<i2"),
            "bytes": _array([c.transfer.nbytes if c.transfer else 0 for c in t.costs], "<f8"),
        },
        "path": {
            "index": _array([s.index for s in steps], "<i4"),
            "since": _array([s.since for s in steps], "<f8"),
            "until": _array([s.until for s in steps], "<f8"),
        },
        "lines": _lines(t, keys, numbers),
        "files": _files(numbers),
        "memory": [_memory(t, core) for core in range(t.run.lnc)],
    }


def _array(values: Any, kind: str) -> str:
    return base64.b64encode(np.asarray(values, dtype=kind).tobytes()).decode()


def _lanes(t: Timeline) -> list[dict[str, Any]]:
    """Lanes by number; those without instructions are left out of the picture."""
    used = set(t.lane.tolist())
    return [
        {
            "name": name,
            "core": int(t.lane_core[k]),
            "used": k in used,
            "busy": t.busy(name, int(t.lane_core[k])) / t.total if k in used and t.total else 0.0,
        }
        for k, name in enumerate(t.lanes)
    ]


def _lines(t: Timeline, keys: list[Key], numbers: dict[Key, int]) -> list[dict[str, Any]]:
    """Source lines: their time on the critical path, and of engines and queues."""
    path: defaultdict[Key, float] = defaultdict(float)
    for step in t.critical_path():
        path[keys[step.index]] += step.until - step.since
    work = np.zeros(len(numbers))
    count = np.zeros(len(numbers), int)
    if keys:
        which = np.array([numbers[key] for key in keys])
        np.add.at(work, which, np.maximum(t.end - t.begin, 0.0))
        np.add.at(count, which, 1)
    return [
        {
            "file": key[0],
            "line": key[1],
            "path_us": path[key] / 1e3,
            "work_us": float(work[n]) / 1e3,
            "count": int(count[n]),
        }
        for key, n in numbers.items()
    ]


def _files(keys: Iterable[Key]) -> list[dict[str, Any]]:
    """The source around the lines that issued something, file by file."""
    by_file: defaultdict[str, list[int]] = defaultdict(list)
    for file, line in keys:
        if file:
            by_file[file].append(line)
    found = []
    for file, lines in by_file.items():
        text = [line.rstrip("\n") for line in linecache.getlines(file)]
        pieces = []
        for first, last in _stretches(sorted(lines)):
            begin = max(1, first - AROUND)
            pieces.append({"first": begin, "text": text[begin - 1 : last + AROUND]})
        found.append({"path": file, "name": Path(file).name, "pieces": pieces})
    return found


def _stretches(lines: list[int]) -> list[tuple[int, int]]:
    """Runs of lines that are no more than twice `AROUND` apart."""
    found = [(lines[0], lines[0])]
    for line in lines[1:]:
        if line - found[-1][1] <= 2 * AROUND:
            found[-1] = (found[-1][0], line)
        else:
            found.append((line, line))
    return found


def _memory(t: Timeline, core: int) -> dict[str, Any]:
    machine = machine_for(t.run.target)
    limits = {"sbuf": machine.sbuf_bytes, "psum": machine.psum_bytes}
    found = {}
    for buffer, (at, used) in usage(t, core, machine).items():
        times, most = envelope(at, used, t.total, STEPS // 2)
        found[buffer] = {
            "at": _array(times, "<f8"),
            "used": _array(most, "<f8"),
            "limit": limits[buffer],
        }
    return found
