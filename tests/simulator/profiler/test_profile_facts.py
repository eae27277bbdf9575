"""What a report, a page, a trace and a difference say, counted again from the timeline."""

from __future__ import annotations

import base64
from collections import defaultdict

import numpy as np
import pytest
from profile_helpers import hbm, matmuls, nisa, nl, pipeline, profile_of, psum, sbuf, shapes

from nsa_neuron import simulator
from nsa_neuron.simulator import cost
from nsa_neuron.simulator.cost import Cause, trips
from nsa_neuron.simulator.machine.trn2 import TRN2
from nsa_neuron.simulator.profiler import diff, memory, plots, report, text, trace
from nsa_neuron.simulator.profiler.needed import needed_bytes
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


# Memory ----------------------------------------------------------------------------------------


def used(body, lnc=1, core=0, **options):
    t = profile_of(body, lnc=lnc, **options).timeline
    return t, memory.usage(t, core, TRN2)


def test_a_tile_of_32_partitions_takes_a_quarter_of_its_bytes():
    def body():
        nisa.memset(sbuf((32, 512)), 0.0)
        nisa.memset(psum((64, 16)), 0.0)  # a bank is one of all partitions

    t, found = used(body)
    assert found["sbuf"][1].max() == 2048 / 4 and found["psum"][1].max() == 2048
    at, steps = found["sbuf"]
    assert list(steps) == [512, 0] and list(at) == [0.0, t.free[0]]


def test_a_transfer_holds_its_tile_until_its_end_an_engine_until_its_next_instruction():
    def body():
        one, other = sbuf((128, 512)), sbuf((128, 256))
        nisa.dma_copy(one, hbm((128, 512)))
        nisa.memset(other, 0.0)

    t, found = used(body)
    at, steps = found["sbuf"]
    assert list(at) == sorted({0.0, t.end[0], t.free[1]})
    assert list(steps) == [3072, 2048, 0]


def test_a_tile_is_held_until_its_last_user_ends_not_the_last_that_was_issued():
    """A transfer of 1 MB is longer than the copy of a column that is issued behind it."""

    def body():
        tile, column = sbuf((128, 2048)), sbuf((128, 1))
        nisa.memset(tile, 0.0)
        nisa.dma_copy(hbm((128, 2048)), tile)
        nisa.tensor_copy(column, tile[:, :1], engine=nisa.engine.vector)

    t, found = used(body)
    assert t.free[2] < t.end[1]
    at, steps = found["sbuf"]
    assert at.max() == t.end[1] and list(steps) == [8192, 8196, 8192, 0]


def test_a_register_s_load_holds_nothing():
    def body():
        held, tile = sbuf((1, 1), nl.int32), sbuf((128, 512))
        nisa.memset(held, 1)
        nisa.memset(tile, 0.0)
        nisa.register_load(nisa.register_alloc(), held)

    t, found = used(body)
    at, _ = found["sbuf"]
    assert at.max() == pytest.approx(t.free[1])


def test_each_core_has_a_memory_of_its_own():
    def body():
        if nl.program_id(0) == 0:
            nisa.memset(sbuf((128, 64)), 0.0)
        nisa.memset(sbuf((128, 512)), 0.0)

    peaks = [used(body, 2, core)[1]["sbuf"][1].max() for core in (0, 1)]
    assert peaks == [2048, 2048]
    t, found = used(body, 2, 1)
    assert found["sbuf"][0].max() == t.free[2]


def test_addressed_tiles_of_psum_count_in_banks_and_each_byte_once():
    def body():
        one, two, low = (
            psum((rows, width), address=(first, byte))
            for rows, width, first, byte in ((128, 16, 0, 0), (128, 16, 0, 64), (32, 16, 0, 4096))
        )
        for tile in (one, two, low):
            nisa.memset(tile, 0.0, engine=nisa.engine.vector)
        nisa.tensor_tensor(sbuf((128, 16)), one, sbuf((128, 16)), nl.add)
        nisa.tensor_tensor(sbuf((128, 16)), two, sbuf((128, 16)), nl.add)
        nisa.tensor_copy(sbuf((32, 16)), low, engine=nisa.engine.vector)

    _, found = used(body)
    # The two tiles of bank 0 reach into bank 1 by the 64 bytes that the second is shifted.
    assert found["psum"][1].max() == 2048 + 64 + 2048


@pytest.mark.parametrize("bins", [1, 2, 3, 10])
def test_an_envelope_never_ends_below_what_is_used(bins):
    at, steps = np.arange(20.0), np.arange(20) % 7 + 1
    times, most = memory.envelope(at, steps, 20.0, bins)
    assert times[0] == 0 and times[-1] == 20
    for k in range(20):
        assert most[np.searchsorted(times, k, side="right") - 1] >= steps[k]


# HBM -------------------------------------------------------------------------------------------


def needed(body, *sizes, dtype="float32"):
    return needed_bytes(profile_of(body, *shapes(*sizes, dtype=dtype)).run)


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2), ("uint8", 1)])
def test_elements_that_patterns_with_holes_touch_count_by_their_size(dtype, item):
    def body(a):
        nisa.dma_copy(sbuf((64, 16), a.dtype), a[0:128:2, 0:16])
        nisa.dma_copy(sbuf((64, 16), a.dtype), a[0:64, 8:24])

    touched = np.zeros((128, 64), bool)
    touched[0:128:2, 0:16] = touched[0:64, 8:24] = True
    assert needed(body, (128, 64), dtype=dtype) == touched.sum() * item


