"""Each rule of advice at its limits: what it is about, and the most that it promises, by hand."""

from __future__ import annotations

from functools import partial

import pytest
from profile_helpers import hbm, nisa, nl, profile_of, psum, sbuf, shapes

from nsa_neuron.simulator.cost import load
from nsa_neuron.simulator.issue.timing import GpSimd
from nsa_neuron.simulator.profiler import (
    rules_compute,
    rules_dma,
    rules_passes,
    rules_repeat,
    what_if,
)
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
HARDWARE = nisa.dge_mode.hwdge


def ask(rule, body, *args, lnc=1, **options):
    """The candidates of a rule, and the timeline that it looked at."""
    base = Baseline(profile_of(body, *args, lnc=lnc, **options).timeline)
    return list(rule(base)), base


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


def short(count, width, engine="vector", source=None):
    def body():
        for _ in range(count):
            made, given = sbuf((128, width)), sbuf((128, source or width))
            if engine == "scalar":
                nisa.activation(made, nl.copy, given)
            elif source:
                nisa.tensor_reduce(made, nl.add, given, axis=1)
            else:
                nisa.tensor_copy(made, given, engine=nisa.engine.vector)

    return body


@pytest.mark.parametrize(
    ("count", "width", "source", "together"),
    [
        (3, 32, None, 0), (4, 32, None, 4), (16, 32, None, 16), (40, 32, None, 16),
        (8, 128, None, 4), (8, 129, None, 0), (8, 1, 128, 8), (8, 1, 129, 0),
    ],
)  # fmt: skip
def test_four_instructions_of_up_to_128_elements_are_many_short_ones(
    count, width, source, together
):
    """What is left of an interval beyond the work is shared by those that are done in one."""
    found, base = ask(rules_compute.unbatched, short(count, width, source=source))
    assert len(found) == bool(together)
    for c in found:
        assert c.rule == "unbatched-instructions" and c.indices == list(range(count))
        work = max(width, source or 0) / 0.96
        fixed = (max(64, max(width, source or 0)) + 60) / 0.96 - work
        assert c.bound == pytest.approx(count * fixed * (1 - 1 / together))
        assert f"do {together} in one" in c.message
        assert all(new.latency == base.t.costs[k].latency for k, new in c.change.costs.items())


def test_short_activations_are_priced_by_scalar_engine():
    (c,), _ = ask(rules_compute.unbatched, short(8, 64, "scalar"))
    assert c.rule == "unbatched-activations"
    assert c.bound == pytest.approx(8 * 60 / 1.2 * (1 - 1 / 8))


@pytest.mark.parametrize(
    ("calls", "loads", "functions"),
    [((nl.exp, nl.silu), 2, 2), ((nl.exp, nl.silu, nl.exp), 3, 2), ((nl.exp, nl.exp), 1, 1)],
)
def test_a_table_is_loaded_again_once_others_were(calls, loads, functions):
    def body():
        for function in calls:
            nisa.activation(sbuf((128, 64)), function, sbuf((128, 64)))

    found, base = ask(rules_compute.table_loads, body)
    one = 1540 / 1.2
    assert sum("activation-table-load" in notes for notes in base.t.notes.values()) == loads
    assert [(c.bound, c.remains) for c in found] == (
        [(pytest.approx((loads - functions) * one), pytest.approx(functions * one))]
        if loads > functions
        else []
    )


def test_the_whole_wait_for_a_bank_is_promised():
    def body():
        bank = psum((128, 512))
        nisa.tensor_copy(sbuf((128, 512)), bank, engine=nisa.engine.vector)
        nisa.activation(sbuf((128, 512)), nl.copy, bank)

    (c,), base = ask(rules_compute.psum_banks, body)
    assert c.indices == [1] and c.bound == pytest.approx(572 / 0.96)
    assert c.change.parameters == {"psum_bank_share": 0.0}
    assert base.gain(c.change) > 0


def test_a_conflict_is_told_at_the_line_that_waits_longest():
    """ScalarE waits in two lines: for a short copy, and in the later one for a long one."""

    def body():
        small, large = psum((128, 64)), psum((128, 512))
        nisa.tensor_copy(sbuf((128, 64)), small, engine=nisa.engine.vector)
        nisa.activation(sbuf((128, 64)), nl.copy, small)
        nisa.tensor_copy(sbuf((128, 512)), large, engine=nisa.engine.vector)
        nisa.activation(sbuf((128, 512)), nl.copy, large)

    (c,), base = ask(rules_compute.psum_banks, body)
    assert c.indices == [3, 1]
    assert base.t.notes[3]["psum-bank"] > base.t.notes[1]["psum-bank"] > 0
    places = [base.lines.short(base.t.instructions[k]) for k in (0, 2)]
    assert f"here and at {', '.join(sorted(places))}; give them" in c.message


