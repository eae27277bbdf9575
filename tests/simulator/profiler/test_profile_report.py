"""The report against the timeline it is made from, and against numbers worked out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import rowwise
from hypothesis import given, settings
from hypothesis import strategies as st
from profile_helpers import (
    example,
    hbm,
    matmuls,
    nisa,
    nl,
    pipeline,
    profile_of,
    psum,
    sbuf,
    shapes,
)
from profile_helpers import two_cores as copies

from nsa_neuron import simulator
from nsa_neuron.simulator import cost
from nsa_neuron.simulator.cost import Cause, load
from nsa_neuron.simulator.profiler.needed import needed_bytes
from nsa_neuron.simulator.profiler.roofline import roofline_of

KERNELS = {
    "pipeline": lambda: profile_of(pipeline, *shapes((128, 2048))),
    "matmuls": lambda: profile_of(matmuls, *shapes((256, 128), (256, 1024), dtype="bfloat16")),
    "two cores": lambda: profile_of(copies, *shapes((128, 512)), lnc=2),
    "example": lambda: example("fresh_buffers", 256, 512, 256),
}

HBM = load().hbm_stack  # bytes per ns of a stack
DMA = 16 * load().dma_rate  # bytes per ns of a core's DMA engines


@pytest.fixture(params=KERNELS)
def found(request):
    return KERNELS[request.param]()


def test_time_is_the_estimate_and_says_modelled(found):
    facts, band = found.to_dict(), found.time
    assert facts["modelled"] is True
    assert facts["time_us"] == {
        "low": band.low / 1e3,
        "central": band.central / 1e3,
        "high": band.high / 1e3,
    }
    assert band.low <= band.central <= band.high
    first, second = str(found).splitlines()[:2]
    assert "MODELLED" in first
    assert "not measured" in second and "not run on hardware" in second


def test_report_is_json(found):
    facts = found.to_dict()
    assert json.loads(json.dumps(facts)) == facts


def test_engines_are_the_timeline_s(found):
    t = found.timeline
    for number, core in enumerate(found.to_dict()["cores"]):
        assert core["engines"]
        assert sum(e["instructions"] for e in core["engines"].values()) == len(
            t.run.cores[number].instructions
        )
        for lane, facts in core["engines"].items():
            assert facts["busy_us"] == t.busy(lane, number) / 1e3
            stalls = t.stalls(lane, number)
            assert facts["stall_us"] == {c.name: ns / 1e3 for c, ns in stalls.items()}
            assert 0 <= facts["busy_share"] <= 1 + 1e-9
            assert 0 <= facts["stall_share"] <= 1 + 1e-9
            assert facts["stall_share"] == pytest.approx(sum(stalls.values()) / t.total)


def test_waits_name_their_cause_and_stay_within_the_stall(found):
    t = found.timeline
    for core in found.to_dict()["cores"]:
        for facts in core["engines"].values():
            told = sum(w["us"] for w in facts["waits"])
            assert told <= sum(facts["stall_us"].values()) + 1e-9
            assert bool(facts["stall_us"]) == bool(facts["waits"])
            assert all(".py:" in w["for"] for w in facts["waits"])
    assert (t.cause[t.stall > 0] != Cause.LANE).any()


def test_critical_path_accounts_for_all_of_the_time(found):
    path, total = found.to_dict()["critical_path"], found.time.central / 1e3
    lines = sum(row["time_us"] for row in path["lines"]) + path["other_lines_us"]
    assert lines == pytest.approx(total)
    assert sum(path["engines_us"].values()) == pytest.approx(total)
    assert sum(path["causes_us"].values()) == pytest.approx(total)
    times = [row["time_us"] for row in path["lines"]]
    assert times == sorted(times, reverse=True)
    assert all(row["text"] for row in path["lines"])


def test_dma_counts_bytes_by_hand():
    found = profile_of(pipeline, *shapes((128, 2048)))
    dma = found.to_dict()["cores"][0]["dma"]
    nbytes = 128 * 2048 * 4
    assert dma["transfers"] == 16
    assert dma["bytes_written"] == 2 * nbytes
    assert dma["hbm_bytes"] == 2 * nbytes
    assert dma["bytes_per_descriptor"] == 1024
    assert dma["gb_s"] == pytest.approx(2 * nbytes / found.time.central)
    assert dma["gb_s_while_active"] == pytest.approx(2 * nbytes / found.timeline.busy("dma"))
    assert dma["gb_s"] < dma["gb_s_while_active"]


def test_roofline_of_matmuls_by_hand():
    found = profile_of(matmuls, *shapes((256, 128), (256, 1024), dtype="bfloat16"))
    r = found.to_dict()["roofline"]
    flops = 2 * 256 * 128 * 1024
    needed = 2 * (256 * 128 + 256 * 1024 + 128 * 1024)
    assert (r["work"], r["work_done"], r["unit"]) == (flops, flops, "flop")
    assert (r["needed_bytes"], r["hbm_bytes"]) == (needed, needed + 2 * 256 * 128)  # a twice
    assert r["intensity"] == flops / needed
    assert r["peak_g_per_s"] == pytest.approx(2 * 128 * 128 * 2.4)
    assert r["dma_peak_gb_s"] == pytest.approx(DMA) and DMA < HBM
    assert r["ridge"] == pytest.approx(2 * 128 * 128 * 2.4 / DMA)
    assert r["bound"] == "DMA engines"
    assert r["ceiling_g_per_s"] == pytest.approx(r["intensity"] * DMA)
    assert r["share_of_ceiling"] == pytest.approx(flops / found.time.central / r["ceiling_g_per_s"])
    tensor = found.to_dict()["cores"][0]["tensor"]
    assert tensor["utilisation"] == pytest.approx(flops / found.time.central / (2 * 128**2 * 2.4))


def test_fp32_has_a_quarter_of_the_roof():
    r = roofline_of(profile_of(matmuls, *shapes((256, 128), (256, 512))).timeline)
    assert r.peak == pytest.approx(2 * 128 * 128 * 2.4 / 4)


def test_pairs_of_fp8_rows_have_twice_the_roof():
    """So a product that takes half the time of bfloat16's is no nearer to it."""

    def pairs(st_hbm, mv_hbm):
        st, mv = sbuf(st_hbm.shape, st_hbm.dtype), sbuf(mv_hbm.shape, mv_hbm.dtype)
        nisa.dma_copy(st, st_hbm)
        nisa.dma_copy(mv, mv_hbm)
        out = psum((128, 512))
        nisa.nc_matmul(out, st, mv, perf_mode=nisa.matmul_perf_mode.double_row)
        copied, result = sbuf((128, 512)), hbm((128, 512))
        nisa.tensor_copy(copied, out)
        nisa.dma_copy(result, copied)
        return result

    operands = shapes((128, 2, 128), (128, 2, 512), dtype="float8_e4m3")
    r = roofline_of(profile_of(pairs, *operands).timeline)
    assert r.peak == pytest.approx(2 * 2 * 128 * 128 * 2.4)
    assert r.flops == 2 * 256 * 128 * 512