def test_rows_read_backwards_are_read():
    def body(a):
        nisa.dma_copy(sbuf((64, 32)), a.ap([[64, 64], [-1, 32]], offset=31))

    assert needed(body, (128, 64)) <= 64 * 64 * 4 and needed(body, (128, 64)) >= 64 * 32 * 4


def test_what_a_kernel_keeps_for_itself_is_not_needed_and_results_that_are_read_count_once():
    def body(a):
        kept = nl.ndarray((128, 64), nl.float32, buffer=nl.private_hbm)
        out, tile = hbm((128, 64)), sbuf((128, 64))
        nisa.dma_copy(tile, a)
        nisa.dma_copy(kept, tile)
        nisa.dma_copy(tile, kept)
        nisa.dma_copy(out, tile)
        nisa.dma_copy(tile, out)
        return out

    assert needed(body, (128, 64)) == 2 * 128 * 64 * 4


def test_run_time_rows_need_as_much_as_they_move_and_no_more_than_there_is():
    def body(times):
        def kernel(a):
            index = sbuf((1, 1), nl.int32)
            nisa.memset(index, 0)
            for _ in range(times):
                view = a.select(0, index)
                nisa.dma_copy(sbuf((128, 64)), view, dge_mode=nisa.dge_mode.hwdge)

        return kernel

    one = 128 * 64 * 4
    assert needed(body(1), (4, 128, 64)) == one
    assert needed(body(9), (4, 128, 64)) <= 4 * one


def test_spans_that_nest_and_touch_count_once():
    from nsa_neuron.simulator.profiler.needed import _union

    assert _union([(0, 100), (10, 20), (100, 110), (150, 160), (155, 158)]) == 120
    assert _union([]) == 0


def test_copies_between_tiles_carry_no_bytes_of_hbm():
    """So they do not lower the roof of the DMA engines; a copy within HBM moves two for one."""

    def body(a):
        tile = sbuf((128, 512))
        nisa.dma_copy(tile, a)
        nisa.dma_copy(sbuf((128, 512)), tile)
        nisa.dma_copy(sbuf((128, 512)), tile)

    p = cost.load()
    t = profile_of(body, *shapes((128, 512))).timeline
    assert roofline_of(t).dma == pytest.approx(16 * p.dma_rate)
    copy = profile_of(lambda a: nisa.dma_copy(hbm((128, 512)), a), *shapes((128, 512))).timeline
    assert roofline_of(copy).dma == pytest.approx(2 * 16 * p.dma_rate)
    assert roofline_of(copy).bound == ("HBM" if p.hbm_stack <= 32 * p.dma_rate else "DMA engines")


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


# Options ---------------------------------------------------------------------------------------


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


# Trace and page --------------------------------------------------------------------------------


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


# Text and difference ---------------------------------------------------------------------------


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


def facts_of(scale=1, lanes=("vector",), cores=1, **changes):
    core = {
        "tensor": {"utilisation": 0.1 * scale},
        "memory": {b: {"peak": 100 * scale, "mean": 1} for b in ("sbuf", "psum")},
        "engines": {n: {"instructions": 10 * scale, "busy_us": 5.0 * scale} for n in lanes},
    }
    return {
        "kernel": "k", "target": "trn2", "params": "measured-3p", "instructions": 7 * scale,
        "time_us": {"low": 1.0 * scale, "central": 2.0 * scale, "high": 3.0 * scale},
        "roofline": {"hbm_bytes": 8 * scale, "bandwidth_gb_s": 4.0 * scale,
                     "share_of_ceiling": 0.25 * scale},
        "cores": [core] * cores, **changes,
    }  # fmt: skip


def test_every_quantity_of_two_reports_is_compared():
    found = diff.compare(facts_of(), facts_of(3, ("vector", "scalar")), ("one", "other"))
    for name, a in {
        "time us": 2.0, "time us, low": 1.0, "time us, high": 3.0, "instructions": 7,
        "HBM bytes": 8, "HBM GB/s": 4.0, "share of the roof": 0.25, "PE utilisation": 0.1,
        "SBUF peak, bytes": 100, "PSUM peak, bytes": 100, "vector instructions": 10,
        "vector busy us": 5.0,
    }.items():  # fmt: skip
        assert found["quantities"][name] == pytest.approx({"a": a, "b": 3 * a, "ratio": 3.0}), name
    assert found["quantities"]["scalar instructions"] == {"a": 0, "b": 30, "ratio": None}
    assert found["quantities"]["scalar busy us"] == {"a": 0, "b": 15.0, "ratio": None}
    assert found["comparable"] and len(found["quantities"]) == 14
    assert found["a"] == {"name": "one", "kernel": "k", "arguments": [], "time_us": 2.0}
    shown = diff.render(found)
    assert "new" in shown and "x 3.000" in shown and "NOT COMPARABLE" not in shown


@pytest.mark.parametrize("other", [{"target": "trn3"}, {"params": "documented"}, {"cores": 2}])
def test_reports_of_other_machines_constants_or_cores_are_not_comparable(other):
    changed = facts_of(cores=other.pop("cores", 1), **other)
    assert not diff.compare(facts_of(), changed)["comparable"]
    assert "NOT COMPARABLE" in diff.render(diff.compare(facts_of(), changed))


def test_two_cores_are_compared_one_by_one():
    names = diff.compare(facts_of(cores=2), facts_of(cores=2))["quantities"]
    assert {"core 0 PE utilisation", "core 1 PE utilisation", "core 1 vector busy us"} <= set(names)


# Words and pictures ----------------------------------------------------------------------------


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
