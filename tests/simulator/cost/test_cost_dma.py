"""Cost of DMA transfers by hand: descriptors, runs, engines, queues, bandwidth."""

from __future__ import annotations

import numpy as np
import pytest
from cost_helpers import P, hbm, nisa, nl, sbuf, timeline

from nsa_neuron.simulator.cost.dma import contiguous_run
from nsa_neuron.simulator.machine.dtypes import resolve
from nsa_neuron.simulator.memory.layout import layout_of


def transfer(body):
    t = timeline(body)
    return t, t.costs[0].transfer


def engine_time(descriptors, runs, nbytes):
    """Ns of one DMA engine by the documented formula."""
    return descriptors * P.dma_descriptor + runs * P.dma_hbm_run + nbytes / P.dma_rate


def test_rows_of_a_wide_matrix_are_runs_of_their_own():
    t, x = transfer(lambda: nisa.dma_copy(sbuf((128, 512)), hbm((128, 8192))[:, 0:512]))
    assert (x.descriptors, x.hbm_runs, x.row_bytes, len(x.parts)) == (128, 128, 2048, 16)
    want = engine_time(8, 8, 8 * 2048)
    np.testing.assert_allclose(t.dma_busy[0], want)
    assert t.begin[0] == pytest.approx(P.dma_start)
    assert t.end[0] == pytest.approx(P.dma_start + want + P.dma_completion)


def test_a_tile_contiguous_in_hbm_is_one_run_per_engine():
    t, x = transfer(
        lambda: nisa.dma_copy(sbuf((128, 128), nl.bfloat16), hbm((128, 128), nl.bfloat16))
    )
    assert (x.descriptors, x.hbm_runs) == (128, 1)
    np.testing.assert_allclose(t.dma_busy[0], engine_time(8, 1, 2048))


def test_four_partitions_use_one_engine():
    t, x = transfer(
        lambda: nisa.dma_copy(sbuf((4, 4096), nl.bfloat16), hbm((4, 4096), nl.bfloat16))
    )
    assert len(x.parts) == 1
    assert t.dma_busy[0, 0] == pytest.approx(engine_time(4, 1, 32_768))
    assert t.dma_busy[0, 1:].sum() == 0


@pytest.mark.parametrize(
    ("shape", "strides", "pitch", "run", "apart"),
    [
        ((2, 3, 4), (12, 4, 1), 0, 24, 12),
        ((5, 2, 4), (8, 4, 1), 0, 40, 8),
        ((5, 2, 4), (16, 8, 1), 0, 4, 4),  # gaps between pieces of 4
        ((5, 1, 4), (4, 99, 1), 0, 20, 4),  # the step of a single element is none
        ((3, 1), (1, 7), 0, 3, 1),
        ((3,), (2,), 0, 1, 1),
        ((8, 4), (1, 8), 0, 1, 1),  # all there, out of order
        ((4, 2, 6), (12, 6, 1), 12, 12, 12),  # partitions are never neighbours
    ],
)
def test_what_lies_next_to_each_other_is_one_run(shape, strides, pitch, run, apart):
    """Of rows that indices choose, at most one."""
    layout = layout_of(shape, strides, resolve("float32"), pitch)
    assert contiguous_run(layout) == run
    assert contiguous_run(layout, rows_apart=True) == apart


@pytest.mark.parametrize(("start", "engine"), [(0, 0), (32, 4), (96, 12)])
def test_the_partition_chooses_the_engine(start, engine):
    _, x = transfer(lambda: nisa.dma_copy(sbuf((128, 64))[start : start + 8], hbm((8, 64))))
    assert [e for e, _ in x.parts] == [engine]


def test_holes_on_either_side_cut_descriptors():
    _, x = transfer(lambda: nisa.dma_copy(sbuf((128, 3, 100))[:, :, 0:50], hbm((128, 150))))
    assert x.descriptors == 128 * 3
    _, x = transfer(lambda: nisa.dma_copy(sbuf((128, 64)), hbm((128, 64, 2))[:, :, 0]))
    assert (x.descriptors, x.row_bytes) == (128 * 64, 4)


def test_long_rows_are_cut_at_64_kib():
    _, x = transfer(lambda: nisa.dma_copy(sbuf((1, 40_000)), hbm((1, 40_000))))
    assert x.descriptors == 3


def test_a_cast_moves_the_wider_side():
    _, narrow = transfer(lambda: nisa.dma_copy(sbuf((128, 512), nl.bfloat16), hbm((128, 512))))
    assert narrow.row_bytes == 2048
    assert narrow.nbytes == 128 * 512 * 2


def test_between_hbm_tensors_the_stack_is_read_and_written():
    t, x = transfer(lambda: nisa.dma_copy(hbm((1024, 1024)), hbm((1024, 1024))))
    nbytes = 1024 * 1024 * 4
    assert x.hbm_bytes == 2 * nbytes
    at_stack = 2 * nbytes / P.hbm_stack
    assert t.dma_busy[0].max() == pytest.approx(at_stack, rel=0.01)
    assert at_stack > nbytes / (16 * P.dma_rate)