def test_a_conflict_within_one_line_says_so():
    def body():
        bank = psum((128, 512))
        for engine in (nisa.engine.vector, nisa.engine.scalar):
            nisa.tensor_copy(sbuf((128, 512)), bank, engine=engine)

    (c,), _ = ask(rules_compute.psum_banks, body)
    assert "here and at the same line; give them" in c.message


def products(count, columns, dtype=nl.bfloat16):
    def body():
        st, mv = sbuf((128, 128), dtype), sbuf((128, 512), dtype)
        for _ in range(count):
            nisa.nc_matmul(psum((128, columns)), st, mv[:, :columns])

    return body


def test_fp32_products_take_three_quarters_too_long():
    (c,), base = ask(rules_compute.fp32_matmuls, products(3, 512, nl.float32))
    assert c.indices == [0, 1, 2]
    interval = base.t.costs[0].interval
    assert c.bound == pytest.approx(3 * 0.75 * interval)
    new = c.change.costs[0]
    assert new.interval == pytest.approx(interval / 4)
    assert base.t.costs[0].latency - new.latency == pytest.approx(0.75 * interval)
    assert ask(rules_compute.fp32_matmuls, products(3, 512))[0] == []


@pytest.mark.parametrize(
    ("count", "columns", "together"),
    [(3, 128, 0), (4, 128, 4), (8, 128, 4), (8, 129, 0), (8, 64, 8), (40, 32, 16)],
)
def test_four_products_of_up_to_128_columns_are_many_short_ones(count, columns, together):
    """Of the cycles a product takes, those of its columns are work, the rest is shared."""
    found, _ = ask(rules_compute.short_matmuls, products(count, columns))
    assert len(found) == bool(together)
    for c in found:
        rest = (max(64, columns) + 6 - columns) / 2.4
        assert c.bound == pytest.approx(count * rest * (1 - 1 / together))


def strided(step, engine="vector", width=256, dtype=nl.float32):
    def body():
        source = sbuf((128, width, step), dtype)
        for _ in range(2):
            made = sbuf((128, width), dtype)
            if engine == "scalar":
                nisa.activation(made, nl.copy, source[:, :, 0])
            else:
                nisa.tensor_copy(made, source[:, :, 0], engine=nisa.engine.vector)

    return body


@pytest.mark.parametrize(("step", "dtype"), [(4, nl.float32), (8, nl.bfloat16)])
def test_sixteen_bytes_are_no_wide_stride(step, dtype):
    assert ask(rules_compute.wide_strides, strided(step, dtype=dtype))[0] == []
    assert len(ask(rules_compute.wide_strides, strided(step + 1, dtype=dtype))[0]) == 1


@pytest.mark.parametrize(
    ("view", "told"),
    [
        (lambda: sbuf((128, 256, 8))[:, :, 0:1], True),  # the last dim has no step
        (lambda: sbuf((128, 2, 64))[:, :, 0], True),
        (lambda: sbuf((128, 1, 64))[:, :, 0], False),
        (lambda: sbuf((128, 8, 64))[:, :, 0:4], False),  # pieces far apart, dense in themselves
    ],
)
def test_a_wide_stride_is_what_the_cost_model_takes_for_one(view, told):
    def body():
        source = view()
        nisa.tensor_copy(sbuf(source.shape), source, engine=nisa.engine.vector)
        nisa.tensor_copy(sbuf(source.shape), source, engine=nisa.engine.gpsimd)  # costs no more

    found, _ = ask(rules_compute.wide_strides, body)
    assert [c.indices for c in found] == ([[0]] if told else [])