def test_without_matmuls_the_roof_is_bandwidth():
    found = profile_of(pipeline, *shapes((128, 2048)))
    r = found.to_dict()["roofline"]
    needed = 2 * 128 * 2048 * 4
    assert (r["unit"], r["work"], r["intensity"], r["ridge"]) == ("byte", needed, None, None)
    assert r["share_of_ceiling"] == pytest.approx(needed / found.time.central / DMA)
    assert "no matrix products, under the DMA engines' roof" in str(found)


def test_without_hbm_there_is_no_roof():
    def body():
        nisa.tensor_copy(sbuf((128, 512)), sbuf((128, 512)))

    found = profile_of(body)
    assert found.to_dict()["roofline"]["share_of_ceiling"] is None
    assert "no matrix products and no HBM traffic, so no roof" in str(found)


def test_the_slower_of_two_kernels_never_looks_better():
    """The same results by more passes over more elements: time is all that tells them apart."""
    inputs = shapes((256, 1024), (1, 1024), dtype="bfloat16")
    plain, fused = (profile_of(k, *inputs) for k in (rowwise.rms_norm, rowwise.rms_norm_fused))
    one, other = (roofline_of(found.timeline) for found in (plain, fused))
    assert one.needed_bytes == other.needed_bytes == 2 * (2 * 256 * 1024 + 1024)
    assert other.share / one.share == pytest.approx(plain.time.central / fused.time.central)


