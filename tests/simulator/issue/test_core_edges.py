"""New tensors at the edges of their memories, messages of unwritten elements, reduce registers."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from core_helpers import make_core, numbered

from nsa_neuron import simulator
from nsa_neuron.simulator import SimulationError
from nsa_neuron.simulator.issue.accumulators import Accumulators
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

T = np.arange(32, dtype=np.float32).reshape(4, 8)
SBUF, PSUM = 212_984, 16 * 1024  # bytes of a partition


def rule_of(function, *args, **options):
    with pytest.raises(SimulationError) as caught:
        function(*args, **options)
    return caught.value.rule


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((4, 0), "shape"), ((-1, 4), "shape"), ((4, True), "shape"), ((4, 2.0), "shape"),
        ((4, "8"), "shape"), ((4,), "on-chip-rank"), (4, "on-chip-rank"), ((), "on-chip-rank"),
        ((129, 1), "partition-limit"),
    ],
)  # fmt: skip
def test_shapes_of_tensors_on_chip(shape, rule):
    for buffer in ("sbuf", "psum"):
        assert rule_of(make_core().allocate, shape, "float32", buffer) == rule
        assert make_core().allocate((128, 1), "float32", buffer).shape == (128, 1)


def test_shapes_are_tuples_of_ints():
    core = make_core()
    for shape, want in (
        (4, (4,)), ([4, 8], (4, 8)), ((np.int64(4), 8), (4, 8)), ((129, 1), (129, 1))
    ):  # fmt: skip
        made = core.allocate(shape, "float32", "shared_hbm")
        assert made.shape == want and all(type(n) is int for n in made.shape)


@pytest.mark.parametrize(("buffer", "limit"), [("sbuf", SBUF), ("psum", PSUM)])
def test_addresses_from_the_first_byte_to_the_last(buffer, limit):
    core = make_core()
    last = (124, limit - 32)
    for address in ((0, 0), last):
        made = core.allocate((4, 8), "float32", buffer, address=address)
        assert made.memory.allocation.address == address
    for address in ((-1, 0), (125, 0), (0, -4), (0, limit - 28), (128, 0)):
        assert rule_of(core.allocate, (4, 8), "float32", buffer, address=address) == "address"
    assert rule_of(core.allocate, (4, 8), "float32", "shared_hbm", address=(0, 0)) == "address"


@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_addressed_tensors_hold_their_own_elements(precise, dtype):
    core = make_core(precise=precise)
    tensors = [
        core.allocate((4, 8), dtype, "sbuf", address=(partition, byte))
        for partition in (0, 4, 124) for byte in (0, 32, SBUF - 32)
    ]  # fmt: skip
    for number, tensor in enumerate(tensors):
        tensor.array()[...] = number
    for number, tensor in enumerate(tensors):
        assert (tensor.array().astype(np.float32) == number).all()


def test_dtypes_of_another_generation_or_version_are_refused():
    for dtype in ("float4_e2m1fn_x4", "float8_e4m3fn_x4"):
        assert rule_of(make_core().allocate, (4, 8), dtype, "sbuf") == "generation"
    relaxed = make_core(relax=frozenset({"generation"}))
    with relaxed:
        for _ in range(2):  # noted each time, not only the first
            relaxed.allocate((4, 8), "float4_e2m1fn_x4", "sbuf")
    assert [e.rule for e in relaxed.trace.relaxed] == ["generation"] * 2
    assert rule_of(make_core(nki="0.6").allocate, (4, 8), "int64", "sbuf") == "dtype"
    assert make_core(nki="0.7").allocate((4, 8), "int64", "sbuf").dtype == "int64"


def test_a_tensor_larger_than_a_stack_is_refused_before_memory_is_asked_for():
    stack = 24 * 2**30
    core = make_core(data=False)
    assert core.allocate((stack,), "uint8", "private_hbm").size == stack
    for buffer in ("private_hbm", "shared_hbm"):
        assert rule_of(core.allocate, (stack + 1,), "uint8", buffer) == "hbm-capacity"


def test_names_of_instructions_are_strings():
    def kernel(x, name):
        nisa.dma_copy(nl.ndarray((4, 8), x.dtype), x, name=name)
        return x

    run = simulator.simulate(kernel)
    for name in ("load", "", None):
        run(T, name)
        assert run.run.cores[0].instructions[0].name == name
    for name in (1, ("a",), nl.add):
        assert rule_of(run, T, name) == "usage"


def test_an_unwritten_operand_is_named_by_its_role_and_its_first_element():
    def kernel(x):
        a, b = nl.load(x), nl.ndarray((4, 8), nl.float32, name="half")
        nisa.tensor_copy(b[:, 0:5], a[:, 0:5])
        nisa.tensor_tensor(a, a, b, nl.add)

    with pytest.raises(simulator.UninitializedReadError) as caught:
        simulator.simulate(kernel)(T)
    error = caught.value
    assert (error.value, error.instruction, error.operand) == ((0, 5), "tensor_tensor", "data2")
    assert "12 of 32 elements were never written, first (0, 5)" in str(error)
    assert "'half'" in error.table[0] and "test_core_edges.py" in error.table[0]


def test_what_an_instruction_overwrites_may_be_unwritten():
    def kernel(x):
        tile = nl.ndarray((4, 8), nl.float32)
        nisa.tensor_copy(tile, nl.load(x))
        out = nl.ndarray((4, 8), nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(out, tile)
        return out

    np.testing.assert_array_equal(simulator.simulate(kernel)(T), T)


def test_a_bit_set_in_half_of_psum_ends_the_accumulation_there_only():
    """The right half is the second product alone, the left half what was set plus it."""

    def kernel(x):
        t = nl.load(x)
        acc = nl.ndarray((8, 8), nl.float32, buffer=nl.psum)
        nisa.nc_matmul(acc, t, t)
        nisa.nc_matmul(acc[:, 0:4], t, t[:, 0:4])
        copy = nl.ndarray((8, 8), nl.float32)
        nisa.tensor_copy(copy, acc)
        out = nl.ndarray((8, 8), nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(out, copy)
        return out

    want = T.T @ T
    want[:, 0:4] *= 2
    np.testing.assert_allclose(simulator.simulate(kernel)(T), want, rtol=1e-6)


def test_without_data_an_index_is_the_first_and_is_still_noted():
    def kernel(x, index):
        at = nl.ndarray((1, 1), nl.int32)
        nisa.dma_copy(at, index)
        out = nl.ndarray((1, 8), x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(out, x.select(0, at).expand_dim(0))
        return out

    index = np.array([[3]], np.int32)
    full, shapes = simulator.simulate(kernel), simulator.simulate(kernel, data=False)
    np.testing.assert_array_equal(full(T, index)[0], T[3])
    shapes(T, index)
    for run, start in ((full, 24), (shapes, 0)):
        record = run.run.cores[0]
        last = record.instructions[-1]
        assert [a.allocation.name for a in last.reads] == ["x", record.allocations[-2].name]
        assert last.reads[0].start == start and last.reads[0].dynamic
        assert {a.id for a in record.indexed} == {last.reads[1].allocation.id}


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_doubtful_is_written_down_once_per_line(strict):
    def kernel(x):
        tile = nl.load(x)
        for _ in range(3):
            bool(tile)
        return x if tile else None

    run = simulator.simulate(kernel, strict=strict)
    if strict:
        assert rule_of(run, T) == "doubtful"
        return
    with warnings.catch_warnings(record=True):
        run(T.copy())
    assert len(run.run.cores[0].warnings) == 2
    assert all("always true in NKI" in line for line in run.run.cores[0].warnings)


def test_a_warning_without_a_kernel_line_is_pythons():
    core = make_core()
    with pytest.warns(simulator.SimulationWarning, match="doubtful thing"):
        core.warn("doubtful thing")
    assert len(core.trace.warnings) == 1


def test_reduce_registers_are_defined_lane_by_lane():
    registers = Accumulators(8)
    with pytest.raises(SimulationError, match="register of lane 2 is undefined") as caught:
        registers.read("x", 2, 3)
    assert (caught.value.rule, caught.value.value) == ("undefined-accumulator", 2)
    registers.set(2, np.array([[5.0], [6.0]], np.float32))
    assert registers.read("x", 2, 2).tolist() == [[5.0], [6.0]]
    for first, count, lane in ((1, 2, 1), (2, 3, 4), (3, 2, 4)):
        with pytest.raises(SimulationError) as caught:
            registers.read("x", first, count)
        assert caught.value.value == lane
    rows = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    registers.update("x", 2, "add", rows, "reduce")
    assert registers.read("x", 2, 2).tolist() == [[8.0], [13.0]]
    registers.update("x", 3, "add", rows, "reset_reduce")
    assert registers.read("x", 2, 3).tolist() == [[8.0], [3.0], [7.0]]
    assert rule_of(registers.update, "x", 4, "add", rows, "reduce") == "undefined-accumulator"
    registers.undefine(3, 1)
    assert registers.defined.tolist() == [n in (2, 4) for n in range(8)]


def test_accesses_of_numbered_tensors_are_readable():
    core = make_core()
    tensor = numbered(core, (4, 8), "sbuf")
    assert tensor.memory.readable(tensor.access())
    other = core.allocate((4, 8), "float32", "sbuf")
    assert not other.memory.readable(other.access())
    core.mark_written(other[:, 0:4])
    assert other.memory.readable(other[:, 0:4].access())
    assert not other.memory.readable(other.access())
    chosen = np.zeros((4, 4), bool)
    chosen[1, 2] = True
    core.mark_masked(other[:, 4:8], chosen)
    assert other.memory.written.mask(other.access())[:, 4:].tolist() == chosen.tolist()
