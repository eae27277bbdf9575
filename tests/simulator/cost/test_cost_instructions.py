"""Cost of single instructions, against times worked out by hand from docs/trainium2.md."""

from __future__ import annotations

import pytest
from cost_helpers import P, hbm, nisa, nl, psum, sbuf, timeline

from nsa_neuron.simulator.cost import load, tables

PE, VECTOR, SCALAR, GPSIMD = 2.4, 0.96, 1.2, 1.2
UNITS = {"GHz", "bytes", "cycles", "factor", "multiplies", "ns", "share"}


def matmul(n, m=128, dtype=None, **options):
    def body():
        st, mv = sbuf((128, m), dtype), sbuf((128, n), dtype)
        nisa.nc_matmul(psum((m, n)), st, mv, **options)

    return body


@pytest.mark.parametrize(
    ("body", "cycles"),
    [
        (matmul(512, dtype=nl.bfloat16), 512 + 6),
        (matmul(444, dtype=nl.float16), 444 + 6),
        (matmul(512), 4 * 512 + 12),
        (matmul(420), 4 * 420 + 12),
        (matmul(16, dtype=nl.bfloat16), 64 + 6),  # at least 64, or loading 128 columns
        (matmul(80, dtype=nl.bfloat16), 80 + 6),
        (matmul(16), 2 * 128 + 12),  # loading 128 columns: half a cycle each per row and pass
        (matmul(16, m=96), 2 * 96 + 12),
        (matmul(16, m=32), 2 * 64 + 12),  # loading 32 is over before the least of a multiply
        (matmul(64), 4 * 64 + 12),  # as long as loading 128 columns
        (matmul(65), 4 * 65 + 12),
    ],
)
def test_matmul_interval(body, cycles):
    t = timeline(body)
    assert t.free[0] - t.issue[0] == pytest.approx(cycles / PE)
    assert t.end[0] - t.free[0] == pytest.approx(P.pe_latency / PE)


@pytest.mark.parametrize(
    ("size", "n", "cycles"),
    [
        ((128, 128), 512, 512 + 6),
        ((64, 128), 512, 512 / 2 + 6),
        ((64, 64), 512, 512 / 4 + 6),
        ((32, 64), 512, 512 / 8 + 6),
        ((32, 32), 512, 512 / 16 + 6),
        ((32, 32), 16, 64 / 16 + 6),
    ],
)
def test_a_tile_of_the_array_takes_its_share_of_it(size, n, cycles):
    """Tiles multiply side by side, so that in the time of one, all of the array could be used."""

    def body():
        rows, columns = size
        st, mv = sbuf((rows, columns), nl.bfloat16), sbuf((rows, n), nl.bfloat16)
        nisa.nc_matmul(psum((columns, n)), st, mv, tile_position=(0, 0), tile_size=size)

    assert timeline(body).free[0] == pytest.approx(cycles / PE)


def test_matmul_flops():
    t = timeline(matmul(512, m=64, dtype=nl.bfloat16))
    assert t.costs[0].flops == 2 * 128 * 64 * 512


def test_double_row_takes_the_time_of_half_the_contraction():
    def body():
        st, mv = sbuf((128, 2, 128), nl.float8_e4m3), sbuf((128, 2, 512), nl.float8_e4m3)
        nisa.nc_matmul(psum((128, 512)), st, mv, perf_mode=nisa.matmul_perf_mode.double_row)

    t = timeline(body)
    assert t.free[0] == pytest.approx((512 + 6) / PE)
    assert t.costs[0].flops == 2 * 256 * 128 * 512


def test_fp32_transpose_streams_two_cycles_per_row():
    t = timeline(lambda: nisa.nc_transpose(psum((128, 128)), sbuf((128, 128))))
    assert t.free[0] == pytest.approx((2 * 128 + 6) / PE)
    assert t.costs[0].flops == 0


def vector(make, dtype=None, where=sbuf, n=512):
    """A body with tiles a, b (where) and c, all [128, n]."""

    def body():
        make(sbuf((128, n), dtype), where((128, n), dtype), sbuf((128, n), dtype))

    return body


def copy(a, b, c):
    nisa.tensor_copy(a, b)


def add(a, b, c):
    nisa.tensor_tensor(a, b, c, nl.add)


@pytest.mark.parametrize(
    ("body", "work"),
    [
        (vector(copy), 512),
        (vector(copy, nl.bfloat16), 512 / 4),
        (vector(copy, nl.bfloat16, psum), 512 / 2),
        (vector(copy, where=psum), 512),
        (vector(add), 512),
        (vector(add, nl.bfloat16), 512 / 2),
        (vector(add, nl.bfloat16, psum), 512),
        (vector(lambda a, b, c: nisa.tensor_scalar(a, b, nl.multiply, 2.0), nl.bfloat16), 512 / 4),
        (vector(lambda a, b, c: nisa.tensor_reduce(a[:, 0:1], nl.maximum, b, axis=1)), 512),
        (vector(lambda a, b, c: nisa.memset(a, 0.0)), 512),
    ],
)
def test_vector_interval_and_latency(body, work):
    t = timeline(body)
    assert t.free[0] == pytest.approx((work + 60) / VECTOR)
    assert t.end[0] == pytest.approx((work + 152) / VECTOR)


def test_short_vector_instructions_take_the_minimum_interval():
    t = timeline(vector(copy, n=8))
    assert t.free[0] == pytest.approx((64 + 60) / VECTOR)
    assert t.end[0] == pytest.approx((8 + 152) / VECTOR)


def test_wide_steps_are_penalised():
    def body():
        nisa.tensor_copy(sbuf((128, 64)), sbuf((128, 64, 8))[:, :, 0])

    assert timeline(body).free[0] == pytest.approx((2 * 64 + 60) / VECTOR)


