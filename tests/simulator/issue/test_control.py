"""Registers, hardware loops, run-time addresses."""

from __future__ import annotations

import numpy as np
import pytest

from nsa_neuron import simulator
from nsa_neuron.simulator import SimulationError
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

TABLE = np.arange(16 * 8, dtype=np.float32).reshape(16, 8)


def simulate(kernel, *args, **options):
    return simulator.simulate(kernel, **options)(*args)


def _bound(count):
    tile = nl.ndarray((1, 1), nl.int32)
    nisa.dma_copy(tile, count)
    register = nisa.register_alloc()
    nisa.register_load(register, tile)
    return register


def copy_with_fori(x, count):
    out = nl.zeros(x.shape, x.dtype, buffer=nl.shared_hbm)
    row = nl.ndarray((1, 8), x.dtype)

    def body(i):
        nisa.dma_copy(row, x.ap([[8, 1], [1, 8]], scalar_offset=i))
        nisa.dma_copy(out.ap([[8, 1], [1, 8]], scalar_offset=i), row)

    nl.fori_loop(0, _bound(count), body)
    return out


def copy_with_range(x, count):
    out = nl.zeros(x.shape, x.dtype, buffer=nl.shared_hbm)
    for i in nl.dynamic_range(_bound(count)):
        nisa.dma_copy(out.select(0, i), x.select(0, i))
    return out


def copy_with_while(x, count):
    out = nl.zeros(x.shape, x.dtype, buffer=nl.shared_hbm)
    left = nl.ndarray((1, 1), nl.int32)
    nisa.dma_copy(left, count)
    register = nisa.register_alloc()
    nisa.register_load(register, left)

    def body(r):
        nisa.tensor_scalar(left, left, nl.add, -1.0)
        nisa.dma_copy(out.select(0, left), x.select(0, left))
        nisa.register_load(r, left)
        return r

    nl.while_loop(register, body)
    return out


@pytest.mark.parametrize("kernel", [copy_with_fori, copy_with_range, copy_with_while])
@pytest.mark.parametrize("count", [0, 1, 5, 16])
def test_loops_take_their_trip_count_from_data(kernel, count):
    result = simulate(kernel, TABLE, np.array([[count]], np.int32), nki="0.6")
    np.testing.assert_array_equal(result[:count], TABLE[:count])
    assert (result[count:] == 0).all()


@pytest.mark.parametrize("kernel", [copy_with_fori, copy_with_range])
def test_shape_only_asks_for_unknown_trip_counts(kernel):
    count = np.array([[5]], np.int32)
    full = simulator.simulate(kernel, nki="0.6")
    full(TABLE, count)
    with pytest.raises(simulator.DataUnavailableError, match="unknown="):
        simulate(kernel, TABLE, count, data=False, nki="0.6")
    shapes = simulator.simulate(kernel, data=False, unknown=lambda register: 5, nki="0.6")
    shapes(TABLE, count)
    assert [i.opcode for i in full.run.instructions] == [i.opcode for i in shapes.run.instructions]
    assert len(shapes.run.cores[0].loops) == 5


def test_registers_move_and_store():
    def kernel(x):
        a, b = nisa.register_alloc(7), nisa.register_alloc()
        nisa.register_move(b, a)
        tile = nl.ndarray((1, 1), nl.int32)
        nisa.register_store(tile, b)
        out = nl.ndarray((1, 1), nl.int32, buffer=nl.shared_hbm)
        nl.store(out, tile)
        return out

    assert simulate(kernel, TABLE)[0, 0] == 7


def _arithmetic(r):
    return r + 1


def _index(r):
    return range(r)


def _frozen(r):
    for i in nl.dynamic_range(2):
        nisa.register_move(i, 3)


def _returning(r):
    nl.fori_loop(0, 2, lambda i: 1)


def _no_register(r):
    nl.while_loop(r, lambda i: 1)


def _step(r):
    for _ in nl.dynamic_range(0, 4, -1):
        pass


def _unloaded(r):
    for _ in nl.dynamic_range(nisa.register_alloc()):
        pass


