"""What a report, a page, a trace and a difference say, counted again from the timeline."""

from __future__ import annotations

import base64
from collections import defaultdict

import numpy as np
import pytest
from profile_helpers import hbm, matmuls, nisa, nl, pipeline, profile_of, psum, sbuf, shapes

from nsa_neuron import simulator
from nsa_neuron.simulator.cost import Cause, trips
from nsa_neuron.simulator.machine.trn2 import TRN2
from nsa_neuron.simulator.profiler import memory, plots, report, text, trace
from nsa_neuron.simulator.profiler.page import data
from nsa_neuron.simulator.profiler.roofline import roofline_of


def uneven(a):
    """Core 0 loads 128 columns, core 1 384 in two tiles; each multiplies what it has."""
    out = hbm((128, 512), a.dtype)
    me = nl.program_id(0)
    parts = [slice(0, 128)] if me == 0 else [slice(128, 256), slice(256, 512)]
    for part in parts:
        width = part.stop - part.start
        tile, sums, copy = sbuf((128, width), a.dtype), psum((128, width)), sbuf((128, width))
        nisa.dma_copy(tile, a[:, part])
        nisa.nc_matmul(sums, tile[:, 0:128], tile)
        nisa.activation(copy, nl.exp, sums)
        result = sbuf((128, width), a.dtype)
        nisa.tensor_copy(result, copy, engine=nisa.engine.vector)
        nisa.dma_copy(out[:, part], result)
    return out


@pytest.fixture(scope="module")
def two():
    return profile_of(uneven, *shapes((128, 512), dtype="bfloat16"), lnc=2)


def test_each_core_has_facts_of_its_own(two):
    facts, t = two.to_dict(), two.timeline
    assert [a.split()[-2:] for a in facts["arguments"]] == [["bfloat16", "128x512"]]
    for number, core in enumerate(facts["cores"]):
        width, loads = ((128, 1), (384, 2))[number]
        moved = 2 * 128 * width * 2
        flops = 2 * 128 * 128 * width
        assert core["dma"]["bytes_written"] == core["dma_bytes"] == moved
        assert core["dma"]["transfers"] == 2 * loads
        assert core["dma"]["descriptors"] == 2 * 128 * loads
        assert core["dma"]["bytes_per_descriptor"] == width * 2 / loads
        assert core["tensor"]["flops"] == flops
        peak = 2 * 128 * 128 * 2.4
        assert core["tensor"]["utilisation"] == pytest.approx(flops / peak / t.total)
        busy = t.busy("tensor", number)
        assert core["tensor"]["utilisation_while_busy"] == pytest.approx(flops / peak / busy)
        assert core["dma"]["active_us"] == pytest.approx(t.busy("dma", number) / 1e3)
        share = t.dma_busy[number].sum() / 16 / t.total
        assert core["dma"]["engines_busy_share"] == pytest.approx(share)
        assert core["peak_bytes_per_partition"] == two.run.peaks[number]
    assert two.run.peaks[0] != two.run.peaks[1]
    engines = facts["cores"][0]["engines"], facts["cores"][1]["engines"]
    assert [e["scalar"]["instructions"] for e in engines] == [1, 2]


def test_notes_and_waits_add_up_over_a_lane(two):
    t = two.timeline
    for number, core in enumerate(two.to_dict()["cores"]):
        for lane, facts in core["engines"].items():
            notes: defaultdict[str, float] = defaultdict(float)
            for k in t.members(lane, number).tolist():
                for reason, ns in t.notes.get(k, {}).items():
                    notes[reason] += ns / 1e3
            assert facts["notes_us"] == pytest.approx(notes)
            stalls = sum(facts["stall_us"].values())
            if len(facts["waits"]) < report.WAITS_SHOWN:
                assert sum(w["us"] for w in facts["waits"]) == pytest.approx(stalls)
            told = [w["us"] for w in facts["waits"]]
            assert told == sorted(told, reverse=True)
    assert any("pe-half-rate" in e["notes_us"] for e in core["engines"].values())


