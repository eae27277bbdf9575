"""Who reads whose results, which work is the same, which pairs of passes one instruction does."""

from __future__ import annotations

from itertools import pairwise

import pytest
from profile_helpers import hbm, nisa, nl, profile_of, psum, sbuf, shapes

from nsa_neuron.simulator.profiler.flow import MIXED, Flow, first_of_each
from nsa_neuron.simulator.profiler.fusions import fusions


def flow_of(body, *args, lnc=1):
    return Flow(profile_of(body, *args, lnc=lnc).run)


def test_a_read_of_exactly_what_was_written_has_one_source():
    def body():
        a, b, c, d, e = (sbuf((128, 512)) for _ in range(5))
        nisa.memset(a, 0.0)
        nisa.tensor_copy(b, a)
        nisa.tensor_copy(c[:, :256], a[:, :256])
        nisa.memset(a[:, 256:], 1.0)
        nisa.tensor_copy(d, a)
        nisa.memset(a, 2.0)
        nisa.tensor_copy(e, a)

    flow = flow_of(body)
    assert flow.sources == [(), (0,), (MIXED,), (), (MIXED,), (), (5,)]
    assert flow.origins == [[], [0], [0], [], [0, 3], [], [5]]
    assert flow.readers == [[1], [], [], [], [], [6], []]
    assert flow.shared == {0, 3}


@pytest.mark.parametrize("part", [(slice(0, 64), slice(0, 512)), (slice(0, 128), slice(0, 256))])
def test_a_write_of_a_part_leaves_the_rest_to_who_wrote_it(part):
    def body():
        a, b = sbuf((128, 512)), sbuf((128, 512))
        nisa.memset(a, 0.0)
        nisa.memset(a[part], 1.0)
        nisa.tensor_copy(b, a)

    flow = flow_of(body)
    assert (flow.origins[2], flow.sources[2]) == ([0, 1], (MIXED,))
    assert flow.shared == {0, 1}


def test_what_a_later_write_cuts_is_shared_though_nobody_read_it():
    def body():
        a = sbuf((128, 512))
        nisa.memset(a, 0.0)
        nisa.memset(a[:, :256], 1.0)

    assert flow_of(body).shared == {0}


def test_a_run_time_place_is_never_known_to_be_another_one():
    def body():
        index, table, out = sbuf((1, 1), nl.int32), sbuf((128, 512)), sbuf((128, 8))
        nisa.memset(index, 0)
        view = table.ap([[512, 128], [1, 8]], scalar_offset=index)
        nisa.tensor_copy(view, out)
        nisa.tensor_copy(out, view)

    flow = flow_of(body)
    assert MIXED in flow.sources[2] and 1 in flow.origins[2] and not flow.readers[1]


def same(flow, one, other):
    return flow.values[one] == flow.values[other]


def test_the_same_of_the_same_is_the_same_value():
    def body():
        x, y = sbuf((128, 64)), sbuf((128, 64))
        a, b, c, d, e = (sbuf((128, 64)) for _ in range(5))
        nisa.memset(x, 0.0)
        nisa.tensor_copy(y, x)
        nisa.activation(a, nl.exp, x)
        nisa.activation(b, nl.exp, x)
        nisa.activation(c, nl.tanh, x)
        nisa.activation(d, nl.exp, y)
        nisa.activation(e[:, :32], nl.exp, x[:, :32])

    flow = flow_of(body)
    assert same(flow, 2, 3)
    assert not any(same(flow, 2, k) for k in (0, 1, 4, 5, 6))
    assert first_of_each(flow.values) == {0, 1, 2, 4, 5, 6}


def test_products_add_up_so_a_second_one_is_another_value():
    def body():
        x, sums = sbuf((128, 128)), psum((128, 128))
        nisa.memset(x, 0.0)
        for _ in range(2):
            nisa.nc_matmul(sums, x, x)
            nisa.tensor_copy(sbuf((128, 128)), sums)

    flow = flow_of(body)
    assert same(flow, 1, 3) and not same(flow, 2, 4)


def test_a_tensor_is_all_that_was_written_to_it_not_the_last_part():
    def body():
        x, y = sbuf((128, 64)), sbuf((128, 64))
        nisa.memset(x, 0.0)
        nisa.activation(y, nl.exp, x)
        for left in (x, x, y):
            both = sbuf((128, 128))
            nisa.tensor_copy(both[:, :64], left)
            nisa.tensor_copy(both[:, 64:], x)
            nisa.tensor_copy(sbuf((128, 128)), both)

    flow = flow_of(body)
    assert same(flow, 4, 7) and not same(flow, 4, 10)


