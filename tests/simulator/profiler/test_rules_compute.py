"""Each rule of advice about the compute engines: its limits, and the most that it promises."""

from __future__ import annotations

import pytest
from profile_helpers import ask, nisa, nl, psum, sbuf

from nsa_neuron.simulator.profiler import rules_compute


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
@pytest.mark.parametrize("width", [256, 64, 63, 40])
def test_half_of_the_work_over_a_wide_stride_is_for_nothing(engine, clock, width):
    """What is left is what a contiguous operand costs, 64 cycles of work at least."""
    (c,), base = ask(rules_compute.wide_strides, strided(5, engine, width))
    assert c.indices == [0, 1]
    old, new = base.t.costs[0], c.change.costs[0]
    _, dense = ask(rules_compute.wide_strides, strided(1, engine, width))
    assert new.interval == pytest.approx(dense.t.costs[0].interval)
    assert new.latency == pytest.approx(dense.t.costs[0].latency)
    assert old.latency - new.latency == pytest.approx(width / clock)
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


def test_functions_whose_tables_are_loaded_are_told_by_name():
    def body():
        for function in (nl.silu, nl.sqrt, nl.exp, nl.log, nl.mish, nl.erf, nl.silu):
            nisa.activation(sbuf((128, 64)), function, sbuf((128, 64)))

    (c,), _ = ask(rules_compute.table_loads, body)
    assert "7 table loads for erf, exp, log, mish, silu, sqrt; do all of one" in c.message
