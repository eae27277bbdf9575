"""The exported trace: its events, and what Perfetto's own trace processor makes of it."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from profile_helpers import example, hbm, matmuls, nisa, pipeline, profile_of, sbuf, shapes
from profile_helpers import two_cores as copies
from trace_processor import opened

from nsa_neuron.simulator.profiler import trace

KERNELS = {
    "pipeline": lambda: profile_of(pipeline, *shapes((128, 2048))),
    "matmuls": lambda: profile_of(matmuls, *shapes((512, 128), (512, 1024), dtype="bfloat16")),
    "two cores": lambda: profile_of(copies, *shapes((128, 512)), lnc=2),
    "example": lambda: example("fresh_buffers", 256, 512, 512),
}
FIELDS = {
    "M": {"name", "args"},
    "X": {"name", "tid", "ts", "dur"},
    "C": {"name", "ts", "args"},
    "s": {"name", "cat", "id", "tid", "ts"},
    "f": {"name", "cat", "id", "tid", "ts", "bp"},
}


@pytest.fixture(params=KERNELS)
def found(request):
    return KERNELS[request.param]()


def by_phase(found):
    phases = defaultdict(list)
    for event in trace.events(found.timeline):
        phases[event["ph"]].append(event)
    return phases


def test_events_have_the_fields_of_their_phase(found):
    for ph, events in by_phase(found).items():
        for event in events:
            assert FIELDS[ph] <= set(event)
            assert event["pid"] in range(1, found.run.lnc + 1)
            assert event.get("ts", 0) >= 0 and event.get("dur", 1) > 0


def test_slices_of_a_row_never_overlap(found):
    rows = defaultdict(list)
    for e in by_phase(found)["X"]:
        rows[e["pid"], e["tid"]].append((round(e["ts"] * 1e3), round(e["dur"] * 1e3)))
    for slices in rows.values():
        slices.sort()
        for (ts, dur), (following, _) in pairwise(slices):
            assert ts + dur <= following


def test_what_runs_at_once_gets_rows_of_its_own():
    """The second begins while the first runs and ends after it, the third within both."""
    at = SimpleNamespace(begin=np.array([0.0, 5.0, 6.0, 10.0, 12.2]))
    until = np.array([10.0, 12.0, 8.0, 10.2, 13.0])
    rows = list(trace._rows(at, np.arange(5), until))
    assert rows == [(0, 0, 0, 10), (1, 1, 5, 12), (2, 2, 6, 8), (3, 0, 10, 11), (4, 0, 12, 13)]


def test_every_instruction_is_a_slice_with_its_line(found):
    slices = [e for e in by_phase(found)["X"] if e["name"] != "active"]
    assert sorted(e["args"]["index"] for e in slices) == list(range(len(found.run.instructions)))
    for e in slices:
        instruction = found.run.instructions[e["args"]["index"]]
        assert e["name"] == instruction.opcode
        assert e["args"]["line"].endswith(f":{instruction.location.lineno}")


def test_arrows_go_from_the_blocker_to_the_blocked(found):
    phases, t = by_phase(found), found.timeline
    place = {}
    for e in phases["X"]:
        if e["name"] != "active":
            place[e["args"]["index"]] = (e["pid"], e["tid"], e["ts"])
    arrows = {
        ((s["pid"], s["tid"], s["ts"]), (f["pid"], f["tid"], f["ts"]))
        for s, f in zip(phases["s"], phases["f"], strict=True)
        if s["id"] == f["id"]
    }
    expected = {
        (place[int(t.blocker[k])], place[k]) for k in range(len(t.blocker)) if t.blocker[k] >= 0
    }
    assert arrows and arrows <= expected
    assert len(arrows) >= 0.9 * len(expected)  # a DMA's first byte may come after the blocked began


def test_a_slice_tells_the_name_that_the_kernel_gave_and_only_that():
    def body():
        nisa.memset(sbuf((128, 64)), 0.0, name="clear")
        nisa.memset(sbuf((128, 64)), 0.0)

    named, other = (e["args"] for e in by_phase(profile_of(body))["X"] if e["name"] != "active")
    assert named["name"] == "clear" and "name" not in other


def test_a_wait_whose_end_is_shown_before_its_reason_has_no_arrow():
    """Two transfers on one DMA engine: the second is triggered, and its bytes wait for the first's.

    What is triggered after it, on another engine, flows before it.
    """

    def body():
        nisa.dma_copy(sbuf((8, 16384)), hbm((8, 16384)))
        nisa.dma_copy(hbm((8, 64)), sbuf((8, 64)))
        nisa.dma_copy(sbuf((128, 64))[64:72], sbuf((128, 64))[64:72])

    found = profile_of(body)
    t = found.timeline
    assert t.blocker.tolist() == [-1, 0, 1] and t.begin[2] < t.begin[1]
    starts, ends = (by_phase(found)[ph] for ph in "sf")
    assert [(s["ts"], f["ts"]) for s, f in zip(starts, ends, strict=True)] == [
        (round(t.begin[0]) / 1e3, round(t.begin[1]) / 1e3)
    ]
    assert starts[0]["name"] == "trigger behind"


def test_file_says_that_it_is_modelled(found, tmp_path):
    found.trace(tmp_path / "trace.json")
    about = json.loads((tmp_path / "trace.json").read_text())
    assert about["otherData"]["modelled"] == "true, not measured"
    assert about["traceEvents"] == list(trace.events(found.timeline))


BUSY = """
    SELECT process.pid AS pid, thread.name AS name, COUNT(*) AS slices, SUM(dur) AS ns
    FROM slice JOIN thread_track ON slice.track_id = thread_track.id
    JOIN thread USING (utid) JOIN process USING (upid)
    WHERE thread.name GLOB '* active' GROUP BY utid