def test_two_results_of_one_instruction_are_two_values():
    def body():
        x, one, other = sbuf((128, 1)), sbuf((128, 1)), sbuf((128, 1))
        nisa.memset(x, 0.0)
        nisa.activation_reduce(one, nl.exp, x, nl.add, other)
        nisa.tensor_copy(sbuf((128, 1)), one)
        nisa.tensor_copy(sbuf((128, 1)), other)

    flow = flow_of(body)
    assert not same(flow, 2, 3) and flow.sources[2] == flow.sources[3] == (1,)


def test_what_one_core_stores_the_other_reads():
    """The tensor in HBM is one for both; tiles are each core's own."""

    def body(a):
        out, tile = hbm((128, 64)), sbuf((128, 64))
        nisa.dma_copy(tile, a)
        nisa.dma_copy(out, tile)
        nisa.core_barrier(out, (0, 1))
        nisa.dma_copy(sbuf((128, 64)), out)
        return out

    flow = flow_of(body, *shapes((128, 64)), lnc=2)
    assert flow.sources[1] == (0,) and flow.sources[5] == (4,)
    assert flow.values[:2] == flow.values[4:6]
    assert flow.sources[7] == (5,) and flow.origins[7] == [5]


# A pass after a memset of x and y, [128, 512]; what of it one instruction does.
def two(first, second):
    """Two passes, each given its inputs: x, y, a tile between, a result, a column."""

    def body():
        x, y, made, result = (sbuf((128, 512)) for _ in range(4))
        column = sbuf((128, 1))
        nisa.memset(x, 0.0)
        nisa.memset(y, 0.0)
        first(x, y, made)
        second(made, y, result, column)

    return body


def scaled(op=nl.multiply, **more):
    return lambda x, y, made: nisa.tensor_scalar(made, x, op, 2.0, **more)


def exponent(x, y, made):
    nisa.activation(made, nl.exp, x)


def again(**more):
    return lambda made, y, out, column: nisa.tensor_scalar(out, made, nl.add, 1.0, **more)


def activated(**more):
    return lambda made, y, out, column: nisa.activation(out, nl.exp, made, **more)


def summed(op=nl.add, **more):
    return lambda made, y, out, column: nisa.tensor_reduce(column, op, made, axis=1, **more)


def copied(made, y, out, column):
    nisa.tensor_copy(out, made, engine=nisa.engine.vector)


def summing_exponent(x, y, made):
    nisa.activation(
        made, nl.exp, x, reduce_op=nl.add, reduce_res=sbuf((128, 1)),
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )  # fmt: skip


