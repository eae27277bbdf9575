"""Who waits for whom, against every pair of instructions and the bytes that each touches."""

from __future__ import annotations

import random

import numpy as np
import pytest
from cost_helpers import P, hbm, nisa, nl, of, record, sbuf, timeline

from nsa_neuron import simulator
from nsa_neuron.simulator import cost
from nsa_neuron.simulator.cost import Cause, trips
from nsa_neuron.simulator.cost.guesses import guesses
from nsa_neuron.simulator.nki import collectives as ncc

WAITS = {Cause.RAW, Cause.WAR, Cause.WAW}


def touched(access):
    """Every (memory, partition, byte) of an access, at the machine's addresses where it has one."""
    a, layout = access.allocation, access.layout
    size = layout.dtype.itemsize
    where, base, first = a.id, 0, access.p0
    if a.address is not None:
        where, base, first = a.buffer, a.address[1], access.p0 + a.address[0]
    index = np.array(access.start % layout.pitch if layout.pitch else access.start)
    for n, s in zip(layout.shape[bool(layout.pitch) :], layout.strides[bool(layout.pitch) :],
                    strict=True):  # fmt: skip
        index = index[..., None] + np.arange(n) * s
    rows = range(first, first + layout.partitions, 32) if layout.pitch else (0,)
    return {(where, p, base + int(e) * size) for p in rows for e in np.unique(index)}


def check(t):
    """No pair that touches the same bytes is out of order, and nobody waits who need not."""
    reads, writes = (
        [set().union(*(touched(a) for a in kind(i))) for i in t.instructions]
        for kind in (lambda i: i.reads, lambda i: i.writes)
    )
    dma = [t.lanes[k].startswith("dma") for k in t.lane]
    for k in range(len(reads)):
        for j in range(k):
            raw = reads[k] & writes[j]
            other = writes[k] & (writes[j] | reads[j])
            own = t.lane[j] == t.lane[k] and not dma[k]
            if raw or (other and not own):
                assert t.issue[k] >= t.end[j] - 1e-9, (j, k)
        cause, blocker = Cause(int(t.cause[k])), int(t.blocker[k])
        if cause in WAITS:
            met = {
                Cause.RAW: reads[k] & writes[blocker],
                Cause.WAR: writes[k] & reads[blocker],
                Cause.WAW: writes[k] & writes[blocker],
            }[cause]
            assert met, (k, cause, blocker)


COLUMNS = [slice(a, b) for a in range(0, 64, 8) for b in (a + 8, a + 24) if b <= 64]
ENGINES = (nisa.engine.vector, nisa.engine.scalar, nisa.engine.gpsimd)


def blocks(draw, make):
    """Copies between blocks of two tiles, of far more patterns than are looked through."""

    def body():
        one, other = make()
        for _ in range(40):
            part = draw.choice(COLUMNS)
            width = part.stop - part.start
            start = draw.choice([c.start for c in COLUMNS if c.start + width <= 64])
            to, of_ = draw.sample([one, other], 2)
            source = of_[:, start : start + width]
            nisa.tensor_copy(to[:, part], source, engine=draw.choice(ENGINES))

    return body


def placed():
    """Two tiles whose bytes overlap by half."""
    return (
        nl.ndarray((64, 64), nl.float32, address=(0, 6000)),
        nl.ndarray((64, 64), nl.float32, address=(0, 6128)),
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [lambda: (sbuf((64, 64)), sbuf((64, 64))), placed])
def test_many_patterns_of_a_tensor(make, seed):
    check(of(record(blocks(random.Random(seed), make), relax="address-overlap")))


@pytest.mark.parametrize("seed", range(4))
def test_many_blocks_of_a_matrix_in_hbm(seed):
    draw = random.Random(seed)

    def body():
        far = hbm((64, 128))
        for _ in range(30):
            columns = draw.choice(COLUMNS)
            first = draw.choice([0, 16, 32])
            part = far[first : first + 32, columns]
            tile = sbuf((32, columns.stop - columns.start))
            nisa.dma_copy(*draw.sample([part, tile], 2))

    check(timeline(body))