def test_lines_of_the_critical_path_count_their_steps(two):
    path, steps = two.to_dict()["critical_path"], two.timeline.critical_path()
    assert sum(row["steps"] for row in path["lines"]) == len(steps)
    for row in path["lines"]:
        mine = [s for s in steps if two.run.instructions[s.index].location.lineno == row["line"]]
        assert row["steps"] == len(mine)
        assert row["time_us"] * 1e3 == pytest.approx(sum(s.until - s.since for s in mine))
        assert row["share"] == pytest.approx(row["time_us"] * 1e3 / two.timeline.total)
        by = defaultdict(float)
        for s in mine:
            i = two.run.instructions[s.index]
            by[f"{two.timeline.lanes[two.timeline.lane[s.index]]} {i.opcode}"] += s.until - s.since
        assert by[row["what"]] == max(by.values())


def test_a_line_is_named_by_what_takes_most_of_its_time():
    def body():
        tile, made = sbuf((128, 4096)), sbuf((128, 4096))
        nisa.memset(tile[:, :8], 0.0), nisa.activation(made, nl.copy, tile)

    (row,) = profile_of(body).to_dict()["critical_path"]["lines"]
    assert (row["what"], row["steps"]) == ("scalar activation", 2)


def test_more_lines_than_are_shown_are_summed():
    """25 lines that wait for one another, of which 20 are told."""
    calls = "\n".join("    nisa.activation(tile, nl.exp, tile)" for _ in range(25))
    scope: dict = {"nisa": nisa, "nl": nl, "sbuf": sbuf}
    exec(f"def body():\n    tile = sbuf((128, 512))\n{calls}\n", scope)
    found = profile_of(scope["body"])
    path = found.to_dict()["critical_path"]
    assert len(path["lines"]) == 20 and path["other_lines_us"] > 0
    shown = sum(row["time_us"] for row in path["lines"])
    assert shown + path["other_lines_us"] == pytest.approx(found.time.central / 1e3)
    (rest,) = (line for line in str(found).splitlines() if line.endswith("other lines"))
    told = sum(row["time_us"] for row in path["lines"][text.LINES_SHOWN :])
    assert f"{told + path['other_lines_us']:.2f} us" in rest


def test_a_launch_adds_what_traces_show():
    facts = profile_of(pipeline, *shapes((128, 512))).to_dict()
    assert facts["launch_us"] == {"low": 9.0, "central": 15.0, "high": 17.0}


def test_the_peak_of_two_dtypes_is_that_of_their_mix():
    """A bf16 product and an fp32 one of the same size: five quarters of the time for two."""

    def body(a, b):
        for x in (a, b):
            tile = sbuf((128, 512), x.dtype)
            nisa.dma_copy(tile, x)
            nisa.nc_matmul(psum((128, 512)), tile[:, 0:128], tile)

    one, other = shapes((128, 512), dtype="bfloat16") + shapes((128, 512))
    r = roofline_of(profile_of(body, one, other).timeline)
    assert r.peak == pytest.approx(2 * 128 * 128 * 2.4 * 2 / 5)
    assert r.achieved_bandwidth == pytest.approx(r.hbm_bytes / r.total)


# Options ------------------------------------------------------------------------------------------


def test_what_was_assumed_is_told_at_every_level():
    found = profile_of(
        pipeline, *shapes((128, 512)), assumptions=["the moon is new"],
        constants={"dma_rate": 12.0}, unknown=trips.constant(3),
    )  # fmt: skip
    e = found.estimate
    for t in (e.low, e.central, e.high):
        assert t.assumptions[:2] == ["the moon is new", "dma_rate = 12, as given"]
        assert t.parameters.dma_rate == 12.0
    assert "no register depended on data (trip counts given: the constant 3)" in t.assumptions[2]
    assert found.to_dict()["assumptions"][:2] == ["the moon is new", "dma_rate = 12, as given"]


@pytest.mark.parametrize("relax", [None, {"partition-limit"}])
def test_the_options_of_a_run_reach_it(relax):
    def body():
        nisa.memset(sbuf((200, 4)), 0.0)

    options = {"relax": {"output-unwritten", *relax}} if relax else {}
    if relax:
        assert profile_of(body, **options).run.instructions
        return
    with pytest.raises(simulator.SimulationError, match="at most 128 partitions"):
        profile_of(body)
    with pytest.raises(ValueError, match="trn9"):
        profile_of(body, target="trn9")
    with pytest.raises(ValueError, match=r"0\.1"):
        profile_of(body, nki="0.1")


