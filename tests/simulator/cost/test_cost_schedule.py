"""Rules of the schedule, one micro-kernel each, against times worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from cost_helpers import P, hbm, nisa, nl, of, psum, record, sbuf, timeline

from nsa_neuron.simulator import cost
from nsa_neuron.simulator.cost import Cause
from nsa_neuron.simulator.cost.loops import Continued

SEMAPHORE = P.semaphore
VECTOR, SCALAR = 0.96, 1.2


def test_engines_run_in_parallel():
    def body():
        nisa.tensor_copy(sbuf((128, 512)), sbuf((128, 512)))
        nisa.activation(sbuf((128, 512)), nl.copy, sbuf((128, 512)))
        nisa.iota(sbuf((128, 512), nl.int32), [[1, 512]])

    t = timeline(body)
    assert list(t.issue) == [0, 0, 0]
    assert set(t.cause) == {Cause.LANE}


def test_one_engine_takes_its_instructions_one_interval_apart():
    def body():
        for _ in range(3):
            nisa.tensor_copy(sbuf((128, 512)), sbuf((128, 512)))

    np.testing.assert_allclose(timeline(body).issue, np.arange(3) * 572 / VECTOR)


def test_read_after_write_on_one_engine_waits_for_the_pipeline():
    def body():
        a = sbuf((128, 512))
        nisa.memset(a, 0.0)
        nisa.tensor_copy(sbuf((128, 512)), a)

    t = timeline(body)
    assert t.issue[1] == t.end[0] == pytest.approx(664 / VECTOR)
    assert (t.cause[1], t.blocker[1]) == (Cause.RAW, 0)
    assert t.stalls("vector") == {Cause.RAW: pytest.approx(92 / VECTOR)}


@pytest.mark.parametrize(
    ("second", "cause"),
    [
        (lambda a, b: nisa.activation(sbuf((128, 512)), nl.copy, b), Cause.RAW),
        (lambda a, b: nisa.activation(b, nl.copy, sbuf((128, 512))), Cause.WAW),
        (lambda a, b: nisa.activation(a, nl.copy, sbuf((128, 512))), Cause.WAR),
    ],
)
def test_dependencies_between_engines(second, cause):
    def body():
        a, b = sbuf((128, 512)), sbuf((128, 512))
        nisa.tensor_copy(b, a)
        second(a, b)

    t = timeline(body)
    assert t.issue[1] == pytest.approx(664 / VECTOR + SEMAPHORE)
    assert (t.cause[1], t.blocker[1]) == (cause, 0)


def test_halves_of_a_tile_are_independent():
    def body():
        a = sbuf((128, 512))
        nisa.tensor_copy(a[:, 0:256], sbuf((128, 256)))
        nisa.activation(sbuf((128, 256)), nl.copy, a[:, 256:512])
        nisa.activation(sbuf((128, 256)), nl.copy, a[:, 128:384])

    t = timeline(body)
    assert t.issue[1] == 0
    assert t.cause[2] == Cause.RAW


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((slice(0, 64), slice(None)), (slice(64, 128), slice(None))),
        ((slice(64, 128), slice(None)), (slice(0, 64), slice(None))),
        ((slice(None), slice(0, 256)), (slice(None), slice(256, 512))),
        ((slice(None), slice(256, 512)), (slice(None), slice(0, 256))),
    ],
)
def test_a_write_to_one_half_stands_for_no_more_than_that(one, other):
    """A write to the other half waits for the readers of the whole, too."""

    def body():
        tile, source = sbuf((128, 512)), sbuf((128, 512))
        nisa.activation(sbuf((128, 512)), nl.copy, tile)
        nisa.tensor_copy(tile[one], source[one])
        nisa.memset(tile[other], 0.0, engine=nisa.engine.gpsimd)

    t = timeline(body)
    assert list(t.cause[1:]) == [Cause.WAR] * 2 and list(t.blocker[1:]) == [0, 0]
    assert t.issue[1] == t.issue[2] > 512 / SCALAR


def test_columns_of_a_matrix_in_hbm_are_independent():
    def body():
        out = hbm((256, 256))
        a = sbuf((128, 128))
        nisa.memset(a, 0.0)
        for row in range(0, 256, 128):
            for column in range(0, 256, 128):
                nisa.dma_copy(out[row : row + 128, column : column + 128], a)
        nisa.dma_copy(sbuf((128, 256)), out[0:128])

    t = timeline(body)
    assert list(t.blocker[1:5]) == [0, -1, -1, -1]
    assert t.blocker[5] == 2 and t.cause[5] == Cause.RAW


def test_accumulation_in_psum_does_not_wait_for_itself():
    def body():
        acc, st, mv = psum((128, 512)), sbuf((128, 128)), sbuf((128, 512))
        for _ in range(4):
            nisa.nc_matmul(acc, st, mv)
        nisa.tensor_copy(sbuf((128, 512)), acc)

    t = timeline(body)
    np.testing.assert_allclose(np.diff(t.issue[:4]), 2060 / 2.4)
    assert t.issue[4] == pytest.approx(t.end[3] + SEMAPHORE)


def test_psum_has_eight_banks():
    def body():
        st, mv = sbuf((128, 128)), sbuf((128, 512))
        for _ in range(9):
            acc = psum((128, 512))
            nisa.nc_matmul(acc, st, mv)
            nisa.tensor_copy(sbuf((128, 512)), acc, engine=nisa.engine.vector)

    t = timeline(body, vector_latency=20_000)
    ninth = 16
    assert (t.cause[ninth], t.blocker[ninth]) == (Cause.SPACE, 1)
    assert t.issue[ninth] == pytest.approx(t.end[1] + SEMAPHORE)


def test_sbuf_bytes_are_reused_when_their_tensor_was_used_last():
    def body():
        for _ in range(3):
            big = sbuf((128, 25_000))  # 100,000 of 212,984 bytes
            nisa.memset(big, 0.0)
            nisa.activation(sbuf((128, 16)), nl.copy, big[:, 0:16])

    t = timeline(body, scalar_latency=200_000)
    assert t.issue[2] == pytest.approx(t.free[0])
    assert (t.cause[4], t.blocker[4]) == (Cause.SPACE, 1)
    assert t.issue[4] == pytest.approx(t.end[1] + SEMAPHORE)


def test_the_room_of_one_tensor_serves_several_each_after_its_last_use():
    def body():
        big = sbuf((128, 50_000))  # 200,000 of 212,984 bytes
        nisa.memset(big, 0.0)
        seen = sbuf((128, 16))
        nisa.activation(seen, nl.copy, big[:, 0:16])
        left, right = sbuf((128, 20_000)), sbuf((128, 20_000))
        nisa.memset(left, 0.0)
        nisa.memset(right, 0.0, engine=nisa.engine.gpsimd)
        nisa.tensor_copy(left, right)
        nisa.tensor_copy(left[:, 0:16], seen)

    t = timeline(body, scalar_latency=200_000)
    assert list(t.cause[2:4]) == [Cause.SPACE] * 2 and list(t.blocker[2:4]) == [1, 1]
    assert t.issue[2] == t.issue[3] == pytest.approx(t.end[1] + SEMAPHORE)


def test_loads_run_ahead_of_compute():
    def body():
        x = hbm((1024, 512))
        for i in range(8):
            a = sbuf((128, 512))
            nisa.dma_copy(a, x[i * 128 : (i + 1) * 128])
            nisa.tensor_copy(sbuf((128, 512)), a)

    t = timeline(body)
    loads = t.members("dma-load")
    np.testing.assert_allclose(np.diff(t.issue[loads]), P.dma_trigger)
    assert t.issue[1] == pytest.approx(t.end[0] + P.dma_semaphore)


def test_pe_starts_at_half_rate():
    def body():
        acc, st, mv = psum((128, 512)), sbuf((128, 128)), sbuf((128, 512))
        for _ in range(8):
            nisa.nc_matmul(acc, st, mv)

    t = timeline(body, pe_warm_up=4600)
    half, full = 2 * 2060 / 2.4, 2060 / 2.4
    np.testing.assert_allclose(np.diff(t.issue), [half] * 3 + [full] * 4)
    assert sorted(t.notes) == [0, 1, 2]


def test_pe_falls_back_after_idling():
    def body():
        acc, st, mv = psum((128, 128)), sbuf((128, 128)), sbuf((128, 128))
        nisa.nc_matmul(acc, st, mv)
        late = sbuf((128, 8192))
        nisa.memset(late, 0.0)
        nisa.nc_matmul(acc, st, late[:, 0:128])

    t = timeline(body, pe_warm_up=100)
    assert t.issue[2] - t.free[0] > P.pe_cool_down
    assert t.free[2] - t.issue[2] == pytest.approx(2 * 524 / 2.4)


def test_one_bank_serves_one_of_vector_and_scalar():
    def body():
        acc = psum((128, 512))
        nisa.tensor_copy(sbuf((128, 512)), acc)
        nisa.activation(sbuf((128, 512)), nl.copy, acc)

    t = timeline(body)
    assert t.issue[1] == t.free[0] == pytest.approx(572 / VECTOR)
    assert (t.cause[1], t.blocker[1]) == (Cause.BANK, 0)
    assert timeline(body, psum_bank_share=0).issue[1] == 0


def test_different_banks_do_not_conflict():
    def body():
        acc = psum((128, 1024))
        nisa.tensor_copy(sbuf((128, 512)), acc[:, 0:512])
        nisa.activation(sbuf((128, 512)), nl.copy, acc[:, 512:1024])

    assert timeline(body).issue[1] == 0


def test_addressed_tensors_that_overlap_depend_on_each_other():
    def body():
        a = nl.ndarray((128, 64), nl.float32, address=(0, 1024))
        b = nl.ndarray((128, 64), nl.float32, address=(0, 2048))
        nisa.memset(a, 0.0)
        nisa.activation(b, nl.copy, sbuf((128, 64)))
        c = nl.ndarray((128, 64), nl.float32, address=(0, 1024))
        nisa.activation(c, nl.copy, sbuf((128, 64)))

    t = timeline(body)
    assert t.blocker[1] == -1
    assert (t.cause[2], t.blocker[2]) == (Cause.WAW, 0)


def test_depends_on():
    def body():
        first = nisa.tensor_copy(sbuf((128, 512)), sbuf((128, 512)))
        nisa.activation(sbuf((128, 512)), nl.copy, sbuf((128, 512))).depends_on(first)

    t = timeline(body)
    assert (t.cause[1], t.blocker[1]) == (Cause.EDGE, 0)
    assert t.issue[1] == pytest.approx(t.end[0] + SEMAPHORE)


@pytest.mark.parametrize("before", [1, 7, 8, 20])
def test_depends_on_one_of_many(before):
    def body():
        for _ in range(before):
            nisa.tensor_copy(sbuf((128, 64)), sbuf((128, 64)))
        last = nisa.tensor_copy(sbuf((128, 512)), sbuf((128, 512)))
        nisa.activation(sbuf((128, 512)), nl.copy, sbuf((128, 512))).depends_on(last)

    t = timeline(body)
    assert (t.cause[before + 1], t.blocker[before + 1]) == (Cause.EDGE, before)
    assert t.issue[before + 1] == pytest.approx(t.end[before] + SEMAPHORE)


def test_an_edge_against_lane_order_is_refused():
    def body():
        first = nisa.tensor_copy(sbuf((128, 512)), sbuf((128, 512)))
        first.depends_on(nisa.tensor_copy(sbuf((128, 512)), sbuf((128, 512))))

    with pytest.raises(ValueError, match="wait for one another"):
        timeline(body)


def test_a_run_time_index_may_touch_all_of_its_tensor():
    def body():
        table, index = sbuf((128, 512)), sbuf((1, 1), nl.int32)
        nisa.memset(table[:, 256:512], 0.0)
        view = table.ap([[512, 128], [1, 8]], scalar_offset=index)
        nisa.activation(sbuf((128, 8)), nl.copy, view)

    assert timeline(body).blocker[1] == 0


def test_a_busy_engine_delays_the_transfers_it_triggers():
    def body():
        nisa.activation(sbuf((128, 8192)), nl.copy, sbuf((128, 8192)))
        nisa.dma_copy(sbuf((128, 64)), hbm((128, 64)), dge_mode=nisa.dge_mode.hwdge,
                      engine=nisa.engine.scalar)  # fmt: skip

    t = timeline(body)
    assert (t.cause[1], t.blocker[1]) == (Cause.TRIGGER, 0)
    assert t.issue[1] == t.free[0]


def test_cores_meet_at_a_barrier():
    def body():
        shared = nl.ndarray((128, 512), nl.float32, buffer=nl.shared_hbm)
        if nl.program_id(0) == 1:
            a = sbuf((128, 8192))
            nisa.memset(a, 0.0)
            nisa.dma_copy(shared, a[:, 0:512])
        nisa.core_barrier(shared, (0, 1))
        nisa.dma_copy(sbuf((128, 512)), shared)

    t = timeline(body, lnc=2)
    barriers = [k for k, i in enumerate(t.instructions) if i.opcode == "core_barrier"]
    store = next(k for k, i in enumerate(t.instructions) if i.writes and
                 i.writes[0].allocation.buffer == "shared_hbm")  # fmt: skip
    first, second = barriers
    assert t.issue[first] == t.issue[second]
    assert t.issue[first] >= t.end[store] + P.dma_semaphore
    assert t.cause[first] == Cause.EDGE and t.blocker[first] == second
    for b, after in zip(barriers, (first + 1, second + 1), strict=True):
        assert t.issue[after] >= t.end[b]


@pytest.mark.parametrize("store", [True, False])
def test_a_barrier_waits_for_shared_hbm_that_is_no_operand_of_it(store):
    """Core 1 moves 4096 bytes for each DMA engine; then both meet over another tensor."""

    def body():
        shared = nl.ndarray((128, 128), nl.float32, buffer=nl.shared_hbm)
        flag = nl.ndarray((1, 1), nl.float32, buffer=nl.shared_hbm)
        if nl.program_id(0) == 1:
            tile = sbuf((128, 128))
            nisa.dma_copy(shared, tile) if store else nisa.dma_copy(tile, shared)
        nisa.core_barrier(flag, (0, 1))
        if nl.program_id(0) == 0:
            nisa.dma_copy(sbuf((128, 128)), shared)

    t = timeline(
        body, lnc=2, dma_start=800.0, dma_completion=100.0, dma_descriptor=2.0, dma_hbm_run=4.0,
        dma_rate=32.0, hbm_stack=1024.0, dma_semaphore=300.0, core_meeting=2000.0, semaphore=40.0,
    )  # fmt: skip
    first, after, moved, second = range(4)
    assert [i.opcode for i in t.instructions] == [
        "core_barrier", "dma_copy", "dma_copy", "core_barrier",
    ]  # fmt: skip
    end = 800 + 8 * 2 + 4 + 4096 / 32 + 100
    assert t.end[moved] == end
    assert t.issue[first] == t.issue[second] == end + 300
    assert (t.cause[second], t.blocker[second]) == (Cause.EDGE, moved)
    assert t.issue[after] == end + 300 + 2000 + 40


@pytest.mark.parametrize("mover", [nisa.dma_engine.dma, nisa.dma_engine.gpsimd_dma])
def test_messages_through_crossed_pipes_end_together(mover):
    def body():
        me = nl.program_id(0)
        got = [sbuf((128, 64)) for _ in range(2)]
        if me == 1:
            nisa.memset(got[0], 0.0)
        for pipe in (0, 1) if me == 0 else (1, 0):
            nisa.sendrecv(sbuf((128, 64)), got[pipe], 1 - me, 1 - me, pipe, dma_engine=mover)
        for tile in got:
            nisa.activation(sbuf((128, 64)), nl.copy, tile)

    t = timeline(body, lnc=2)
    messages = [k for k, i in enumerate(t.instructions) if i.opcode == "sendrecv"]
    ends = {(t.lane_core[t.lane[k]], t.instructions[k].params.pipe_id): t.end[k] for k in messages}
    for pipe in (0, 1):
        assert ends[0, pipe] == ends[1, pipe]
    for core in (0, 1):
        for pipe, k in enumerate(t.members("scalar", core)):
            assert t.issue[k] >= ends[core, pipe] + SEMAPHORE


def test_a_schedule_is_a_function_of_record_and_constants():
    def body():
        x = hbm((512, 512))
        for i in range(4):
            a, acc = sbuf((128, 512)), psum((128, 512))
            nisa.dma_copy(a, x[i * 128 : (i + 1) * 128])
            nisa.nc_matmul(acc, a[:, 0:128], a)
            nisa.activation(sbuf((128, 512)), nl.exp, acc)

    run = record(body)
    a, b, c = of(run), of(run), of(record(body))
    for name in ("issue", "end", "cause", "blocker"):
        assert np.array_equal(getattr(a, name), getattr(b, name))
        assert np.array_equal(getattr(a, name), getattr(c, name))


def test_an_empty_kernel_takes_no_time():
    t = timeline(lambda: None)
    assert t.total == 0 and t.critical_path() == []


def test_the_estimate_orders_its_band():
    def body():
        a = sbuf((128, 512))
        nisa.dma_copy(a, hbm((128, 512)))
        nisa.activation(sbuf((128, 512)), nl.exp, a)

    band = cost.estimate(record(body)).band
    assert band.low < band.central < band.high


@pytest.mark.parametrize(
    ("totals", "band"),
    [
        ((1, 2, 3), (1, 2, 3)), ((3, 2, 1), (2, 2, 2)),
        ((2.5, 2, 3), (2, 2, 3)), ((1, 2, 1), (1, 2, 2)),
    ],
)  # fmt: skip
def test_a_band_holds_its_middle_whatever_constants_do_to_each_other(totals, band):
    timelines = [SimpleNamespace(total=total) for total in totals]
    found = cost.Estimate(*timelines).band
    assert (found.low, found.central, found.high) == band
    rest = tuple(Continued(added=10.0 * k) for k in (1, 2, 3))
    found = cost.Estimate(*timelines, rest).band
    assert found.central == totals[1] + 20 and found.high == totals[2] + 30