TWICE = {"op1": nl.add, "operand1": 1.0}
ONE, NONE = True, False
PAIRS = {
    "scale, then add": (scaled(), again(), ONE),
    "two operators, then one": (scaled(**TWICE), again(), NONE),
    "one operator, then two": (scaled(), again(op1=nl.multiply, operand1=3.0), NONE),
    "on ScalarE, then on VectorE": (scaled(engine=nisa.engine.scalar), again(), ONE),
    "on VectorE, then on ScalarE": (
        scaled(),
        lambda m, y, out, c: nisa.tensor_scalar(
            out, m, nl.multiply, 1.0, engine=nisa.engine.scalar
        ),
        NONE,
    ),
    "scale, then a tile": (
        scaled(), lambda m, y, out, c: nisa.tensor_tensor(out, m, y, nl.add), ONE,
    ),
    "scale, then the tile itself": (
        scaled(), lambda m, y, out, c: nisa.tensor_tensor(out, m, m, nl.add), NONE,
    ),
    "scale, then a function": (scaled(), activated(), ONE),
    "shift, then a function": (scaled(nl.subtract), activated(), ONE),
    "bound, then a function": (scaled(nl.maximum), activated(), NONE),
    "scale, then a function of its own bias": (
        scaled(), lambda m, y, out, c: nisa.activation(out, nl.exp, m, bias=y[:, 0:1]), NONE,
    ),
    "a function, then a sum": (exponent, summed(), ONE),
    "a function, then a negated sum": (exponent, summed(negate=True), NONE),
    "a function, then a maximum": (exponent, summed(nl.maximum), NONE),
    "a function that sums, then a sum": (summing_exponent, summed(), NONE),
    "a square, then a sum": (
        lambda x, y, made: nisa.tensor_tensor(made, x, x, nl.multiply), summed(), ONE,
    ),
    "a square, then a negated sum": (
        lambda x, y, made: nisa.tensor_tensor(made, x, x, nl.multiply), summed(negate=True), NONE,
    ),
    "a product, then a sum": (
        lambda x, y, made: nisa.tensor_tensor(made, x, y, nl.multiply), summed(), NONE,
    ),
    "twice, then a sum": (
        lambda x, y, made: nisa.tensor_tensor(made, x, x, nl.add), summed(), NONE,
    ),
    "scale, then a maximum": (scaled(), summed(nl.maximum), ONE),
    "scale, then a negated maximum": (scaled(), summed(nl.maximum, negate=True), NONE),
    "two operators, then a sum": (scaled(**TWICE), summed(), NONE),
    "on ScalarE, then a sum": (scaled(engine=nisa.engine.scalar), summed(), NONE),
    "scale, then a product of all": (scaled(), summed(nl.multiply), ONE),
    "scale backwards, then a sum": (scaled(nl.subtract, reverse0=True), summed(), NONE),
    "divide, then a sum": (scaled(nl.divide), summed(), NONE),
    "divide, then add": (scaled(nl.divide), again(), NONE),
    "add, then divide": (
        scaled(), lambda m, y, out, c: nisa.tensor_scalar(out, m, nl.divide, 3.0), NONE,
    ),
    "scale, then divide by a tile": (
        scaled(), lambda m, y, out, c: nisa.tensor_tensor(out, m, y, nl.divide), NONE,
    ),
    "divide, then a copy": (scaled(nl.divide), copied, ONE),
    "scale, then sums of halves": (
        scaled(),
        lambda m, y, out, c: nisa.tensor_reduce(
            out[:, 0:2], nl.add, m.reshape((128, 2, 256)), axis=2
        ),
        NONE,
    ),
    "anything, then a copy": (exponent, copied, ONE),
    "a function that sums, then a copy": (summing_exponent, copied, NONE),
    "a copy, then anything": (
        lambda x, y, made: nisa.tensor_copy(made, x, engine=nisa.engine.vector), activated(), ONE,
    ),
    "a copy, then GpSimd": (
        lambda x, y, made: nisa.tensor_copy(made, x, engine=nisa.engine.vector),
        lambda m, y, out, c: nisa.affine_select(out, [[1, 512]], 1, m, 0.0),
        NONE,
    ),
    "a part is read": (
        scaled(), lambda m, y, out, c: nisa.tensor_scalar(out[:, 1:], m[:, 1:], nl.add, 1.0), NONE,
    ),
    "two read": (
        scaled(),
        lambda m, y, out, c: (again()(m, y, out, c), nisa.tensor_copy(sbuf((128, 512)), m)),
        NONE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_that_one_instruction_does(name):
    first, second, fits = PAIRS[name]
    run = profile_of(two(first, second)).run
    found = [(a, b) for a, b, _ in fusions(run.instructions, Flow(run))]
    assert found == ([(2, 3)] if fits else [])


def pairs(body):
    run = profile_of(body).run
    return [(a, b) for a, b, _ in fusions(run.instructions, Flow(run))]


@pytest.mark.parametrize(
    ("op", "other", "fits"),
    [
        (nl.add, nl.add, True),
        (nl.bitwise_and, nl.add, False),
        (nl.add, nl.bitwise_and, False),
        (nl.bitwise_and, nl.bitwise_and, False),
    ],
)
@pytest.mark.parametrize("tiles", [False, True])
def test_operators_on_bits_and_arithmetic_are_in_no_instruction_together(op, other, fits, tiles):
    """Two of bits could be, of a tile and two scalars; we leave them alone."""

    def body():
        x, y, made, out = (sbuf((128, 64), nl.uint32) for _ in range(4))
        nisa.tensor_scalar(made, x, op, 3, engine=nisa.engine.vector)
        if tiles:
            nisa.tensor_tensor(out, made, y, other, engine=nisa.engine.vector)
        else:
            nisa.tensor_scalar(out, made, other, 1, engine=nisa.engine.vector)

    assert bool(pairs(body)) is fits


@pytest.mark.parametrize(("width", "fits"), [(32, True), (31, False)])
def test_passes_over_less_than_32_elements_are_not_worth_it(width, fits):
    def body():
        x, made, out = (sbuf((128, width)) for _ in range(3))
        nisa.tensor_scalar(made, x, nl.multiply, 2.0)
        nisa.tensor_scalar(out, made, nl.add, 1.0)

    assert bool(pairs(body)) is fits


@pytest.mark.parametrize("first", [0, 32])
def test_a_copy_to_other_partitions_stays(first):
    def body():
        x, made, out = sbuf((32, 64)), sbuf((32, 64)), sbuf((128, 64))
        nisa.tensor_scalar(made, x, nl.multiply, 2.0)
        nisa.tensor_copy(out[first : first + 32], made)

    assert bool(pairs(body)) is (first == 0)


@pytest.mark.parametrize("other", [sbuf, psum])
def test_two_operands_in_psum_are_one_too_many(other):
    def body():
        bank, second, made, out = (
            psum((128, 64)),
            other((128, 64)),
            sbuf((128, 64)),
            sbuf((128, 64)),
        )
        nisa.memset(second, 0.0, engine=nisa.engine.vector)
        nisa.tensor_copy(made, bank, engine=nisa.engine.vector)
        nisa.tensor_tensor(out, made, second, nl.add)

    assert ((1, 2) in pairs(body)) is (other is sbuf)


def test_a_pass_takes_part_in_one_pair_a_function_in_two():
    def chain():
        tiles = [sbuf((128, 64)) for _ in range(5)]
        for one, other in pairwise(tiles):
            nisa.tensor_scalar(other, one, nl.add, 1.0)

    assert pairs(chain) == [(0, 1), (2, 3)]

    def function():
        a, b, c, d = (sbuf((128, 64)) for _ in range(4))
        nisa.tensor_scalar(b, a, nl.multiply, 2.0)
        nisa.activation(c, nl.exp, b)
        nisa.tensor_reduce(d[:, 0:1], nl.add, c, axis=1)

    assert pairs(function) == [(0, 1), (1, 2)]


def test_what_took_in_the_pass_before_it_has_no_room_for_a_sum_but_a_function_does():
    def body():
        a, b, c, d = (sbuf((128, 64)) for _ in range(4))
        nisa.tensor_scalar(b, a, nl.multiply, 2.0)
        nisa.tensor_scalar(c, b, nl.add, 1.0)
        nisa.tensor_reduce(d[:, 0:1], nl.add, c, axis=1)

    assert pairs(body) == [(0, 1)]


def test_one_of_two_sums_of_a_tile_is_taken_in():
    def body():
        a, b, c = sbuf((128, 64)), sbuf((128, 64)), sbuf((128, 2))
        nisa.activation(b, nl.exp, a)
        nisa.tensor_reduce(c[:, 0:1], nl.add, b, axis=1)
        nisa.tensor_reduce(c[:, 1:2], nl.add, b, axis=1)

    assert pairs(body) == [(0, 1)]


def test_one_of_two_passes_that_an_instruction_reads_is_taken_in():
    def body():
        a, b, c, d, e = (sbuf((128, 64)) for _ in range(5))
        nisa.tensor_scalar(c, a, nl.multiply, 2.0)
        nisa.tensor_scalar(d, b, nl.multiply, 3.0)
        nisa.tensor_tensor(e, c, d, nl.add)

    assert pairs(body) == [(0, 2)]


def test_a_copy_that_is_written_away_is_in_no_second_pair():

    def body():
        a, b, c, d = (sbuf((128, 64)) for _ in range(4))
        nisa.tensor_scalar(b, a, nl.multiply, 2.0)
        nisa.tensor_copy(c, b, engine=nisa.engine.vector)
        nisa.tensor_copy(d, c, engine=nisa.engine.vector)

    assert pairs(body) == [(0, 1)]


def test_a_tile_that_is_read_in_part_as_well_stays():
    def body():
        a, b, c, d = (sbuf((128, 64)) for _ in range(4))
        nisa.tensor_scalar(b, a, nl.multiply, 2.0)
        nisa.tensor_scalar(c, b, nl.add, 1.0)
        nisa.tensor_copy(d[:, :32], b[:, :32], engine=nisa.engine.gpsimd)

    assert pairs(body) == []