def loaded_often(a, times):
    """Copies a, which is loaded again and again, and multiplies each time."""
    out, sums = hbm((128, 128)), psum((128, 128))
    for _ in range(times):
        tile = sbuf((128, 128), a.dtype)
        nisa.dma_copy(tile, a)
        nisa.nc_matmul(sums, tile, tile, accumulate=False)
    result = sbuf((128, 128))
    nisa.tensor_copy(result, sums)
    nisa.dma_copy(out, result)
    return out


def test_work_that_is_repeated_counts_once():
    once, often = (
        roofline_of(profile_of(loaded_often, *shapes((128, 128), dtype="bfloat16"), n).timeline)
        for n in (1, 8)
    )
    assert often.flops == once.flops and often.flops_done == 8 * once.flops
    assert often.needed_bytes == once.needed_bytes < often.hbm_bytes
    assert often.share < once.share


def test_memory_in_use_by_hand():
    """Two tiles live at once, then one: 512 fp32 are 2,048 bytes, PSUM counts whole banks."""

    def body():
        a, b = sbuf((128, 512)), sbuf((128, 512))
        sums = nl.ndarray((128, 64), nl.float32, buffer=nl.psum)
        nisa.memset(a, 0.0)
        nisa.tensor_copy(b, a)
        nisa.tensor_copy(sums, b[:, :64])

    found = profile_of(body)
    memory = found.to_dict()["cores"][0]["memory"]
    assert memory["sbuf"]["peak"] == 4096
    assert memory["psum"]["peak"] == 2048
    t = found.timeline
    assert memory["sbuf"]["peak_at_us"] == t.issue[1] / 1e3
    held = 2048 * (t.free[1] - t.issue[0]) + 2048 * (t.free[2] - t.issue[1])
    assert memory["sbuf"]["mean"] == pytest.approx(held / t.total)


def test_memory_never_exceeds_what_there_is():
    """Tiles that reuse room wait for it, so the peaks over time stay within the limits."""
    found = example("fresh_buffers", 512, 1024, 1024)
    for facts in found.to_dict()["cores"][0]["memory"].values():
        assert 0 < facts["mean"] <= facts["peak"] <= facts["limit"]


def test_two_cores_share_the_roof():
    facts = profile_of(copies, *shapes((128, 512)), lnc=2).to_dict()
    assert len(facts["cores"]) == 2
    one, other = (core["dma"]["bytes_written"] for core in facts["cores"])
    assert one == other == 2 * 128 * 256 * 4
    assert facts["roofline"]["bandwidth_peak_gb_s"] == HBM
    assert facts["roofline"]["hbm_bytes"] == one + other


@pytest.mark.parametrize(
    ("kernel", "inputs"),
    [(matmuls, shapes((256, 128), (256, 512), dtype="bfloat16")), (pipeline, shapes((128, 512)))],
    ids=["matrix products", "bandwidth"],
)
def test_two_cores_that_do_the_same_have_no_more_work_and_a_smaller_share(kernel, inputs):
    one, two = (roofline_of(profile_of(kernel, *inputs, lnc=n).timeline) for n in (1, 2))
    assert (two.flops, two.needed_bytes) == (one.flops, one.needed_bytes)
    assert (two.flops_done, two.hbm_bytes) == (2 * one.flops_done, 2 * one.hbm_bytes)
    assert two.peak == pytest.approx(2 * one.peak) and two.dma == pytest.approx(2 * one.dma)
    assert two.hbm == one.hbm == HBM
    assert two.share < one.share