def _in_order(r):
    with nl.no_reorder():
        for _ in nl.dynamic_range(2):
            pass


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        (_arithmetic, "register"),
        (_index, "register-value"),
        (_frozen, "register"),
        (_returning, "loop"),
        (_no_register, "loop"),
        (_step, "loop"),
        (_unloaded, "register"),
        (_in_order, "loop"),
    ],
)
def test_refused_uses_of_registers_and_loops(body, rule):
    def kernel(x):
        body(nisa.register_alloc(2))

    with pytest.raises(SimulationError) as caught:
        simulate(kernel, TABLE, nki="0.6")
    assert caught.value.rule == rule


def gather(x, index, skip=False):
    rows = nl.ndarray(index.shape, nl.int32)
    nisa.dma_copy(rows, index)
    tile = nl.full((index.shape[0], 8), -1.0, x.dtype)
    mode = nisa.oob_mode.skip if skip else nisa.oob_mode.error
    nisa.dma_copy(tile, x.ap([[8, index.shape[0]], [1, 8]], vector_offset=rows), oob_mode=mode)
    out = nl.ndarray(tile.shape, x.dtype, buffer=nl.shared_hbm)
    nl.store(out, tile)
    return out


def scatter(x, index, skip=False):
    rows = nl.ndarray(index.shape, nl.int32)
    nisa.dma_copy(rows, index)
    out = nl.zeros((16, 8), x.dtype, buffer=nl.shared_hbm)
    mode = nisa.oob_mode.skip if skip else nisa.oob_mode.error
    tile = nl.load(x[0 : index.shape[0]])
    nisa.dma_copy(out.vector_select(0, rows), tile, oob_mode=mode)
    return out


def test_gather_and_scatter_rows():
    index = np.array([[3], [0], [15], [3]], np.int32)
    np.testing.assert_array_equal(simulate(gather, TABLE, index), TABLE[index[:, 0]])
    want = np.zeros_like(TABLE)
    want[index[:, 0]] = TABLE[:4]
    np.testing.assert_array_equal(simulate(scatter, TABLE, index), want)


@pytest.mark.parametrize("kernel", [gather, scatter])
def test_out_of_bounds_rows(kernel):
    index = np.array([[3], [16], [-1]], np.int32)
    with pytest.raises(simulator.OutOfBoundsError) as caught:
        simulate(kernel, TABLE, index)
    assert caught.value.rule == "oob" and caught.value.value == 16
    result = simulate(kernel, TABLE, index, True)
    want = np.full((3, 8), -1.0) if kernel is gather else np.zeros_like(TABLE)
    want[0 if kernel is gather else 3] = TABLE[3 if kernel is gather else 0]
    np.testing.assert_array_equal(result, want)


def test_scalar_offset_in_compute_and_out_of_bounds():
    def kernel(x, column):
        tile, index = nl.load(x), nl.ndarray((1, 1), nl.int32)
        nisa.dma_copy(index, column)
        out = nl.ndarray((16, 2), x.dtype, buffer=nl.shared_hbm)
        part = nl.ndarray((16, 2), x.dtype)
        nisa.tensor_copy(part, tile.ap([[8, 16], [1, 2]], scalar_offset=index, indirect_dim=1))
        nl.store(out, part)
        return out

    column = np.array([[5]], np.int32)
    np.testing.assert_array_equal(simulate(kernel, TABLE, column), TABLE[:, 5:7])
    with pytest.raises(simulator.OutOfBoundsError):
        simulate(kernel, TABLE, np.array([[7]], np.int32))


@pytest.mark.parametrize("loop", ["fori", "range"])
def test_tensors_of_a_loop_body_are_invisible_outside(loop):
    def kernel(x):
        made = []

        def body(i):
            made.append(nl.zeros((4, 4), nl.float32))

        if loop == "fori":
            nl.fori_loop(0, 2, body)
        else:
            for i in nl.dynamic_range(2):
                body(i)
        nisa.tensor_copy(made[0], made[0])

    with pytest.raises(SimulationError, match="body of a hardware loop") as caught:
        simulate(kernel, TABLE, nki="0.6")
    assert caught.value.rule == "loop-scope"