def test_a_write_reaches_the_tile_that_begins_where_it_lands():
    """By bytes of the machine: 1500 columns into one tile begins another; nine more lie between."""

    def body():
        wide = nl.ndarray((128, 2048), nl.float32, address=(0, 0))
        small = nl.ndarray((128, 8), nl.float32, address=(0, 6000))
        for k in range(9):
            nisa.memset(wide[:, 10 * k : 10 * k + 10], 0.0, engine=nisa.engine.vector)
        nisa.memset(wide[:, 1500:1508], 1.0, engine=nisa.engine.vector)
        nisa.activation(sbuf((128, 8)), nl.copy, small)
        count = nl.ndarray((1, 1), nl.int32, address=(0, 6016))
        register = nisa.register_alloc(count)
        table = sbuf((128, 64)).ap([[64, 128], [1, 8]], scalar_offset=register)
        nisa.tensor_copy(sbuf((128, 8)), table, engine=nisa.engine.gpsimd)

    t = timeline(body)
    assert (t.cause[10], t.blocker[10]) == (Cause.RAW, 9)
    assert (t.cause[12], t.blocker[12]) == (Cause.RAW, 9)


def test_a_whole_tile_is_found_behind_its_many_parts():
    """A row of 64 stretches and more is kept aside; a part of it is found all the same."""

    def body():
        tile = sbuf((128, 4096))
        for k in range(12):
            nisa.memset(tile[:, k : k + 1], 0.0, engine=nisa.engine.vector)
        nisa.activation(tile, nl.copy, sbuf((128, 4096)))
        nisa.tensor_copy(sbuf((128, 1)), tile[:, 4000:4001], engine=nisa.engine.vector)
        nisa.tensor_copy(sbuf((128, 2)), tile[:, 10:12], engine=nisa.engine.gpsimd)

    t = timeline(body)
    assert list(t.blocker[13:15]) == [12, 12] and set(t.cause[13:15]) == {Cause.RAW}


@pytest.mark.parametrize("slow", ["scalar", "gpsimd"])
def test_room_is_free_after_all_who_read_it(slow):
    """Two engines read a tile whose room another takes: once one is slower, once the other."""

    def body():
        for _ in range(3):
            big = sbuf((128, 25_000))  # 100,000 of 212,984 bytes
            nisa.memset(big, 0.0, engine=nisa.engine.vector)
            nisa.activation(sbuf((128, 16)), nl.copy, big[:, 0:16])
            nisa.tensor_copy(sbuf((128, 16)), big[:, 0:16], engine=nisa.engine.gpsimd)

    more = {"scalar_latency": 5e5} if slow == "scalar" else {"gpsimd_fixed": 5e5}
    t = timeline(body, **more)
    last = 1 if slow == "scalar" else 2
    assert t.issue[6] == pytest.approx(t.end[last] + P.semaphore)
    assert (t.cause[6], t.blocker[6]) == (Cause.SPACE, last)


def test_room_of_a_tile_that_nobody_read_is_free_after_its_writer():
    def body():
        for _ in range(3):
            nisa.memset(sbuf((128, 25_000)), 0.0, engine=nisa.engine.gpsimd)
        nisa.memset(sbuf((128, 25_000)), 0.0, engine=nisa.engine.vector)

    t = timeline(body)
    assert (t.cause[3], t.blocker[3]) == (Cause.SPACE, 1)


@pytest.mark.parametrize(("rows", "fits"), [(32, 8), (64, 4), (65, 2), (128, 2)])
def test_tiles_of_few_partitions_lie_beside_one_another(rows, fits):
    """100,000 bytes each: two fit on all partitions, four on halves, eight on quarters."""

    def body():
        for k in range(fits + 1):
            engine = nisa.engine.vector if k < fits else nisa.engine.gpsimd
            nisa.memset(sbuf((rows, 25_000)), 0.0, engine=engine)

    t = timeline(body)
    assert set(t.cause[:fits]) == {Cause.LANE}
    assert (t.cause[fits], t.blocker[fits]) == (Cause.SPACE, 0)


