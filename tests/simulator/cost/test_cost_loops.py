"""Hardware loops: iterations overlap as queues let them, bodies allocate once, long are cut."""

from __future__ import annotations

import numpy as np
import pytest
from cost_helpers import P, hbm, nisa, nl, of, psum, record, sbuf

from nsa_neuron import simulator
from nsa_neuron.simulator import cost
from nsa_neuron.simulator.cost.loops import Continued

HARDWARE = nisa.dge_mode.hwdge


def pipeline(count, separate_tiles=True, width=512):
    """Load, multiply, evict, store in a hardware loop; loads and stores on their own queues."""

    def body():
        weights = sbuf((128, width), nl.bfloat16)
        source, out = hbm((16, 128, 128), nl.bfloat16), hbm((16, 128, width))
        kept = sbuf((128, 128), nl.bfloat16), psum((128, width)), sbuf((128, width))

        def step(i):
            made = kept
            if separate_tiles:
                made = sbuf((128, 128), nl.bfloat16), psum((128, width)), sbuf((128, width))
            tile, sums, result = made
            nisa.dma_copy(tile, source.select(0, i), dge_mode=HARDWARE, engine=nisa.engine.sync)
            nisa.nc_matmul(sums, tile, weights, accumulate=False)
            nisa.tensor_copy(result, sums, engine=nisa.engine.vector)
            nisa.dma_copy(out.select(0, i), result, dge_mode=HARDWARE, engine=nisa.engine.scalar)

        nl.fori_loop(0, count, step)

    return body


def at(t, opcode):
    return [k for k, i in enumerate(t.instructions) if i.opcode == opcode]


def test_iterations_overlap():
    t = of(record(pipeline(8)))
    loads, multiplies, stores = at(t, "dma_copy")[::2], at(t, "nc_matmul"), at(t, "dma_copy")[1::2]
    for k in range(7):
        assert t.issue[loads[k + 1]] < t.end[stores[k]]  # the next load runs while this one stores
        assert t.issue[loads[k + 1]] >= t.end[multiplies[k]]  # but into the same tile
    alone = of(record(pipeline(1))).total
    assert t.total < 8 * alone * 0.8


def test_a_body_allocates_once():
    """What a loop makes in its body is one tensor, like one made before it."""
    inside, before = of(record(pipeline(8))), of(record(pipeline(8, separate_tiles=False)))
    assert inside.total == pytest.approx(before.total)


def test_the_inner_loop_of_a_later_iteration_uses_the_same_tensors():
    def body(nested):
        def inner(i):
            tile = sbuf((128, 4096))
            nisa.memset(tile, 0.0, engine=nisa.engine.gpsimd)
            nisa.activation(sbuf((128, 4096)), nl.exp, tile)

        if nested:
            nl.fori_loop(0, 3, lambda j: nl.fori_loop(0, 3, inner))
        else:
            nl.fori_loop(0, 9, inner)

    nested, flat = (of(record(lambda n=n: body(n)), loop_iteration=0.0) for n in (True, False))
    assert nested.total == pytest.approx(flat.total)


def test_an_inner_loop_that_goes_on_for_longer_uses_the_same_tensors():
    """Two iterations at first, then four: the last two have no counterpart in the first turn."""

    def body(nested):
        def inner(i):
            tile = sbuf((128, 4096))
            nisa.memset(tile, 0.0, engine=nisa.engine.gpsimd)
            nisa.activation(sbuf((128, 4096)), nl.exp, tile)

        turns = iter((2, 4))
        if nested:
            nl.fori_loop(0, 2, lambda j: nl.fori_loop(0, next(turns), inner))
        else:
            nl.fori_loop(0, 6, inner)

    nested, flat = (of(record(lambda n=n: body(n)), loop_iteration=0.0) for n in (True, False))
    assert nested.total == pytest.approx(flat.total)


def test_unrolled_bodies_have_tiles_of_their_own():
    def body(unrolled):
        def step(i):
            tile = sbuf((128, 8192))
            nisa.memset(tile, 0.0, engine=nisa.engine.gpsimd)
            nisa.activation(sbuf((128, 8192), nl.bfloat16), nl.exp, tile)

        if unrolled:
            for i in range(4):
                step(i)
        else:
            nl.fori_loop(0, 4, step)

    unrolled, looped = (of(record(lambda u=u: body(u)), loop_iteration=0.0) for u in (True, False))
    assert looped.total > 1.2 * unrolled.total


