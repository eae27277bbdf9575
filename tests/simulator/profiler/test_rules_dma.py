"""Each rule of advice about DMA: its limits, and the most that it promises."""

from __future__ import annotations

from functools import partial

import pytest
from profile_helpers import HARDWARE, ask, hbm, nisa, nl, sbuf, shapes

from nsa_neuron.simulator.cost import load
from nsa_neuron.simulator.profiler import rules_dma

P = load()


def loads(count, width, rows=128, **how):
    """So many loads of different columns, in one line."""

    def body(a):
        for k in range(count):
            nisa.dma_copy(sbuf((rows, width)), a[:rows, k * width : (k + 1) * width], **how)

    return body, shapes((128, count * width))[0]


@pytest.mark.parametrize(("width", "told"), [(256, 2), (511, 2), (512, 0)])
def test_rows_of_two_kib_are_long_enough(width, told):
    (body, a) = loads(2, width)
    found, _ = ask(rules_dma.small_rows, body, a)
    assert [c.indices for c in found] == ([[0, 1]] if told else [])


@pytest.mark.parametrize("how", [{}, {"dge_mode": nisa.dge_mode.swdge}])
def test_what_longer_rows_spare(how):
    """128 rows of 1 KiB are 64 of 2 KiB: 64 descriptors and 64 runs less, on 16 engines."""
    (body, a) = loads(2, 256, **how)
    (found,), base = ask(rules_dma.small_rows, body, a)
    spared = 64 * (P.dma_descriptor + P.dma_hbm_run) / 16 + bool(how) * 64 * P.dma_descriptor_swdge
    assert found.bound == pytest.approx(2 * spared)
    assert "descriptors of 1,024 bytes; take at least 2048" in found.message
    for k in found.indices:
        old, new = base.t.costs[k].transfer, found.change.costs[k].transfer
        assert old.duration - new.duration == pytest.approx(
            64 * (P.dma_descriptor + P.dma_hbm_run) / 16
        )


@pytest.mark.parametrize(("rows", "engines"), [(8, 1), (32, 4), (64, 8), (72, 9), (128, 16)])
def test_half_of_the_dma_engines_are_few(rows, engines):
    (body, a) = loads(1, 512, rows)
    found, base = ask(rules_dma.few_engines, body, a)
    assert len(base.t.costs[0].transfer.parts) == engines
    assert len(found) == (engines <= 8)
    for c in found:
        busy = rows / engines * (P.dma_descriptor + 2048 / P.dma_rate) + (
            max(1, 1 / engines) * P.dma_hbm_run
        )
        assert c.bound == pytest.approx(busy * (1 - engines / 16))
        new = c.change.costs[0].transfer.parts
        assert [e for e, _ in new] == list(range(16))
        assert sum(t for _, t in new) == pytest.approx(busy * engines)


@pytest.mark.parametrize(
    ("count", "width", "together"),
    [
        (3, 64, 0), (4, 64, 2), (16, 16, 8), (8, 127, 2), (8, 128, 0), (5, 4, 5), (6, 26, 4),
    ],
)  # fmt: skip
def test_four_transfers_below_64_kib_are_many_small_ones(count, width, together):
    (body, a) = loads(count, width)
    found, base = ask(rules_dma.small_transfers, body, a)
    assert len(found) == bool(together)
    for c in found:
        assert f"{count} transfers of {128 * width * 4:,} bytes; move {together} in" in c.message
        spared = (P.dma_completion + P.dma_trigger) * (1 - 1 / together)
        assert c.bound == pytest.approx(count * spared)
        assert base.t.costs[0].transfer.completion == P.dma_completion  # the profile's own stays


def test_bytes_that_were_loaded_before():
    def body(a, b):
        for _ in range(3):
            nisa.dma_copy(sbuf((128, 64)), a)
        nisa.dma_copy(sbuf((128, 32)), a[:, :32])
        nisa.dma_copy(sbuf((128, 64)), b)

    found, base = ask(rules_dma.reloads, body, *shapes((128, 64), (128, 64)))
    (c,) = found
    assert c.indices == [1, 2]
    assert f"{2 * 128 * 64 * 4:,} bytes are loaded that were loaded before" in c.message
    assert all(not c.change.costs[k].transfer.duration for k in c.indices)
    packets = sum(max(t for _, t in base.t.costs[k].transfer.parts) for k in (1, 2))
    each = P.dma_completion + P.dma_trigger
    assert c.bound == pytest.approx(packets + 2 * each + base.t.stall[[1, 2]].sum())