def test_beside_tensors_with_addresses_the_largest_tile_still_has_room():
    def body():
        nisa.memset(nl.ndarray((128, 50_000), nl.float32, address=(0, 0)), 0.0)
        for _ in range(2):
            nisa.memset(sbuf((128, 10_000)), 0.0)

    assert timeline(body).total > 0


def test_a_tensor_that_addresses_are_read_from_keeps_its_users():
    """Its room is given back, and whoever takes it waits for those who read the address later."""

    def body():
        index = sbuf((1, 1), nl.int32)
        nisa.memset(index, 0, engine=nisa.engine.vector)
        big = sbuf((128, 53_000))
        nisa.memset(big, 0.0, engine=nisa.engine.gpsimd)
        table = hbm((8, 128, 64))
        tile = sbuf((128, 64))
        view = table.ap([[64, 128], [1, 64]], scalar_offset=index, indirect_dim=0)
        nisa.dma_copy(tile, view, dge_mode=nisa.dge_mode.hwdge)

    t = timeline(body)
    assert t.issue[2] >= t.end[0]


def test_all_of_a_tensor_may_be_what_a_run_time_address_writes():
    def body(first):
        index, table = sbuf((1, 1), nl.int32), sbuf((128, 64))
        nisa.memset(index, 0, engine=nisa.engine.vector)
        view = table.ap([[64, 128], [1, 8]], scalar_offset=index)
        nisa.tensor_copy(view, sbuf((128, 8)), engine=nisa.engine.vector)
        nisa.activation(sbuf((128, 8)), nl.copy, table[:, first : first + 8])

    for first in (0, 8, 56):
        t = timeline(lambda first=first: body(first))
        assert (t.cause[2], t.blocker[2]) == (Cause.RAW, 1)


def test_a_register_waits_for_every_part_of_its_source():
    def body():
        held, out = sbuf((1, 2), nl.int32), sbuf((128, 64))
        nisa.memset(held[:, 0:1], 1, engine=nisa.engine.vector)
        nisa.memset(held, 1, engine=nisa.engine.gpsimd)
        nisa.memset(sbuf((128, 64)), 0.0, engine=nisa.engine.vector)
        register = nisa.register_alloc()
        nisa.register_load(register, held[:, 0:1])
        table = sbuf((128, 512))
        view = table.ap([[512, 128], [1, 64]], scalar_offset=register)
        nisa.tensor_copy(out, view, engine=nisa.engine.vector)

    t = timeline(body)
    k = next(k for k, i in enumerate(t.instructions) if i.opcode == "tensor_copy")
    assert t.issue[k] == pytest.approx(t.end[1] + P.semaphore)


def test_after_a_whole_write_a_part_s_readers_are_forgotten():
    """The second writer of the part waits for the whole write, not for who read before it."""

    def body():
        tile = sbuf((128, 512))
        nisa.activation(sbuf((128, 8)), nl.copy, tile[:, 0:8])
        nisa.memset(tile[:, 0:8], 0.0, engine=nisa.engine.vector)
        nisa.memset(tile, 0.0, engine=nisa.engine.vector)
        nisa.memset(tile[:, 0:8], 1.0, engine=nisa.engine.gpsimd)

    t = timeline(body)
    assert (t.cause[3], t.blocker[3]) == (Cause.WAW, 2)
    from nsa_neuron.simulator.cost.timeline import SHIFT

    assert {code >> SHIFT for code in cost.program_of(t.run).deps[3]} == {2}


def slow_and_quick(first, second):
    """Two copies in one queue; the first is of single elements, the second of rows."""
    nisa.dma_copy(sbuf((32, 64, 8))[:, :, 0], first)
    nisa.dma_copy(sbuf((128, 64))[64:96], second)


def test_a_write_waits_for_every_transfer_that_reads_though_one_queue_has_them():
    """Other DMA engines carry the later one, so it is over before the one in front of it."""

    def body():
        source = hbm((32, 64))
        slow_and_quick(source, source)
        nisa.dma_copy(source, sbuf((32, 64)))

    t = timeline(body)
    assert t.end[0] > t.end[1]
    assert (t.cause[2], t.blocker[2]) == (Cause.WAR, 0)
    assert t.issue[2] == pytest.approx(t.end[0] + P.dma_semaphore)


