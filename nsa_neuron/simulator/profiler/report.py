"""The facts of a profile: plain numbers, lists and strings, ready for JSON.

Times are microseconds, bandwidths GB/s (bytes per ns), all modelled.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING, Any

from ..cost import LEVELS, Cause, guesses
from ..machine.trn2 import machine_for
from .lines import PHRASES, Lines, in_words, lane_of
from .memory import usage
from .roofline import PE_SIDE, roofline_of

if TYPE_CHECKING:
    from ..cost import Estimate, Timeline

LINES_SHOWN = 20
WAITS_SHOWN = 3


def describe(estimate: Estimate) -> dict[str, Any]:
    """All facts of an estimate but the advice."""
    t = estimate.central
    lines = Lines()
    return {
        "modelled": True,
        "kernel": t.run.kernel,
        "arguments": [
            f"{a.name or 'argument'} {a.dtype} {'x'.join(map(str, a.shape))}"
            for a in t.run.arguments
        ],
        "target": t.run.target,
        "params": t.parameters.set,
        "time_us": {k: v / 1e3 for k, v in asdict(estimate.band).items()},
        "launch_us": {level: getattr(estimate, level).parameters.launch / 1e3 for level in LEVELS},
        "instructions": len(t.instructions),
        "assumptions": [*t.assumptions, *guesses(estimate)],
        "critical_path": critical_path(t, lines),
        "roofline": roofline(t),
        "cores": [_core(t, core, lines) for core in range(t.run.lnc)],
    }


def critical_path(t: Timeline, lines: Lines) -> dict[str, Any]:
    """Who the total time belongs to: shares by engine, by reason and by source line, us.

    A step's share is waiting, from its predecessor's end to its issue (semaphores, DMA latency
    belongs to the step itself), and running.
    """
    engines: defaultdict[str, float] = defaultdict(float)
    reasons: defaultdict[str, float] = defaultdict(float)
    by_line: dict[Any, dict[str, Any]] = {}
    opcodes: dict[Any, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for step in t.critical_path():
        i = t.instructions[step.index]
        time = (step.until - step.since) / 1e3
        lane = lane_of(t, step.index)
        engines[lane] += time
        reasons[PHRASES[step.cause]] += time
        key = lines.key(i)
        row = by_line.setdefault(key, {**lines.describe(i), "time_us": 0.0, "steps": 0})
        row["time_us"] += time
        row["steps"] += 1
        opcodes[key][f"{lane} {i.opcode}"] += time
    rows = sorted(by_line.items(), key=lambda x: -x[1]["time_us"])
    total = t.total / 1e3
    return {
        "engines_us": _largest(engines),
        "causes_us": _largest(reasons),
        "lines": [
            {
                **row,
                "share": _share(row["time_us"], total),
                "what": next(iter(_largest(opcodes[key]))),
            }
            for key, row in rows[:LINES_SHOWN]
        ],
        "other_lines_us": sum(row["time_us"] for _, row in rows[LINES_SHOWN:]),
    }


def roofline(t: Timeline) -> dict[str, Any]:
    """Place on the roofline; rates per ns are G per second."""
    r = roofline_of(t)
    flops = r.unit == "flop"
    return {
        "unit": r.unit,
        "work": r.flops if flops else r.needed_bytes,
        "work_done": r.flops_done if flops else r.hbm_bytes,
        "needed_bytes": r.needed_bytes,
        "hbm_bytes": r.hbm_bytes,
        "intensity": r.intensity if flops and isfinite(r.intensity) else None,
        "ridge": r.ridge if flops else None,
        "bound": r.bound,
        "achieved_g_per_s": r.achieved,
        "ceiling_g_per_s": r.ceiling,
        "share_of_ceiling": r.share,
        "peak_g_per_s": r.peak,
        "bandwidth_gb_s": r.achieved_bandwidth,
        "bandwidth_peak_gb_s": r.hbm,
        "dma_peak_gb_s": r.dma,
    }


def _core(t: Timeline, core: int, lines: Lines) -> dict[str, Any]:
    engines = {
        lane: _lane(t, core, lane, lines)
        for lane in dict.fromkeys(t.lanes)
        if len(t.members(lane, core))
    }
    return {
        "engines": engines,
        "tensor": _tensor(t, core),
        "dma": _dma(t, core),
        "memory": _memory(t, core),
        "dma_bytes": t.run.cores[core].dma_bytes,
        "peak_bytes_per_partition": t.run.peaks[core],
    }


def _lane(t: Timeline, core: int, lane: str, lines: Lines) -> dict[str, Any]:
    """Busy and stall time of a lane, and what it waited for longest.

    Busy counts pipelines that drain, so busy and stalled overlap a little where results are waited
    for.
    """
    members = t.members(lane, core)
    waits: defaultdict[str, float] = defaultdict(float)
    stall = t.stall
    for k in members[stall[members] > 0].tolist():
        if t.cause[k] != Cause.LANE:
            waits[in_words(t, lines, k)] += float(stall[k]) / 1e3
    busy, stalls = t.busy(lane, core) / 1e3, t.stalls(lane, core)
    notes: defaultdict[str, float] = defaultdict(float)
    for k in members.tolist():
        for reason, ns in t.notes.get(k, {}).items():
            notes[reason] += ns / 1e3
    return {
        "instructions": len(members),
        "busy_us": busy,
        "busy_share": _share(busy * 1e3, t.total),
        "stall_us": {c.name: ns / 1e3 for c, ns in stalls.items()},
        "stall_share": _share(sum(stalls.values()), t.total),
        "waits": [{"for": w, "us": us} for w, us in list(_largest(waits).items())[:WAITS_SHOWN]],
        "notes_us": _largest(notes),
    }


def _tensor(t: Timeline, core: int) -> dict[str, Any]:
    """How well the multiplier array is used, against its bf16 peak."""
    index = t.members("tensor", core)
    flops = sum(t.costs[k].flops for k in index.tolist())
    peak = 2 * PE_SIDE * PE_SIDE * t.parameters.pe_clock
    busy = t.busy("tensor", core)
    return {
        "flops": flops,
        "utilisation": _share(flops / peak, t.total),
        "utilisation_while_busy": _share(flops / peak, busy),
    }


def _dma(t: Timeline, core: int) -> dict[str, Any]:
    """Bytes and rates of DMA: while active, and of the whole kernel."""
    index = t.members("dma", core)
    transfers = [x for k in index.tolist() if (x := t.costs[k].transfer)]
    written = sum(x.nbytes for x in transfers)
    hbm = sum(x.hbm_bytes for x in transfers)
    active = t.busy("dma", core)
    descriptors = sum(x.descriptors for x in transfers)
    return {
        "transfers": len(transfers),
        "bytes_written": written,
        "hbm_bytes": hbm,
        "descriptors": descriptors,
        "bytes_per_descriptor": sum(x.descriptors * x.row_bytes for x in transfers)
        / max(descriptors, 1),
        "active_us": active / 1e3,
        "gb_s": _share(hbm, t.total),
        "gb_s_while_active": _share(hbm, active),
        "engines_busy_share": _share(float(t.dma_busy[core].mean()), t.total),
    }


def _memory(t: Timeline, core: int) -> dict[str, Any]:
    """Peak and mean bytes per partition, over modelled time."""
    machine = machine_for(t.run.target)
    limits = {"sbuf": machine.sbuf_bytes, "psum": machine.psum_bytes}
    facts = {}
    for buffer, (at, used) in usage(t, core, machine).items():
        top = int(used.argmax())
        held = (used[:-1] * (at[1:] - at[:-1])).sum() if len(at) > 1 else 0.0
        facts[buffer] = {
            "peak": int(used[top]),
            "peak_at_us": float(at[top]) / 1e3,
            "mean": _share(float(held), t.total),
            "limit": limits[buffer],
        }
    return facts


def _largest(sums: dict[str, float]) -> dict[str, float]:
    """The same sums, largest first."""
    return dict(sorted(sums.items(), key=lambda x: -x[1]))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