# Trace and page -----------------------------------------------------------------------------------


def test_rows_of_two_cores_have_numbers_and_names_of_their_own(two):
    named = defaultdict(set)
    for e in trace.events(two.timeline):
        if e.get("name") == "thread_name":
            named[e["pid"], e["tid"]].add(e["args"]["name"])
    assert all(len(names) == 1 for names in named.values())
    assert {pid for pid, _ in named} == {1, 2}
    assert not {tid for pid, tid in named if pid == 1} & {tid for pid, tid in named if pid == 2}


def test_a_slice_lasts_as_long_as_it_holds_its_row(two):
    """A transfer to its end, an instruction until its engine takes the next."""
    t = two.timeline
    for e in trace.events(t):
        if e["ph"] == "X" and e["name"] != "active":
            k = e["args"]["index"]
            moves = t.lanes[t.lane[k]].startswith("dma")
            until = t.end[k] if moves else t.free[k]
            assert e["ts"] * 1e3 == pytest.approx(np.rint(t.begin[k]))
            assert e["dur"] * 1e3 == pytest.approx(max(np.rint(until) - np.rint(t.begin[k]), 1))
            for reason, ns in t.notes.get(k, {}).items():
                assert e["args"][reason] == round(ns)
            if t.stall[k] > 0:
                assert e["args"]["stalled_ns"] == round(float(t.stall[k]))
            if t.costs[k].transfer:
                assert e["args"]["bytes"] == t.instructions[k].nbytes


def test_counters_are_the_bytes_in_use(two):
    t = two.timeline
    for core in (0, 1):
        for buffer, (at, steps) in memory.usage(t, core, TRN2).items():
            told = [
                (e["ts"], e["args"]["in use"])
                for e in trace.events(t)
                if e["ph"] == "C" and e["pid"] == core + 1 and e["name"].startswith(buffer.upper())
            ]
            assert told == [(round(x) / 1e3, n) for x, n in zip(at, steps, strict=True)]


def test_no_arrow_goes_back_in_time(two):
    begun = {}
    for e in trace.events(two.timeline):
        if e["ph"] == "s":
            begun[e["id"]] = e["ts"]
        elif e["ph"] == "f":
            assert e["ts"] >= begun.pop(e["id"])
    assert not begun


def array(value, kind):
    return np.frombuffer(base64.b64decode(value), kind)


def test_a_page_holds_the_timeline(two):
    t = two.timeline
    found = data.collect(t, two.to_dict())
    held = found["instructions"]
    moves = np.array([t.lanes[k].startswith("dma") for k in t.lane])
    for name, values, kind in (
        ("start", t.start, "<f8"), ("issue", t.issue, "<f8"), ("begin", t.begin, "<f8"),
        ("end", t.end, "<f8"), ("until", np.where(moves, t.end, t.free), "<f8"),
        ("blocker", t.blocker, "<i4"), ("lane", t.lane, "<i2"), ("cause", t.cause, "<i2"),
    ):  # fmt: skip
        assert (array(held[name], kind) == values).all(), name
    names = [found["opcodes"][k] for k in array(held["opcode"], "<i2")]
    assert names == [i.opcode for i in t.instructions]
    rules = [found["rules"][k] for k in array(held["rule"], "<i4")]
    assert rules == [c.rule for c in t.costs]
    lines = [found["lines"][k]["line"] for k in array(held["line"], "<i4")]
    assert lines == [i.location.lineno for i in t.instructions]
    moved = [i.nbytes if m else 0 for i, m in zip(t.instructions, moves, strict=True)]
    assert list(array(held["bytes"], "<f8")) == moved
    assert found["total"] == t.total and found["count"] == len(t.instructions)
    for k, lane in enumerate(found["lanes"]):
        core = t.lane_core[k]
        assert (lane["name"], lane["core"], lane["used"]) == (t.lanes[k], core, k in set(t.lane))
        assert lane["busy"] == pytest.approx(t.busy(t.lanes[k], core) / t.total)
    assert {x["busy"] for x in found["lanes"] if x["core"] == 0} != {
        x["busy"] for x in found["lanes"] if x["core"] == 1
    }
    steps = t.critical_path()
    assert list(array(found["path"]["index"], "<i4")) == [s.index for s in steps]
    assert list(array(found["path"]["since"], "<f8")) == [s.since for s in steps]
    assert list(array(found["path"]["until"], "<f8")) == [s.until for s in steps]
    for number, line in enumerate(found["lines"]):
        mine = array(held["line"], "<i4") == number
        assert line["count"] == mine.sum()
        assert line["work_us"] * 1e3 == pytest.approx((t.end - t.begin)[mine].sum())
    for core, regions in enumerate(found["memory"]):
        for buffer, limit in (("sbuf", 212_984), ("psum", 16_384)):
            at, steps_ = memory.usage(t, core, TRN2)[buffer]
            assert regions[buffer]["limit"] == limit
            assert list(array(regions[buffer]["at"], "<f8")) == [*at, t.total]
            assert list(array(regions[buffer]["used"], "<f8")) == [*steps_, steps_[-1]]