def test_who_reads_many_transfers_waits_for_the_one_that_ends_last():
    """Six loads of one tile, so many that the waits are thinned out; the first takes longest."""

    def body():
        tile = sbuf((128, 512))
        nisa.dma_copy(tile[0:32], hbm((32, 512, 4))[:, :, 0])
        for first in range(256, 512, 64):
            nisa.dma_copy(tile[32:64, first : first + 64], hbm((32, 64)))
        nisa.dma_copy(tile[64:96], hbm((32, 512)))
        nisa.activation(sbuf((128, 512)), nl.copy, tile)

    t = timeline(body)
    assert t.end[0] > t.end[1:6].max()
    assert (t.cause[6], t.blocker[6]) == (Cause.RAW, 0)


def test_a_register_s_load_may_be_the_last_use_of_a_tile_whose_room_is_then_another_s():
    def body():
        held = sbuf((128, 50_000), nl.int32)  # 200,000 of 212,984 bytes
        nisa.memset(held, 1, engine=nisa.engine.gpsimd)
        nisa.register_load(nisa.register_alloc(), held[0:1, 0:1])
        nisa.memset(sbuf((128, 50_000)), 0.0, engine=nisa.engine.vector)

    t = timeline(body)
    k = len(t.instructions) - 1
    assert (t.cause[k], t.blocker[k]) == (Cause.SPACE, 0)


# Hardware loops -----------------------------------------------------------------------------------


def test_an_iteration_is_billed_to_the_last_instruction_of_each_engine():
    def body():
        tile = sbuf((128, 64))
        nisa.memset(tile, 0.0)

        def step(i):
            nisa.tensor_copy(sbuf((128, 64)), tile, engine=nisa.engine.vector)
            nisa.activation(sbuf((128, 64)), nl.copy, tile)
            nisa.tensor_copy(sbuf((128, 32)), tile[:, :32], engine=nisa.engine.vector)

        nl.fori_loop(0, 3, step)

    t = of(record(body), loop_iteration=900.0)
    billed = [round(c.interval) > 900 for c in t.costs]
    assert billed == [False] + [False, True, True] * 3


def test_the_last_instruction_of_two_loops_is_billed_for_both():
    def body():
        tile = sbuf((128, 64))
        nisa.memset(tile, 0.0)

        def inner(j):
            nisa.activation(tile, nl.copy, tile)

        def outer(i):
            nl.fori_loop(0, 2, inner)

        nl.fori_loop(0, 3, outer)

    t = of(record(body), loop_iteration=1000.0)
    base = of(record(body), loop_iteration=0.0)
    extra = [round(a.interval - b.interval) for a, b in zip(t.costs, base.costs, strict=True)]
    assert extra == [0] + [1000, 2000] * 3


def test_iterations_that_make_other_tensors_share_none():
    """The second iteration's tile is no tensor of the first, so its writer waits for nobody."""

    def body(alike):
        turns = []

        def step(i):
            first = not turns or alike
            turns.append(i)
            shape = (128, 512) if first else (128, 256)
            tile = sbuf(shape)
            nisa.memset(tile, 0.0, engine=nisa.engine.vector)
            nisa.tensor_copy(sbuf(shape), tile, engine=nisa.engine.gpsimd)

        nl.fori_loop(0, 2, step)

    other, same = (of(record(lambda a=a: body(a)), loop_iteration=0.0) for a in (False, True))
    assert same.cause[2] == Cause.WAR and other.cause[2] == Cause.LANE


# Two cores, collectives ---------------------------------------------------------------------------