def test_each_engine_pays_for_each_iteration():
    free, dear = (of(record(pipeline(8)), loop_iteration=x) for x in (0.0, 300.0))
    for t, extra in ((free, 0.0), (dear, 300.0)):
        for opcode in ("nc_matmul", "tensor_copy"):
            for k in at(t, opcode):
                taken = t.free[k] - t.issue[k]
                assert taken == pytest.approx(free.costs[k].interval + extra)
        loads = at(t, "dma_copy")[::2]
        trigger = t.costs[loads[0]].transfer.trigger_time
        assert trigger == pytest.approx(P.dma_run_time + extra)
    assert dear.costs[at(dear, "nc_matmul")[0]].guesses[-1] == "loop_iteration"


def test_one_queue_runs_its_transfers_in_order():
    """Stores to run-time rows of one tensor do not wait for one another on one queue."""

    def body(engines):
        out, tile, index = hbm((16, 128, 512)), sbuf((128, 512)), sbuf((1, 1), nl.int32)
        for engine in engines:
            row = out.select(0, index)
            nisa.dma_copy(row, tile, dge_mode=HARDWARE, engine=engine)

    sync, scalar = nisa.engine.sync, nisa.engine.scalar
    same = of(record(lambda: body([sync, sync])))
    other = of(record(lambda: body([sync, scalar])))
    assert same.issue[1] == pytest.approx(same.issue[0] + P.dma_run_time)
    assert other.issue[1] == pytest.approx(other.end[0] + P.dma_semaphore)


def loop_kernel(x, trips, inner=0):
    rows = inner or trips
    rows = rows if rows <= 200 else 1
    out = nl.ndarray((rows, 128, 512), nl.float32, buffer=nl.shared_hbm)
    weights = nl.load(x)

    def step(i):
        sums = nl.ndarray((128, 512), nl.float32, buffer=nl.psum)
        nisa.nc_matmul(sums, weights[:, :128], weights, accumulate=False)
        result = nl.ndarray((128, 512), nl.float32)
        nisa.tensor_copy(result, sums, engine=nisa.engine.vector)
        where = out.select(0, i) if rows > 1 else out[0]
        nisa.dma_copy(where, result, dge_mode=HARDWARE, engine=nisa.engine.scalar)

    def several(j):
        nl.fori_loop(0, inner, step)

    nl.fori_loop(0, trips, several if inner else step)
    return out


X = simulator.ShapeDtype((128, 512), "bfloat16")


@pytest.mark.parametrize(("trips", "inner"), [(100, 0), (13, 30), (30, 13)])
def test_a_loop_that_is_cut_takes_as_long_as_the_whole(trips, inner):
    whole = simulator.profile(loop_kernel)(X, trips, inner)
    cut = simulator.profile(loop_kernel, iterations=10)(X, trips, inner)
    assert len(cut.run.instructions) < len(whole.run.instructions)
    for level in ("low", "central", "high"):
        assert getattr(cut.time, level) == pytest.approx(getattr(whole.time, level), rel=0.02)
    (sentence,) = (a for a in cut.to_dict()["assumptions"] if "continued" in a)
    ran, meant = len(cut.run.cores[0].loops), len(whole.run.cores[0].loops)
    assert sentence.startswith(f"{meant - ran:,} iterations of hardware loops were not run")
    assert not any("continued" in a for a in whole.to_dict()["assumptions"])


def test_ten_million_instructions():
    found = simulator.profile(loop_kernel, iterations=16)(X, 3_400_000)
    assert len(found.run.instructions) < 100
    first, second = (simulator.profile(loop_kernel)(X, n).time.central for n in (300, 600))
    assert found.time.central == pytest.approx((second - first) / 300 * 3_400_000, rel=0.02)


def test_the_last_iteration_is_among_those_that_are_run():
    """So that an address which leaves its tensor there is still refused."""

    def beyond(x):
        out = nl.ndarray((99, 128, 512), x.dtype, buffer=nl.shared_hbm)
        tile = nl.load(x)
        nl.fori_loop(0, 100, lambda i: nisa.dma_copy(out.select(0, i), tile) and None)
        return out

    with pytest.raises(simulator.OutOfBoundsError, match="the run-time index 99 leaves"):
        simulator.profile(beyond, iterations=10)(X)


def test_two_cores_take_as_long_as_the_slower():
    def kernel(x):
        turns = 400 if nl.program_id(0) else 300
        return loop_kernel(x, turns)

    whole = simulator.profile(simulator.Kernel(kernel, 2))(X)
    cut = simulator.profile(simulator.Kernel(kernel, 2), iterations=10)(X)
    assert cut.time.central == pytest.approx(whole.time.central, rel=0.02)