@pytest.mark.parametrize(
    ("lines", "stretches"),
    [([5], [(5, 5)]), ([5, 17], [(5, 17)]), ([5, 18], [(5, 5), (18, 18)]), ([3, 4, 9], [(3, 9)])],
)
def test_source_that_is_near_is_shown_in_one_piece(lines, stretches):
    assert data._stretches(lines) == stretches


def test_source_is_shown_with_six_lines_around_it(tmp_path):
    file = tmp_path / "kernel.py"
    file.write_text("".join(f"line {n}\n" for n in range(1, 101)))
    (found,) = data._files([(str(file), 3), (str(file), 50), (str(file), 98)])
    assert [p["first"] for p in found["pieces"]] == [1, 44, 92]
    assert [(p["text"][0], p["text"][-1]) for p in found["pieces"]] == [
        ("line 1", "line 9"), ("line 44", "line 56"), ("line 92", "line 100"),
    ]  # fmt: skip
    assert (found["path"], found["name"]) == (str(file), "kernel.py")


# Text ---------------------------------------------------------------------------------------------


def test_what_is_computed_or_moved_again_is_told():
    def often(a):
        out, sums = hbm((128, 128)), psum((128, 128))
        for _ in range(3):
            tile = sbuf((128, 128), a.dtype)
            nisa.dma_copy(tile, a)
            nisa.nc_matmul(sums, tile, tile, accumulate=False)
        result = sbuf((128, 128))
        nisa.tensor_copy(result, sums)
        nisa.dma_copy(out, result)
        return out

    found = profile_of(often, *shapes((128, 128), dtype="bfloat16"))
    assert "the same products are computed 3 times, and count once" in str(found)
    moved, need = (3 * 2 + 4) * 128 * 128, (2 + 4) * 128 * 128
    assert f"HBM: {moved:,} bytes moved, {moved / need:.3g} times what is needed" in str(found)
    assert "times what is needed" not in str(profile_of(pipeline, *shapes((128, 512))))


def test_the_time_of_a_note_is_told_per_transfer():
    def body():
        for _ in range(4):
            nisa.dma_copy(sbuf((128, 2048)), hbm((128, 2048)))
        nisa.activation(sbuf((128, 8)), nl.exp, sbuf((128, 8)))

    found = profile_of(body)
    lanes = found.to_dict()["cores"][0]["engines"]
    busy = lanes["dma-load"]["notes_us"]["dma-engines-busy"]
    assert f"({busy / 4:.2f} us per transfer: dma-engines-busy)" in str(found)
    assert "(1.28 us: activation-table-load)" in str(found)


def test_pieces_of_advice_are_numbered_as_they_are_listed():
    piece = {
        "file": "k.py", "line": 3, "text": "x", "message": "do", "rule": "r", "gain_us": 2.0,
        "gain_share": 0.25,
    }  # fmt: skip
    together = {"of": [0, 2], "gain_us": 3.0, "gain_share": 0.375, "speedup": 1.6}
    lines = text._advice([piece] * 3, together)
    assert [x.strip()[0] for x in lines if "r at k.py:3" in x] == ["1", "2", "3"]
    assert lines[-1].strip() == "1 and 3 together: 3.00 us (37.5%), 1.60 times as fast"
    assert "2.00 us (25.0%)" in lines[1]