@pytest.mark.parametrize(
    ("dtype", "step", "n", "work"),
    [
        (None, 4, 64, 64),  # 16 bytes apart
        (None, 5, 64, 2 * 64),
        (nl.bfloat16, 8, 128, 64),
        (nl.bfloat16, 9, 128, 2 * 64),
    ],
)
def test_steps_of_sixteen_bytes_are_the_widest_at_full_rate(dtype, step, n, work):
    def body():
        nisa.tensor_copy(sbuf((128, n), dtype), sbuf((128, n, step), dtype)[:, :, 0])

    assert timeline(body).free[0] == pytest.approx((work + 60) / VECTOR)


BF = nl.bfloat16


@pytest.mark.parametrize(
    ("view", "work"),
    [
        (lambda: sbuf((128, 512, 8))[:, :, 0:1], 2 * 512),  # 32 bytes apart, as with index 0
        (lambda: sbuf((128, 8, 512))[:, 0:1, :], 512),
        (lambda: sbuf((128, 512, 2)).permute((0, 2, 1))[:, 1:2, :], 512),  # 8 bytes apart
        (lambda: sbuf((128, 512), BF), 128),
        (lambda: sbuf((128, 512), BF).expand_dim(2), 128),
        (lambda: sbuf((128, 512), BF).reshape((128, 8, 64)), 128),
        (lambda: sbuf((128, 128, 4), BF).permute((0, 2, 1)), 256),  # all there, out of order
        (lambda: sbuf((128, 128, 4), BF).permute((0, 2, 1)).expand_dim(3), 256),
        (lambda: sbuf((128, 256, 4), BF)[:, :, 0:2], 256),  # in order, with gaps
        (lambda: psum((128, 512), BF), 256),
    ],
)
def test_what_a_copy_reads_decides_its_mode(view, work):
    def body():
        read = view()
        nisa.tensor_copy(sbuf(read.shape, read.dtype), read, engine=nisa.engine.vector)

    assert timeline(body).free[0] == pytest.approx((work + 60) / VECTOR)


def test_one_element_is_no_step_however_far_the_next_would_be():
    def body():
        nisa.activation(sbuf((128, 1)), nl.copy, sbuf((128, 512))[:, 0:512:512])
        nisa.activation(sbuf((128, 1)), nl.copy, sbuf((128, 1)))

    first, second = timeline(body).costs
    assert (first.interval, first.latency) == (second.interval, second.latency)


def test_a_broadcast_operand_gets_no_fast_mode():
    def body():
        column = sbuf((128, 1), nl.bfloat16).broadcast(1, 512)
        nisa.tensor_tensor(sbuf((128, 512), nl.bfloat16), sbuf((128, 512), nl.bfloat16), column,
                           nl.add)  # fmt: skip

    assert timeline(body).free[0] == pytest.approx((512 + 60) / VECTOR)


def test_scalar_interval_and_latency():
    t = timeline(vector(lambda a, b, c: nisa.activation(a, nl.copy, b)))
    assert t.free[0] == pytest.approx((512 + 60) / SCALAR)
    assert t.end[0] == pytest.approx((512 + 190) / SCALAR)


def test_reading_the_accumulator_costs_64_cycles():
    def body():
        nisa.activation_reduce(sbuf((128, 512)), nl.copy, sbuf((128, 512)), nl.add, sbuf((128, 1)))

    assert timeline(body).free[0] == pytest.approx((512 + 64 + 60) / SCALAR)


def test_table_loads_only_when_the_set_changes():
    def body():
        x = sbuf((128, 64))
        for op in (nl.exp, nl.tanh, nl.copy, nl.exp, nl.sqrt, nl.exp):
            nisa.activation(sbuf((128, 64)), op, x)

    t = timeline(body)
    loads = sorted(i for i, note in t.notes.items() if "activation-table-load" in note)
    assert loads == [0, 4, 5]  # tanh is in the set of exp, copy in every set
    assert t.start[0] == pytest.approx(1540 / SCALAR)
    assert t.start[4] - t.free[3] == pytest.approx(1540 / SCALAR)
    assert t.start[1] == t.free[0]


def test_every_activation_function_has_a_table():
    from nsa_neuron.simulator.semantics.activation import FUNCTIONS

    for name in FUNCTIONS:
        tables.holding(name)
    with pytest.raises(KeyError, match="no activation table"):
        tables.holding("zeta")


def test_iota():
    t = timeline(lambda: nisa.iota(sbuf((128, 256), nl.int32), [[1, 256]]))
    assert t.end[0] == pytest.approx((150 + 256) / GPSIMD)


def test_unpublished_costs_say_so():
    t = timeline(vector(lambda a, b, c: nisa.tensor_copy(a, b, engine=nisa.engine.gpsimd)))
    assert t.costs[0].guesses == ("gpsimd_other",)
    assert t.end[0] == pytest.approx((150 + 2 * 512) / GPSIMD)


def test_documented_set_differs_where_measurements_do():
    assert load("documented").vector_two_tensors == 2
    assert load("measured-3p").vector_two_tensors == 1
    with pytest.raises(ValueError, match="no parameter set"):
        load("guessed")
    with pytest.raises(ValueError, match="no level"):
        load(level="middle")


def test_every_constant_has_a_source_a_unit_and_an_ordered_band():
    for name, constant in load().describe().items():
        low, central, high = constant["low, central, high"]
        assert min(low, high) <= central <= max(low, high), name
        assert constant["unit"] and constant["source"], name
        assert constant["unit"].split()[0] in UNITS, name


def test_dma_never_reaches_a_compute_lane():
    t = timeline(lambda: nisa.dma_copy(sbuf((128, 512)), hbm((128, 512))))
    assert t.lanes[t.lane[0]] == "dma-load"