@pytest.mark.parametrize(("engine", "clock"), [("vector", 0.96), ("scalar", 1.2)])
@pytest.mark.parametrize("width", [256, 40])
def test_half_of_the_work_over_a_wide_stride_is_for_nothing(engine, clock, width):
    """As the interval is 64 cycles at least, it shrinks to no less."""
    (c,), base = ask(rules_compute.wide_strides, strided(5, engine, width))
    assert c.indices == [0, 1]
    old, new = base.t.costs[0], c.change.costs[0]
    assert old.latency - new.latency == pytest.approx(width / clock)
    assert new.interval == pytest.approx(max((2 * width + 60 - width), 64) / clock) or width == 40
    assert new.interval >= 64 / clock - 1e-9
    assert c.bound == pytest.approx(2 * (old.interval - new.interval))


def test_what_vector_engine_does_faster():
    def body():
        for _ in range(3):
            nisa.tensor_copy(sbuf((128, 512)), sbuf((128, 512)), engine=nisa.engine.gpsimd)
        nisa.iota(sbuf((128, 512), nl.int32), [[1, 512]])

    (c,), base = ask(rules_compute.slow_gpsimd, body)
    assert c.indices == [0, 1, 2] and c.change.lanes == dict.fromkeys(range(3), "vector")
    assert c.bound == pytest.approx(3 * (150 + 2 * 512) / 1.2)
    assert {x.interval for x in c.change.costs.values()} == {572 / 0.96}
    gain = base.gain(c.change)
    assert gain == pytest.approx(base.t.total - ((150 + 512) / 1.2 if gain else 0), rel=0.5)
    moved = base._again(c.change)
    assert [moved.lanes[moved.lane[k]] for k in range(4)] == ["vector"] * 3 + ["gpsimd"]


def test_what_moves_on_the_second_core_stays_there():
    def body():
        nisa.tensor_copy(sbuf((128, 512)), sbuf((128, 512)), engine=nisa.engine.gpsimd)

    (c,), base = ask(rules_compute.slow_gpsimd, body, lnc=2)
    moved = base._again(c.change)
    assert [moved.lane_core[moved.lane[k]] for k in (0, 1)] == [0, 1]


def shared_out(on_vector, on_scalar, width=512, opcode="copy"):
    """So many passes on VectorE and on ScalarE, none of which waits for another."""

    def body():
        for _ in range(on_vector):
            made, given = sbuf((128, width)), sbuf((128, width))
            if opcode == "sum":
                nisa.tensor_reduce(made[:, 0:1], nl.add, given, axis=1)
            elif opcode == "maximum":
                nisa.tensor_reduce(made[:, 0:1], nl.maximum, given, axis=1)
            elif opcode == "shift":
                nisa.tensor_scalar(made, given, nl.subtract, 1.0)
            elif opcode == "bound":
                nisa.tensor_scalar(made, given, nl.maximum, 1.0)
            else:
                nisa.tensor_copy(made, given, engine=nisa.engine.vector)
        for _ in range(on_scalar):
            nisa.activation(sbuf((128, width)), nl.copy, sbuf((128, width)))

    return body


@pytest.mark.parametrize(
    ("on_scalar", "opcode", "width", "told"),
    [
        (0, "copy", 512, True), (4, "copy", 512, True), (7, "copy", 512, False),
        (0, "sum", 512, True), (0, "maximum", 512, False), (0, "shift", 512, True),
        (0, "bound", 512, False), (0, "copy", 32, True), (0, "copy", 31, False),
    ],
)  # fmt: skip
def test_an_engine_with_half_the_work_of_the_other_is_not_idle(on_scalar, opcode, width, told):
    found, _ = ask(rules_passes.idle_engine, shared_out(8, on_scalar, width, opcode))
    assert bool(found) is told


def test_an_engine_that_waits_most_of_the_time_has_no_work_to_give_away():
    def body(a):
        tile = sbuf((128, 4096))
        nisa.dma_copy(tile, a)
        nisa.tensor_copy(sbuf((128, 512)), tile[:, :512], engine=nisa.engine.vector)

    assert ask(rules_passes.idle_engine, body, *shapes((128, 4096)))[0] == []


def test_all_or_every_second_pass_is_moved_what_balances_better_first():
    found, base = ask(rules_passes.idle_engine, shared_out(8, 0))
    assert [c.indices for c in found] == [[1, 3, 5, 7], list(range(8))]
    assert "for every second one" in found[0].message and "for all of them" in found[1].message
    assert found[0].bound == pytest.approx(4 * 572 / 0.96)
    again = base._again(found[0].change)
    assert [again.lanes[again.lane[k]] for k in range(8)] == ["vector", "scalar"] * 4
    assert again.total == pytest.approx(max(3 * 572 + 664, 0) / 0.96, rel=1e-6)