@pytest.mark.parametrize(
    ("dst", "src", "options", "queue"),
    [
        (sbuf, hbm, {}, "dma-load"),
        (hbm, sbuf, {}, "dma-store"),
        (sbuf, sbuf, {}, "dma-copy"),
        (sbuf, hbm, {"dge_mode": nisa.dge_mode.swdge}, "dma-gpsimd"),
        (sbuf, hbm, {"dge_mode": nisa.dge_mode.hwdge}, "dma-sync"),
        (sbuf, hbm, {"dge_mode": nisa.dge_mode.hwdge, "engine": nisa.engine.scalar}, "dma-scalar"),
    ],
)
def test_queues(dst, src, options, queue):
    t = timeline(lambda: nisa.dma_copy(dst((128, 64)), src((128, 64)), **options))
    assert t.lanes[t.lane[0]] == queue


def test_software_descriptors_take_gpsimd_time():
    def body():
        nisa.dma_copy(sbuf((128, 64)), hbm((128, 64)), dge_mode=nisa.dge_mode.swdge)
        nisa.iota(sbuf((128, 64), nl.int32), [[1, 64]])

    t = timeline(body)
    assert t.issue[1] == pytest.approx(P.dma_trigger_swdge + 128 * P.dma_descriptor_swdge)


def test_transfers_share_engines_first_come_first_served():
    def body():
        for _ in range(2):
            nisa.dma_copy(sbuf((128, 2048)), hbm((128, 2048)))

    t = timeline(body)
    one = engine_time(8, 1, 8 * 8192) + P.dma_completion
    assert t.issue[1] == pytest.approx(P.dma_trigger)
    assert t.end[1] == pytest.approx(P.dma_start + 2 * one)
    assert t.notes[1]["dma-engines-busy"] > 0


def test_transfers_on_different_engines_overlap():
    def body():
        a = sbuf((128, 2048))
        nisa.dma_copy(a[0:32], hbm((32, 2048)))
        nisa.dma_copy(a[32:64], hbm((32, 2048)))

    t = timeline(body)
    assert t.end[1] - t.end[0] == pytest.approx(P.dma_trigger)


def test_two_cores_share_a_stack():
    def body():
        nisa.dma_copy(sbuf((128, 8192)), hbm((128, 8192)))

    one, two = timeline(body), timeline(body, lnc=2)
    slower = 16 * P.dma_rate / (P.hbm_stack / 2)
    moved = 8 * 8192 * 4 / P.dma_rate
    assert two.dma_busy[1, 0] - one.dma_busy[0, 0] == pytest.approx(moved * (slower - 1))


def test_gathered_rows_are_runs_of_their_own():
    def body():
        index = sbuf((128, 1), nl.int32)
        table = hbm((1000, 256), nl.bfloat16)
        rows = table.ap([[256, 128], [1, 256]], vector_offset=index)
        nisa.dma_copy(sbuf((128, 256), nl.bfloat16), rows)

    _, x = transfer(body)
    assert (x.descriptors, x.hbm_runs, x.row_bytes, x.queue) == (128, 128, 512, "dma-gpsimd")


def test_no_dma_engine_is_in_two_transfers_at_once():
    """Even ones on all engines and small ones on some, one after the other, again and again."""

    def body():
        for _ in range(3):
            nisa.dma_copy(sbuf((128, 512)), hbm((128, 512)))
            nisa.dma_copy(sbuf((128, 512))[0:32], hbm((32, 512)))
            nisa.dma_copy(sbuf((128, 512))[96:128], hbm((32, 512)))

    t = timeline(body, dma_trigger=0.0)
    busy = np.zeros(16)
    for i, cost in enumerate(t.costs):
        before = busy.copy()
        for engine, time in cost.transfer.parts:
            busy[engine] += time + cost.transfer.completion
        used = [engine for engine, _ in cost.transfer.parts]
        assert t.end[i] == pytest.approx(P.dma_start + busy[used].max())
        assert t.begin[i] == pytest.approx(P.dma_start + before[used].min())
        assert (t.notes.get(i, {}).get("dma-engines-busy", 0.0) > 0) == bool(before[used].min())
    assert t.total == pytest.approx(P.dma_start + busy.max())


def test_a_transfer_after_idle_engines_does_not_wait_for_them():
    def body():
        a = sbuf((128, 64))
        nisa.dma_copy(a, hbm((128, 64)))
        nisa.tensor_copy(a, a)
        nisa.dma_copy(hbm((128, 64)), a)

    t = timeline(body)
    assert t.begin[2] == pytest.approx(t.issue[2] + P.dma_start)
    assert "dma-engines-busy" not in t.notes.get(2, {})


def test_only_the_first_transfer_of_each_core_warms_up():
    """8 descriptors of 2 ns, a run of 4 ns, 2048 bytes at 32 bytes per ns: 84 ns of packets."""

    def body():
        nisa.dma_copy(sbuf((128, 64))[0:8], hbm((8, 64)))
        nisa.dma_copy(sbuf((128, 64))[8:16], hbm((8, 64)))

    t = timeline(
        body, lnc=2, dma_warm_up=500.0, dma_trigger=50.0, dma_start=800.0, dma_completion=100.0,
        dma_descriptor=2.0, dma_hbm_run=4.0, dma_rate=32.0, hbm_stack=1024.0,
    )  # fmt: skip
    assert list(t.end) == [800 + 84 + 100 + 500, 50 + 800 + 84 + 100] * 2
    assert t.notes == {0: {"dma-warm-up": 500.0}, 2: {"dma-warm-up": 500.0}}