def test_two_cores_that_halve_the_work_keep_their_share():
    r = roofline_of(profile_of(copies, *shapes((128, 512)), lnc=2).timeline)
    assert r.needed_bytes == r.hbm_bytes == 2 * 128 * 512 * 4


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40)), min_size=1, max_size=12))
@settings(max_examples=30)
def test_every_needed_byte_counts_once(pieces):
    """Column slices of one argument, overlapping as they like, against a mask."""
    mask = np.zeros(100, bool)
    for start, width in pieces:
        mask[start : start + width] = True

    def body(a):
        for start, width in pieces:
            nisa.dma_copy(sbuf((128, width)), a[:, start : start + width])

    found = profile_of(body, *shapes((128, 100)))
    assert needed_bytes(found.run) == mask.sum() * 128 * 4


def test_bandwidth_counts_what_is_read_and_what_is_written():
    """A load reads the stack, a store writes it, a copy between its tensors does both."""
    nbytes = 128 * 512 * 4
    for to, of, times in ((sbuf, hbm, 1), (hbm, sbuf, 1), (hbm, hbm, 2), (sbuf, sbuf, 0)):
        found = profile_of(lambda to=to, of=of: nisa.dma_copy(to((128, 512)), of((128, 512))))
        facts = found.to_dict()
        dma = facts["cores"][0]["dma"]
        assert dma["bytes_written"] == nbytes
        assert dma["hbm_bytes"] == facts["roofline"]["hbm_bytes"] == times * nbytes
        rate = times * nbytes / found.timeline.total
        assert dma["gb_s"] == pytest.approx(rate)
        assert facts["roofline"]["bandwidth_gb_s"] == pytest.approx(rate)
        assert dma["gb_s_while_active"] >= dma["gb_s"]


def test_an_empty_kernel_has_a_report():
    found = profile_of(lambda: hbm((1, 1)))
    assert found.time.central == 0
    assert found.to_dict()["instructions"] == 0
    assert found.advice == []
    assert "0.00 us MODELLED" in str(found)


def test_data_gives_the_same_time_and_the_results():
    a = np.linspace(-1, 1, 128 * 512, dtype=np.float32).reshape(128, 512)
    with_data, without = profile_of(pipeline, a, data=True), profile_of(pipeline, a)
    assert with_data.time == without.time
    np.testing.assert_allclose(with_data.result, np.exp(2 * a), rtol=1e-5)
    assert without.result.shape == (128, 512)


def test_assumed_trip_counts_are_told():
    def body(count):
        register = nisa.register_alloc()
        nisa.register_load(register, count)
        tile = sbuf((128, 64))
        nl.fori_loop(0, register, lambda _: nisa.memset(tile, 0.0) and None)

    times = {}
    for trips in (2, 5):
        found = profile_of(body, *shapes((1, 1), dtype="int32"), unknown=cost.trips.constant(trips))
        times[trips] = found.time.central
        assert any(f"the constant {trips}" in line for line in found.to_dict()["assumptions"])
        assert f"assumed: 1 registers that data would set were taken from the constant {trips}" in (
            str(found)
        )
    assert times[2] < times[5]


def test_parameter_sets_differ_and_are_named():
    slow = profile_of(pipeline, *shapes((128, 2048)))
    other = profile_of(pipeline, *shapes((128, 2048)), params="documented")
    assert other.time != slow.time
    assert other.to_dict()["params"] == "documented"
    with pytest.raises(ValueError, match="no parameter set is named 'guess'"):
        profile_of(pipeline, *shapes((128, 512)), params="guess")


def test_profile_is_public():
    assert simulator.profile and simulator.Profile
    assert "pipeline" in repr(simulator.profile(pipeline)(*shapes((128, 512))))


def test_rows_that_overlap_count_once():
    def body(a):
        for first in (0, 32, 32):
            nisa.dma_copy(sbuf((64, 256)), a[first : first + 64, :])

    assert needed_bytes(profile_of(body, *shapes((128, 256))).run) == 96 * 256 * 4
