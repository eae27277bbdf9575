"""What a kernel would take with a change made, scheduled again."""

from __future__ import annotations

import pytest
from profile_helpers import hbm, nisa, nl, profile_of, psum, sbuf, shapes

from nsa_neuron.simulator.cost import load
from nsa_neuron.simulator.issue.timing import GpSimd
from nsa_neuron.simulator.profiler.sketch import Sketch, as_static
from nsa_neuron.simulator.profiler.what_if import (
    CAUSE,
    Baseline,
    Change,
    changed,
    with_times,
    with_transfer,
)

P = load()


def copies(count=3):
    def body(a):
        for k in range(count):
            tile = sbuf((128, 64))
            nisa.dma_copy(tile, a[:, k * 64 : (k + 1) * 64])
            nisa.activation(tile, nl.exp, tile)

    return Baseline(profile_of(body, *shapes((128, 64 * count))).timeline)


def test_two_changes_at_once():
    base = copies()
    quick = changed(base.t, [1, 3], lambda c: with_times(c, 1.0, 2.0))
    slow = changed(base.t, [1, 5], lambda c: with_times(c, 9.0, 9.0))
    late = changed(base.t, [0], lambda c: with_transfer(c, start=9e5))
    early = changed(base.t, [0], lambda c: with_transfer(c, start=0.0))
    for one, other in ((quick | late, slow | early), (slow | early, quick | late)):
        both = Change(costs=one) + Change(costs=other)
        assert [both.costs[k].interval for k in (1, 3, 5)] == [1.0, 1.0, 9.0]
        assert both.costs[0].transfer.start == 0.0
    both = Change(without=([1], (2,)), unrolled=frozenset({(0, 1)}), parameters={"semaphore": 1.0})
    both += Change(without=([3], (4,)), unrolled=frozenset({(1, 2)}), lanes={1: "vector"})
    assert [set(x) for x in both.without] == [{1, 3}, {2, 4}]
    assert both.unrolled == {(0, 1), (1, 2)}
    assert (both.parameters, both.lanes) == ({"semaphore": 1.0}, {1: "vector"})


def test_nothing_changed_is_the_same_timeline():
    base = copies()
    assert base.gain(Change()) == 0
    again = base._again(Change(parameters={"semaphore": P.semaphore}))
    assert (again.end == base.t.end).all()
    slower = base._again(Change(parameters={"dma_start": P.dma_start + 1000}))
    assert slower.total == pytest.approx(base.t.total + 1000)


def test_the_dependencies_that_are_left_out_are_those_of_the_causes_named():
    base = copies(1)
    raw = base.program.deps[1]
    assert raw
    causes = {code & CAUSE for code in raw}
    kept = base._again(Change(without=([1], set(range(CAUSE + 1)) - causes)))
    assert kept.issue[1] == base.t.issue[1]
    free = base._again(Change(without=([1], causes)))
    assert free.issue[1] < base.t.issue[1]


def test_cores_that_share_a_stack_price_what_changes_by_half_of_it():
    def body(a):
        for k in range(3):
            nisa.dma_copy(sbuf((128, 64)), a[:, k * 64 : (k + 1) * 64])

    one, two = (Baseline(profile_of(body, *shapes((128, 192)), lnc=n).timeline) for n in (1, 2))
    assert one.parameters.hbm_stack == P.hbm_stack
    assert two.parameters.hbm_stack == P.hbm_stack / 2


def test_what_is_gone_stands_where_its_work_is_done_and_costs_nothing():
    """A pass on VectorE into one on ScalarE into one on GpSimdE."""

    def body():
        bank, one, two, three = psum((128, 64)), sbuf((128, 64)), sbuf((128, 64)), sbuf((128, 64))
        nisa.tensor_copy(one, bank, engine=nisa.engine.vector)
        nisa.activation(two, nl.exp, one)
        nisa.tensor_copy(three, two, engine=nisa.engine.gpsimd)
        nisa.dma_copy(hbm((128, 64)), three)

    base = Baseline(profile_of(body).timeline)
    sketch = Sketch(base.t, base.flow, P, base.program.machine)
    sketch.drop(0, 1)
    sketch.drop(1, 2)
    sketch.drop(3)
    costs = sketch.costs()
    assert sketch.lanes(costs) == {0: "gpsimd", 1: "gpsimd", 3: "dma-store"}
    for k in (0, 1):
        assert (costs[k].interval, costs[k].latency, costs[k].psum, costs[k].function) == (
            0.0, 0.0, False, "",
        )  # fmt: skip
    assert costs[3].transfer.duration == costs[3].transfer.trigger_time == 0
    assert base.t.costs[1].function == "exp" and base.t.costs[0].psum
    assert base.t.costs[3].transfer.duration > 0


def test_an_edit_changes_what_it_names_and_leaves_the_run_as_it_was():
    def body():
        index = sbuf((1, 1), nl.int32)
        nisa.memset(index, 0)
        for _ in range(2):
            table = sbuf((128, 512))
            view = table.ap([[512, 128], [1, 64]], scalar_offset=index)
            nisa.tensor_scalar(sbuf((128, 64)), view, nl.add, nisa.register_alloc(3))

    base = Baseline(profile_of(body).timeline)
    plan, before = base.t.instructions[1].plan, base.t.costs[1].interval
    sketch = Sketch(base.t, base.flow, P, base.program.machine)
    kept = [as_static(a) for a in base.t.instructions[1].reads]
    sketch.edit(1, reads=kept)
    sketch.edit(2, reads=[as_static(a) for a in base.t.instructions[2].reads], static=True)
    costs = sketch.costs()
    assert before - costs[1].interval == pytest.approx(P.run_time_operand)
    assert before - costs[2].interval == pytest.approx(2 * P.run_time_operand)
    assert plan.registers == 1 and base.t.instructions[1].plan is plan
    sketch.edit(2, engine="gpsimd", formula=GpSimd.ARITHMETIC, accumulator=True)
    assert sketch[2].engine == "gpsimd" and sketch[2].plan.accumulator
    assert not base.t.instructions[2].plan.accumulator
    assert base.t.instructions[2].engine == "vector"