def test_after_a_barrier_shared_tensors_wait_for_it_whoever_used_them_before():
    def body():
        shared = nl.ndarray((128, 64), nl.float32, buffer=nl.shared_hbm)
        other = nl.ndarray((128, 64), nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(sbuf((128, 64)), shared)
        nisa.dma_copy(sbuf((128, 64)), other, dge_mode=nisa.dge_mode.hwdge)
        nisa.core_barrier(shared, (0, 1))
        nisa.dma_copy(other, sbuf((128, 64)), dge_mode=nisa.dge_mode.hwdge)

    t = timeline(body, lnc=2)
    for base in (0, 4):
        assert t.issue[base + 2] >= max(t.end[base], t.end[base + 1])
        assert t.issue[base + 3] >= t.end[base + 2]


def test_each_core_meets_the_other_at_the_same_message():
    """Core 0 has more instructions before; the k-th message of one is that of the other."""

    def body():
        me = nl.program_id(0)
        if me == 0:
            for _ in range(3):
                nisa.memset(sbuf((128, 4096)), 0.0, engine=nisa.engine.gpsimd)
        for _ in range(2):
            tile, got = sbuf((128, 64)), sbuf((128, 64))
            nisa.memset(tile, 0.0, engine=nisa.engine.gpsimd)
            nisa.sendrecv(tile, got, 1 - me, 1 - me, 0)

    t = timeline(body, lnc=2)
    found = [k for k, i in enumerate(t.instructions) if i.opcode == "sendrecv"]
    partner = cost.program_of(t.run).partner
    assert partner == {found[0]: found[2], found[2]: found[0], found[1]: found[3],
                       found[3]: found[1]}  # fmt: skip
    assert t.end[found[0]] == t.end[found[2]] and t.end[found[1]] == t.end[found[3]]


def test_collectives_go_at_a_share_of_the_rate():
    def kernel(x):
        src, dst = hbm(x.shape), hbm(x.shape)
        out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(src, x)
        ncc.all_reduce([src], [dst], ncc.ReplicaGroup([[0, 1]]), nl.add)
        nisa.dma_copy(out, dst)
        return out

    made = simulator.simulate(kernel, data=False, ranks=2)
    made(simulator.ShapeDtype((1024, 64), np.float32))
    full, half = (of(made.runs[0], dma_collective=x, hbm_stack=1e6) for x in (1.0, 0.5))
    moved = 1024 * 64 * 4 / 4 / P.dma_rate  # four descriptors of 64 KiB
    for k in range(3):
        slower = half.costs[k].transfer.duration - full.costs[k].transfer.duration
        assert slower == pytest.approx(moved if k == 1 else 0.0, abs=1e-6)
    assert "dma_collective" in half.costs[1].guesses
    assert "between devices as if they were one" in half.costs[1].rule
    assert "dma_collective" not in half.costs[0].guesses


# What a report says -------------------------------------------------------------------------------


def test_draws_are_repeated_with_their_seed():
    values = list(range(100))
    a, b, c = (trips.drawn(values, seed) for seed in (3, 3, 4))
    first, second, third = ([t(None) for _ in range(20)] for t in (a, b, c))
    assert first == second != third and set(first) <= set(values)
    assert a.answers == first
    with pytest.raises(ValueError, match="at least one value"):
        trips.drawn([])


def test_trip_counts_are_described_by_mean_and_range():
    counts = trips.trace([3, 9, 6, 2])
    assert [counts(None) for _ in range(4)] == [3, 9, 6, 2]
    assert counts.describe() == (
        "4 registers that data would set were taken from a trace of 4: mean 5, 2 to 9"
    )
    assert "no register depended on data" in trips.constant(4).describe()


def test_guesses_tell_the_time_of_engine_or_queue_without_the_start():
    def body():
        for _ in range(2):
            nisa.tensor_copy(sbuf((128, 8)), sbuf((128, 8)), engine=nisa.engine.gpsimd)
        nisa.memset(sbuf((128, 8)), 0.0, engine=nisa.engine.gpsimd)
        nisa.tensor_tensor(*[sbuf((128, 8), nl.int32)] * 3, nl.add, engine=nisa.engine.gpsimd)
        nisa.tensor_scalar(
            sbuf((128, 8)), sbuf((128, 8)), nl.power, 2.0, engine=nisa.engine.gpsimd
        )  # fmt: skip
        nisa.dma_copy(sbuf((128, 2048)), hbm((128, 2048)), dge_mode=nisa.dge_mode.swdge)

    found = {line.split()[1]: line for line in guesses(cost.estimate(record(body)))}
    other = found["gpsimd_other"]
    assert "in 2 tensor_copy, 1 memset, 1 tensor_tensor and 1 kinds more: " in other
    central = 5 * (150 + 2 * 8) / 1.2e3
    assert f"{central:.2f} us of their lanes" in other
    packets = (8 * 3 + 5.8 + 8 * 8192 / 24.4 + 85) / 1e3
    assert f": {packets:.2f} us of their lanes" in found["dma_trigger_swdge"]
    assert "dma_trigger_swdge = 300 (100 to 1000) ns of GpSimd" in found["dma_trigger_swdge"]


def test_guesses_of_a_meeting_tell_how_long_it_takes():
    def body():
        flag = nl.ndarray((1, 1), nl.float32, buffer=nl.shared_hbm)
        nisa.core_barrier(flag, (0, 1))

    (line,) = guesses(cost.estimate(record(body, lnc=2)))
    assert "core_meeting" in line and "4.00 us of their lanes (1.00 to 8.00)" in line


def test_what_was_cut_is_an_assumption_of_the_central_timeline():
    def kernel(x):
        tile = nl.load(x)
        out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        nl.fori_loop(0, 50, lambda i: nisa.activation(tile, nl.copy, tile) and None)
        nl.store(out, tile)
        return out

    made = simulator.simulate(kernel, data=False, iterations=8)
    made(simulator.ShapeDtype((128, 64), np.float32))
    found = cost.estimate(made.run)
    (said,) = found.central.assumptions
    assert said == found.rest[1].describe(found.central.total)
    assert said.startswith("42 iterations of hardware loops were not run")
    assert f"{found.central.total / 1e3:.2f} us were run" in said


def test_the_collector_is_left_as_it_was():
    import gc

    for on in (True, False):
        (gc.enable if on else gc.disable)()
        with cost.paused_gc():
            assert not gc.isenabled()
        assert gc.isenabled() is on
    gc.enable()


TABLES = {  # docs/trainium2.md 5.3
    "exp_and_others": "exp tanh", "natural_log": "log", "natural_log_exp_and_others": "log exp",
    "softplus_and_others": "softplus", "sigmoid_and_others": "sigmoid tanh erf arctan",
    "erf_derivative": "erf_dx", "sqrt_and_others": "sqrt", "reciprocal_sqrt_and_small": "rsqrt",
    "reciprocal_and_small": "reciprocal", "trig_and_small": "sin arctan",
    "gelu_and_others": "gelu gelu_dx tanh", "gelu_apprx_tanh_and_others": "gelu_apprx_tanh tanh",
    "gelu_apprx_sigmoid_and_others": "gelu_apprx_sigmoid gelu_apprx_sigmoid_dx tanh",
    "silu_and_others": "silu tanh sin", "derivative_silu_and_others": "silu_dx tanh sin",
    "mish_and_others": "mish",
}  # fmt: skip


def test_activation_tables_hold_what_was_read_from_the_compiler():
    from nsa_neuron.simulator.cost import tables

    assert {name: set(held.split()) for name, held in TABLES.items()} == tables.SETS
    assert list(tables.SETS) == list(TABLES)  # of several, the first
    assert {"copy", "relu", "abs", "sign", "square"} == tables.RESIDENT
    assert tables.holding("tanh") == "exp_and_others" and tables.holding("relu") == ""


def test_a_run_time_pattern_with_holes_may_lie_on_any_column():
    """Every other column from somewhere on: the odd ones are among them."""

    def body():
        index, table = sbuf((1, 1), nl.int32), sbuf((128, 64))
        nisa.memset(index, 0, engine=nisa.engine.vector)
        view = table.ap([[64, 128], [2, 8]], scalar_offset=index)
        nisa.tensor_copy(view, sbuf((128, 8)), engine=nisa.engine.vector)
        nisa.activation(sbuf((128, 8)), nl.copy, table[:, 1:17:2])

    t = timeline(body)
    assert (t.cause[2], t.blocker[2]) == (Cause.RAW, 1)