def test_what_changes_between_two_loads_is_no_reload():
    def written(a):
        kept = hbm((128, 64))
        for _ in range(3):
            tile = sbuf((128, 64))
            nisa.dma_copy(tile, kept)
            nisa.dma_copy(kept, tile)

    def dynamic(a):
        index = sbuf((1, 1), nl.int32)
        nisa.memset(index, 0)
        for _ in range(3):
            view = a.ap([[64, 128], [1, 8]], scalar_offset=index)
            nisa.dma_copy(sbuf((128, 8)), view, dge_mode=HARDWARE)

    def each(a):
        nisa.dma_copy(sbuf((128, 64)), a)

    def on_chip(a):
        tile = sbuf((128, 64))
        for _ in range(3):
            nisa.dma_copy(sbuf((128, 64)), tile)

    for body, lnc in ((written, 1), (dynamic, 1), (each, 2), (on_chip, 1)):
        assert ask(rules_dma.reloads, body, *shapes((128, 64)), lnc=lnc)[0] == []


def refilled(a, stores=False, fresh=False):
    tile, out = sbuf((128, 512)), hbm((128, 512))
    for k in range(4):
        if fresh:
            tile = sbuf((128, 512))
        nisa.dma_copy(tile, a[:, k * 512 : (k + 1) * 512])
        nisa.activation(sbuf((128, 512)), nl.copy, tile)
        if stores:
            nisa.dma_copy(out, tile)


def test_a_single_buffer_is_one_that_loads_refill():
    a = shapes((128, 2048))
    (c,), base = ask(rules_dma.single_buffer, refilled, *a)
    assert c.indices == [0, 2, 4, 6]
    assert c.bound == pytest.approx(base.t.stall[[2, 4, 6]].sum())
    without, causes = c.change.without
    assert set(without) == {0, 2, 4, 6}
    assert {int(x) for x in causes} == {2, 3} or len(causes) == 2
    assert ask(rules_dma.single_buffer, partial(refilled, fresh=True), *a)[0] == []
    # Stores into one tensor of HBM wait too, but for no buffer.
    assert ask(rules_dma.single_buffer, partial(refilled, stores=True, fresh=True), *a)[0] == []


def behind(a, later=True, first_mode=nisa.dge_mode.unknown):
    """A load of what is stored late, and another line's load before or after it."""
    tile, kept = sbuf((128, 512)), hbm((128, 512))
    nisa.memset(tile, 0.0, engine=nisa.engine.gpsimd)
    nisa.dma_copy(kept, tile)
    if not later:
        nisa.dma_copy(sbuf((128, 512)), a)
    nisa.dma_copy(sbuf((128, 512)), kept, dge_mode=first_mode)
    if later:
        nisa.dma_copy(sbuf((128, 512)), a, dge_mode=first_mode)


def test_a_queue_is_blocked_for_those_behind_only():
    a = shapes((128, 512))
    (c,), base = ask(rules_dma.blocked_queue, behind, *a)
    assert c.indices == [2] and c.bound == pytest.approx(base.t.stall[2]) and c.bound > 0
    assert "queue dma-load" in c.message
    assert ask(rules_dma.blocked_queue, partial(behind, later=False), *a)[0] == []
    assert ask(rules_dma.blocked_queue, partial(behind, first_mode=HARDWARE), *a)[0] == []


def test_rows_in_one_run_have_no_runs_to_spare():
    (body, _) = loads(1, 256)
    (found,), _ = ask(rules_dma.small_rows, body, *shapes((128, 256)))
    assert found.bound == pytest.approx(64 * P.dma_descriptor / 16)


def test_neighbouring_columns_are_no_reload():
    (body, a) = loads(3, 64)
    assert ask(rules_dma.reloads, body, a)[0] == []


def test_a_line_does_not_block_itself():
    def body():
        tile, kept = sbuf((128, 512)), hbm((128, 512))
        nisa.memset(tile, 0.0, engine=nisa.engine.gpsimd)
        nisa.dma_copy(kept, tile)
        for _ in range(2):
            nisa.dma_copy(sbuf((128, 512)), kept)

    assert ask(rules_dma.blocked_queue, body)[0] == []
