"""Each rule of advice about what is done over again: its limits, and the most that it promises."""

from __future__ import annotations

import pytest
from profile_helpers import HARDWARE, ask, hbm, nisa, nl, sbuf, shapes

from nsa_neuron.simulator.cost import load
from nsa_neuron.simulator.profiler import rules_repeat, what_if

P = load()


def twice(rows, own=0):
    """Both cores store `rows` rows of the same, and `own` rows of their own."""

    def body(a):
        out, mine = hbm((rows * 128, 64)), hbm((2 * max(own, 1) * 128, 64))
        for k in range(rows):
            tile = sbuf((128, 64))
            nisa.dma_copy(tile, a)
            nisa.activation(tile, nl.copy, tile)
            nisa.dma_copy(out[k * 128 : (k + 1) * 128], tile)
        first = nl.program_id(0) * own
        for k in range(own):
            tile = sbuf((128, 64))
            nisa.dma_copy(tile, a)
            nisa.dma_copy(mine[(first + k) * 128 : (first + k + 1) * 128], tile)

    return body


@pytest.mark.parametrize(
    ("rows", "own", "told"), [(1, 0, False), (2, 0, True), (4, 4, True), (4, 5, False)]
)
def test_half_of_what_a_core_stores_must_be_the_other_s_too(rows, own, told):
    found, base = ask(rules_repeat.same_work, twice(rows, own), *shapes((128, 64)), lnc=2)
    assert bool(found) is told
    for c in found:
        assert f"both cores store the same {rows * 128 * 64 * 4:,} bytes" in c.message
        again = base._again(c.change)
        half = len(again.end) // 2
        for k in (0, 1):  # each core stores half, and computes no more than that
            part = range(k * half, (k + 1) * half)
            kept = [i for i in part if again.costs[i].latency and again.costs[i].transfer is None]
            assert len(kept) == rows // 2
        assert c.bound > 0


@pytest.mark.parametrize(("width", "transfers"), [(64, False), (16384, True)])
def test_same_work_is_worth_the_engines_time_or_half_of_the_transfers(width, transfers):
    """Two stores of 12 partitions, each after a pass: each core is spared one, and its pass.

    Eight partitions are on one DMA engine, four on another.
    """

    def body():
        out = hbm((2, 12, width))
        for k in range(2):
            tile = sbuf((12, width))
            nisa.activation(tile, nl.copy, sbuf((12, width)))
            nisa.dma_copy(out[k], tile)

    (c,), base = ask(rules_repeat.same_work, body, lnc=2)
    pass_, store = base.t.costs[:2]
    (_, slow), (_, quick) = store.transfer.parts
    own = pass_.interval + store.interval
    assert slow > quick and (slow > own) is transfers
    assert c.bound == pytest.approx(slow if transfers else own)


def followed(trips, body_of=None, lnc=1):
    def body(a):
        def step(i):
            tile = sbuf((128, 64))
            nisa.dma_copy(tile, a.select(0, i), dge_mode=HARDWARE)
            nisa.activation(sbuf((128, 64)), nl.exp, tile)

        nl.fori_loop(0, trips, step)

    return body


@pytest.mark.parametrize(("trips", "told"), [(2, 0), (3, 1), (6, 1)])
def test_addresses_that_follow_the_index_of_three_iterations(trips, told):
    found, base = ask(rules_repeat.run_time_operands, followed(trips), *shapes((8, 128, 64)))
    assert len(found) == told
    for c in found:
        assert c.indices == list(range(0, 2 * trips, 2))
        assert f"{trips} instructions have addresses" in c.message
        assert f"hardware loop of {trips} iterations" in c.message
        assert c.bound == pytest.approx(trips * P.dma_run_time + base.t.stall[c.indices].sum())
        again = base._again(c.change)
        assert {again.costs[k].transfer.trigger_time for k in c.indices} == {P.dma_trigger}


def test_addresses_that_do_not_follow_an_index_are_no_subject():
    def still(a):
        index = sbuf((1, 1), nl.int32)
        nisa.memset(index, 0)
        register = nisa.register_alloc(index)
        nl.fori_loop(
            0, 4,
            lambda i: nisa.dma_copy(
                sbuf((128, 64)), a.select(0, register), dge_mode=HARDWARE
            ) and None,
        )  # fmt: skip

    a = shapes((8, 128, 64))
    assert ask(rules_repeat.run_time_operands, still, *a)[0] == []
    cut = ask(rules_repeat.run_time_operands, followed(64), *shapes((64, 128, 64)), iterations=8)
    assert cut[0] == []


@pytest.mark.parametrize(
    ("places", "linear"),
    [
        ([(0,), (64,), (128,)], True), ([(128,), (64,), (0,)], True), ([(0,), (0,), (0,)], False),
        ([(0,), (64,), (127,)], False), ([(0, 5), (64, 5), (128, 5)], False),
        ([(0, 5), (64, 6), (128, 7)], True), ([(), (), ()], False), ([(0,), (64, 1)], False),
    ],
)  # fmt: skip
def test_places_that_move_on_evenly(places, linear):
    assert rules_repeat._linear(places) is linear


def test_a_loop_of_one_core_is_unrolled_on_that_core():
    """Loop 0 of core 1 only: what core 0 pays for its iterations, it pays all the same."""
    (found,), base = ask(rules_repeat.run_time_operands, followed(6), *shapes((8, 128, 64)), lnc=2)
    assert [core for core, _ in sorted(found.change.unrolled)] == [0, 1]
    (_, loop) = next(iter(found.change.unrolled))
    cores = base.t.run.cores
    unrolled = what_if._unrolled(base.t.run, {(1, loop)})
    assert len(unrolled.cores[0].loops) == len(cores[0].loops) == 6
    assert unrolled.cores[1].loops == []


def test_what_the_kept_half_needs_is_kept():
    """One scale for all rows: each core goes on to load it."""

    def body(a):
        out, scale = hbm((4 * 128, 64)), sbuf((128, 1))
        nisa.dma_copy(scale, a[:, 0:1])
        for k in range(4):
            tile = sbuf((128, 64))
            nisa.dma_copy(tile, a)
            nisa.tensor_scalar(tile, tile, nl.multiply, scale)
            nisa.dma_copy(out[k * 128 : (k + 1) * 128], tile)

    (c,), base = ask(rules_repeat.same_work, body, *shapes((128, 64)), lnc=2)
    again = base._again(c.change)
    half = len(again.costs) // 2
    assert again.costs[0].transfer.duration > 0 and again.costs[half].transfer.duration > 0
    stores = [k for k, i in enumerate(base.t.instructions) if not i.writes[0].allocation.on_chip]
    assert sum(again.costs[k].transfer.duration > 0 for k in stores) == 4