def test_a_sum_that_moves_to_scalar_engine_is_read_out_of_its_accumulator():
    found, base = ask(rules_passes.idle_engine, shared_out(8, 0, opcode="sum"))
    again = base._again(found[-1].change)
    assert again.costs[0].interval == pytest.approx((512 + 64 + 60) / 1.2)


def from_scalar(function, **more):
    def body():
        for _ in range(8):
            nisa.activation(sbuf((128, 512)), function, sbuf((128, 512)), **more)

    return body


@pytest.mark.parametrize(("function", "told"), [(nl.copy, 1), (nl.square, 1), (nl.exp, 0)])
def test_functions_that_vector_engine_has(function, told):
    assert bool(ask(rules_passes.idle_engine, from_scalar(function))[0]) == told


def test_a_function_that_sums_as_well_stays():
    def body():
        for _ in range(8):
            nisa.activation(
                sbuf((128, 512)), nl.copy, sbuf((128, 512)), reduce_op=nl.add,
                reduce_res=sbuf((128, 1)), reduce_cmd=nisa.reduce_cmd.reset_reduce,
            )  # fmt: skip

    assert ask(rules_passes.idle_engine, body)[0] == []


def halves(kept, dtype=nl.bfloat16):
    """bf16 in and out; between them fp32 tiles, of which `kept` says what else they are for."""

    def body(a):
        out = hbm(a.shape, dtype)
        tile, result = sbuf(a.shape, a.dtype), sbuf(a.shape, dtype)
        one, two = sbuf(a.shape), sbuf(a.shape)
        nisa.dma_copy(tile, a)
        nisa.tensor_scalar(one, tile, nl.add, 1.0)
        if kept == "running":
            nisa.tensor_tensor(one, one, tile, nl.add)
        if kept == "gpsimd":
            nisa.affine_select(one, [[1, a.shape[1]]], 1, one, 0.0)
        if kept == "bits":
            nisa.tensor_copy(sbuf(a.shape, nl.uint32), one.view(nl.uint32))
        nisa.tensor_tensor(two, one, tile, nl.multiply)
        nisa.tensor_copy(result, two)
        nisa.dma_copy(out, result)
        return out

    return body


@pytest.mark.parametrize(("kept", "narrow"), [("", 2), ("running", 0), ("gpsimd", 0), ("bits", 0)])
def test_tiles_that_only_passes_touch_could_be_narrow(kept, narrow):
    """A tile that cannot keeps those made of it wide as well."""
    base = Baseline(profile_of(halves(kept), *shapes((128, 512), dtype="bfloat16")).timeline)
    assert len(rules_passes._could_be_narrow(base)) == narrow
    assert len(list(rules_passes.wide_tiles(base))) == bool(narrow)


def test_tiles_of_fp32_inputs_or_results_are_not_told_to_be_narrow():
    for dtype, given in ((nl.float32, "bfloat16"), (nl.bfloat16, "float32")):
        base = Baseline(profile_of(halves("", dtype), *shapes((128, 512), dtype=given)).timeline)
        assert not rules_passes._could_be_narrow(base)


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


def test_sums_in_psum_are_no_tiles_to_be_narrow():
    def body(a):
        out, tile, bank = hbm(a.shape, a.dtype), sbuf(a.shape, a.dtype), psum(a.shape)
        one, result = sbuf(a.shape), sbuf(a.shape, a.dtype)
        nisa.dma_copy(tile, a)
        nisa.tensor_copy(bank, tile, engine=nisa.engine.vector)
        nisa.tensor_scalar(one, bank, nl.add, 1.0)
        nisa.tensor_scalar(result, one, nl.multiply, 2.0)
        nisa.dma_copy(out, result)
        return out

    base = Baseline(profile_of(body, *shapes((128, 512), dtype="bfloat16")).timeline)
    assert [a.buffer for a in rules_passes._could_be_narrow(base)] == ["sbuf"]


def test_functions_whose_tables_are_loaded_are_told_by_name():
    def body():
        for function in (nl.silu, nl.sqrt, nl.exp, nl.log, nl.mish, nl.erf, nl.silu):
            nisa.activation(sbuf((128, 64)), function, sbuf((128, 64)))

    (c,), _ = ask(rules_compute.table_loads, body)
    assert "7 table loads for erf, exp, log, mish, silu, sqrt; do all of one" in c.message