# Words and pictures -------------------------------------------------------------------------------


def test_every_cause_of_waiting_has_words_and_a_colour():
    from nsa_neuron.simulator.profiler.lines import PHRASES

    assert PHRASES == {
        Cause.LANE: "its turn", Cause.RAW: "data from", Cause.WAR: "buffer still read by",
        Cause.WAW: "buffer still written by", Cause.SPACE: "room held by",
        Cause.EDGE: "ordered after", Cause.BANK: "PSUM bank used by",
        Cause.TRIGGER: "trigger behind",
    }  # fmt: skip
    assert set(plots.WAITS) == set(Cause) - {Cause.LANE}


def test_a_wait_for_a_table_is_named():
    from nsa_neuron.simulator.profiler.lines import Lines, in_words

    def body():
        tile = sbuf((128, 64))
        nisa.activation(tile, nl.exp, tile)
        nisa.tensor_copy(sbuf((128, 64)), tile, engine=nisa.engine.vector)

    t = profile_of(body).timeline
    assert in_words(t, Lines(), 0) == "activation table"
    assert in_words(t, Lines(), 1).startswith("data from scalar activation at test_profile_facts")


def drawn(draw, *args):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    draw(axes, *args)
    return axes


def test_a_roof_is_drawn_where_the_report_says(two):
    found = profile_of(matmuls, *shapes((256, 128), (256, 1024), dtype="bfloat16"))
    r = roofline_of(found.timeline)
    axes = drawn(plots._draw_roof, r)
    x, y = axes.lines[0].get_data()
    assert y == pytest.approx(np.minimum(r.peak, x * min(r.hbm, r.dma)) / 1e3)
    (dot,) = (line for line in axes.lines if line.get_marker() == "o")
    assert dot.get_xydata().tolist() == [[r.intensity, r.achieved / 1e3]]


def test_bandwidths_are_drawn_as_the_report_says():
    def body(a):
        for _ in range(3):
            nisa.dma_copy(sbuf((128, 512)), a)

    r = roofline_of(profile_of(body, *shapes((128, 512))).timeline)
    axes = drawn(plots._draw_bandwidths, r)
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([r.hbm, r.dma, 3 * r.needed_bytes / r.total, widths[2] / 3])


def test_memory_and_engines_are_drawn_for_their_core(two):
    t = two.timeline
    for core in (0, 1):
        axes = drawn(plots._draw_memory, t, core)
        for line, (buffer, limit) in zip(
            axes.lines, (("sbuf", 212_984), ("psum", 16_384)), strict=True
        ):
            _, steps = memory.usage(t, core, TRN2)[buffer]
            assert max(line.get_ydata()) == pytest.approx(steps.max() / limit)
        names = plots._lanes(t, core)
        said = [x.get_text() for x in drawn(plots._draw_engines, t, core, names).texts]
        assert said == [f"{t.busy(name, core) / t.total:.0%} busy" for name in names]


def test_dense_rows_show_the_share_of_each_bin():
    pytest.importorskip("matplotlib")
    total = float(plots.BARS)
    since = np.arange(total)
    axes = drawn(plots._shares, total, 0, [("#000000", (since, since + 0.25))])
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(0.33 - 0.66 * 0.25)


def test_bars_of_a_row_lie_around_it():
    """Waits behind, work before them and lower, none of it narrower than a pixel."""
    busy = (np.array([0.0, 500.0]), np.array([100.0, 500.0]))
    waits = (np.array([200.0]), np.array([300.0]))
    axes = drawn(plots._bars, 1600.0, 2, [("#000000", busy), ("#ffffff", waits)])
    wait, work = (np.array([p.vertices for p in c.get_paths()]) for c in axes.collections)
    assert (work[:, :, 1].min(), work[:, :, 1].max()) == pytest.approx((2 - 0.22, 2 + 0.22))
    assert (wait[:, :, 1].min(), wait[:, :, 1].max()) == pytest.approx((2 - 0.33, 2 + 0.33))
    np.testing.assert_allclose([p[:, 0].min() for p in work], [0.0, 0.5])
    np.testing.assert_allclose([p[:, 0].max() for p in work], [0.1, 0.501])