"""
# The union of [ts, end) of a lane's own slices, by gaps and islands.
UNION = """
    WITH piece AS (
        SELECT process.pid AS pid, slice.ts AS ts,
            EXTRACT_ARG(slice.arg_set_id, 'args.end_ns') AS until,
            substr(thread.name, 1, instr(thread.name || ' (', ' (') - 1) AS lane
        FROM slice JOIN thread_track ON slice.track_id = thread_track.id
        JOIN thread USING (utid) JOIN process USING (upid)
        WHERE slice.name != 'active'
    ), reach AS (
        SELECT *, COALESCE(MAX(until) OVER (PARTITION BY pid, lane ORDER BY ts, until
            ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), ts) AS before FROM piece
    )
    SELECT pid, lane, COUNT(*) AS slices, SUM(MAX(0, until - MAX(ts, before))) AS ns
    FROM reach GROUP BY pid, lane
"""
LOST = "SELECT name, value FROM stats WHERE value != 0 AND severity IN ('error', 'data_loss')"


def test_perfetto_finds_the_busy_times_of_the_report(found, tmp_path):
    found.trace(tmp_path / "trace.json")
    with opened(tmp_path / "trace.json") as perfetto:
        assert perfetto.query(LOST) == []
        active = {
            (r["pid"] - 1, r["name"].removesuffix(" active")): r for r in perfetto.query(BUSY)
        }
        union = {(r["pid"] - 1, r["lane"]): r for r in perfetto.query(UNION)}
        (flows,) = perfetto.query("SELECT COUNT(*) AS n FROM flow")
        counters = perfetto.query(
            "SELECT process.pid AS pid, track.name AS name, MAX(value) AS top FROM counter "
            "JOIN process_counter_track AS track ON counter.track_id = track.id "
            "JOIN process USING (upid) GROUP BY 1, 2"
        )
    facts = found.to_dict()
    expected = {
        (number, lane): engine
        for number, core in enumerate(facts["cores"])
        for lane, engine in core["engines"].items()
    }
    assert set(active) == set(union) == set(expected)
    for key, engine in expected.items():
        # Perfetto stores whole ns: half a ns at either end of each interval.
        assert active[key]["ns"] == pytest.approx(
            engine["busy_us"] * 1e3, abs=active[key]["slices"]
        )
        assert union[key]["slices"] == engine["instructions"]
        assert union[key]["ns"] == pytest.approx(engine["busy_us"] * 1e3, abs=union[key]["slices"])
    assert flows["n"] == len(by_phase(found)["s"])
    tops = {(c["pid"] - 1, c["name"].split()[0].lower()): c["top"] for c in counters}
    for number, core in enumerate(facts["cores"]):
        for buffer, memory in core["memory"].items():
            assert tops[number, buffer] == memory["peak"]