def test_loops_that_have_not_settled_are_refused():
    with pytest.raises(ValueError, match="of which 4 iterations were run: run at least 8"):
        simulator.profile(loop_kernel, iterations=4)(X, 100)

    def slower(x):
        """Every iteration waits for more."""
        tile, work = nl.load(x), []

        def step(i):
            work.append(i)
            for _ in range(len(work) ** 2):
                nisa.tensor_scalar(tile, tile, nl.add, 1.0)

        nl.fori_loop(0, 40, step)
        out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        nl.store(out, tile)
        return out

    with pytest.raises(ValueError, match="has not settled: its pace still changes by"):
        simulator.profile(slower, iterations=10)(X)


@pytest.mark.parametrize(("more", "settled"), [(103, True), (106, False)])
def test_the_pace_may_change_by_two_percent(more, settled):
    """100 instructions in each iteration of the third quarter, `more` in the last."""

    def kernel(x):
        tile, work = nl.load(x), []

        def step(i):
            work.append(i)
            for _ in range(100 if len(work) <= 12 else more):
                nisa.tensor_scalar(tile, tile, nl.add, 1.0)

        nl.fori_loop(0, 400, step)
        out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        nl.store(out, tile)
        return out

    profile = simulator.profile(kernel, iterations=16)
    if settled:
        assert profile(X) is not None
        return
    with pytest.raises(ValueError, match=r"its pace still changes by 2\.\d%, more than 2%"):
        profile(X)


@pytest.mark.parametrize("wrong", [-1, 2.5])
def test_iterations_is_a_count(wrong):
    with pytest.raises(ValueError, match="iterations is 0 or a positive integer"):
        simulator.simulate(loop_kernel, data=False, iterations=wrong)


def test_a_run_with_data_leaves_out_nothing():
    with pytest.raises(ValueError, match="needs data=False"):
        simulator.simulate(loop_kernel, iterations=8)
    assert len(simulator.simulate(loop_kernel)(np.zeros((128, 512), np.float32), 20)) == 20


def test_nothing_is_added_where_nothing_was_cut():
    run = record(pipeline(4))
    found = cost.estimate(run)
    assert found.rest == (Continued(),) * 3 and found.band.central == found.central.total


def test_a_loop_waits_for_the_register_that_bounds_it():
    def body(bound):
        count, slow = sbuf((1, 1), nl.int32), sbuf((128, 8192))
        nisa.memset(slow, 0.0, engine=nisa.engine.gpsimd)
        nisa.memset(count, 3, engine=nisa.engine.gpsimd)
        register = nisa.register_alloc(3)
        if bound:
            nisa.register_load(register, count)
        tile = sbuf((128, 64))
        nisa.memset(tile, 0.0, engine=nisa.engine.vector)
        nl.fori_loop(0, register, lambda i: nisa.activation(tile, nl.copy, tile) and None)

    free, bound = (of(record(lambda b=b: body(b), data=True)) for b in (False, True))
    source = at(bound, "memset")[1]
    assert free.issue[at(free, "activation")[0]] < bound.end[source] / 2
    assert bound.issue[at(bound, "activation")[0]] >= bound.end[source]


def test_each_iteration_of_a_while_loop_waits_for_its_condition():
    def body():
        left, tile = sbuf((1, 1), nl.int32), sbuf((128, 64))
        nisa.memset(tile, 0.0, engine=nisa.engine.vector)
        nisa.memset(left, 3, engine=nisa.engine.gpsimd)
        register = nisa.register_alloc(left)

        def step(again):
            nisa.activation(tile, nl.copy, tile)
            nisa.tensor_scalar(left, left, nl.subtract, 1, engine=nisa.engine.vector)
            nisa.register_load(again, left)
            return again

        nl.while_loop(register, step)

    t = of(record(body, data=True))
    work, conditions = at(t, "activation"), at(t, "tensor_scalar")
    assert len(work) == 3
    for after, before in zip(work[1:], conditions, strict=False):
        assert t.issue[after] >= t.end[before]


def test_a_part_of_a_run_is_not_handed_out_as_its_time():
    found = simulator.profile(loop_kernel, iterations=10)(X, 100)
    with pytest.raises(ValueError, match="use estimate"):
        cost.central(found.run)
    assert cost.estimate(found.run).band.central == found.time.central
