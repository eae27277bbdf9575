"""Rules of the simulator where they begin: what is just inside runs, what is just outside breaks.

The limits stand here as numbers, from the documents that the rule table cites, not as the
simulator's own constants.
"""

from __future__ import annotations

import numpy as np
import pytest

from nsa_neuron import simulator
from nsa_neuron.simulator import SimulationError
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

X = np.random.default_rng(1).standard_normal((128, 64)).astype(np.float32)


def broken(kernel, *args, lnc: int = 1) -> str:
    """The rule that a kernel breaks; empty: none."""

    def whole(x):
        kernel(x, *args)
        return x

    try:
        simulator.simulate(simulator.Kernel(whole, lnc))(X.copy())
    except SimulationError as error:
        return error.rule
    return ""


def sbuf(*shape, dtype=nl.float32):
    made = nl.ndarray(shape, dtype)
    nisa.memset(made, 0)
    return made


def psum(*shape, address=None):
    return nl.ndarray(shape, nl.float32, buffer=nl.psum, address=address)


def memset(x, start: int, count: int) -> None:
    nisa.memset(sbuf(128, 2)[start : start + count], 1.0)


COUNTS = (1, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128)
STARTS = (0, 1, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127)


@pytest.mark.parametrize("count", COUNTS)
def test_start_partitions(count: int) -> None:
    """<= 32 partitions start at 0, 32, 64, 96; <= 64 at 0 and 64; more at 0 (SDK, architecture)."""
    allowed = (0, 32, 64, 96) if count <= 32 else (0, 64) if count <= 64 else (0,)
    for start in STARTS:
        if start + count <= 128:
            wanted = "" if start in allowed else "start-partition"
            assert broken(memset, start, count) == wanted, (start, count)


@pytest.mark.parametrize(("second", "rule"), [(64, ""), (32, "start-partition")])
def test_start_partitions_of_tiles_alike_at_several_addresses(second: int, rule: str) -> None:
    def kernel(x):
        for start in (0, second):  # the plan of the first serves the second only if it may
            nisa.memset(nl.ndarray((64, 2), nl.float32, address=(start, 64 * start)), 1.0)

    assert broken(kernel) == rule


def copy_of(x, shape, index) -> None:
    t = sbuf(*shape)[index]
    nisa.tensor_copy(sbuf(*t.shape), t)


@pytest.mark.parametrize(
    ("index", "rule"),
    [
        ((slice(0, 64), slice(0, 3)), ""),
        ((slice(0, 64, 2), slice(0, 3)), "partition-step"),
        ((slice(0, 33, 32), slice(0, 3)), "partition-step"),  # two partitions
        ((slice(0, 1, 2), slice(0, 3)), ""),  # one partition has no step
        ((slice(0, 2, 1), slice(0, 3)), ""),
    ],
)
def test_partition_steps(index, rule: str) -> None:
    assert broken(copy_of, (128, 4), index) == rule


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((8, 4), ""),
        ((8, 3), "element-count"), ((8, 5), "element-count"),
        ((7, 4), "partition-match"), ((9, 4), "partition-match"),
    ],
)  # fmt: skip
def test_operands_are_of_one_shape_neither_smaller_nor_larger(shape, rule: str, place: int) -> None:
    def kernel(x):
        inputs = [sbuf(8, 4), sbuf(8, 4)]
        inputs[place] = sbuf(*shape)
        nisa.tensor_tensor(sbuf(8, 4), *inputs, nl.add)

    assert broken(kernel) == rule


@pytest.mark.parametrize(
    ("size", "rule"), [(65_535, ""), (65_536, "free-dim-range"), (65_537, "free-dim-range")]
)
def test_counts_of_a_free_dim_fit_16_bits(size: int, rule: str) -> None:
    def kernel(x):
        nisa.memset(nl.ndarray((1, size), nl.uint8), 1)

    assert broken(kernel) == rule


@pytest.mark.parametrize(
    ("step", "rule"), [(32_767, ""), (32_768, "free-dim-range"), (32_769, "free-dim-range")]
)
def test_steps_of_a_free_dim_fit_15_bits(step: int, rule: str) -> None:
    def kernel(x):
        t = nl.ndarray((1, 3 * 32_800), nl.uint8)
        nisa.memset(t[:, : 2 * step + 1 : step], 1)

    assert broken(kernel) == rule


@pytest.mark.parametrize(("dims", "rule"), [(4, ""), (5, "free-dims")])
def test_four_free_dims_that_do_not_merge(dims: int, rule: str) -> None:
    index = (slice(None), *[slice(0, 2)] * dims)
    assert broken(copy_of, (8, *[3] * dims), index) == rule


def test_free_dims_of_one_element_do_not_count() -> None:
    two, one = slice(0, 3, 2), slice(0, 1)
    assert broken(copy_of, (8, *[3] * 7), (slice(None), two, one, two, one, two, one, two)) == ""
    assert broken(copy_of, (8, *[3] * 5), (slice(None), *[two] * 5)) == "free-dims"


def test_free_dims_that_merge_count_once() -> None:
    assert broken(copy_of, (8, 2, 2, 2, 2, 2, 2), (slice(None),)) == ""


def product(x, columns: int, start: int, width: int, address=None) -> None:
    t = sbuf(128, 512)
    u = psum(64, columns, address=address)
    nisa.nc_matmul(u[:, start : start + width], t[:, 0:64], t[:, 0:width])


@pytest.mark.parametrize(
    ("start", "width", "rule"),
    [
        (448, 64, ""), (449, 64, "psum-bank"), (511, 1, ""), (511, 2, "psum-bank"), (512, 64, ""),
        (0, 512, ""), (1, 512, "psum-bank"),
    ],
)  # fmt: skip
def test_a_matmul_ends_one_element_before_a_bank_does(start: int, width: int, rule: str) -> None:
    """A bank holds 2 KiB per partition: 512 float32."""
    assert broken(product, 1024, start, width) == rule


@pytest.mark.parametrize(
    ("byte", "start", "rule"),
    [
        (0, 0, ""), (2048, 0, ""), (1024, 0, ""), (1024, 192, ""), (1024, 193, "psum-bank"),
        (3 * 2048 + 256, 384, ""), (3 * 2048 + 256, 385, "psum-bank"), (2048 - 4, 0, "psum-bank"),
        (2048 - 4, 1, ""),
    ],
)  # fmt: skip
def test_banks_lie_at_addresses_not_at_the_start_of_tensors(byte: int, start: int, rule) -> None:
    assert broken(product, 512, start, 64, (0, byte)) == rule


@pytest.mark.parametrize(
    ("buffer", "byte", "rule"),
    [
        (nl.sbuf, 212_984 - 8, ""), (nl.sbuf, 212_984 - 7, "address"), (nl.sbuf, -1, "address"),
        (nl.psum, 8 * 2048 - 8, ""), (nl.psum, 8 * 2048 - 4, "address"),
    ],
)  # fmt: skip
def test_addresses_end_with_their_memory(buffer, byte: int, rule: str) -> None:
    def kernel(x):
        nisa.memset(nl.ndarray((128, 2), nl.float32, buffer=buffer, address=(0, byte)), 0.0)

    assert broken(kernel) == rule


@pytest.mark.parametrize(("first", "rule"), [(64, ""), (65, "address")])
def test_addresses_end_with_the_partitions(first: int, rule: str) -> None:
    def kernel(x):
        t = nl.ndarray((64, 2), nl.float32, address=(first, 0))
        if first == 64:
            nisa.memset(t, 0.0)

    assert broken(kernel) == rule


@pytest.mark.parametrize(("bytes_", "rule"), [(212_984, ""), (212_988, "sbuf-capacity")])
def test_sbuf_holds_212984_bytes_of_a_partition(bytes_: int, rule: str) -> None:
    def kernel(x):
        tiles = [sbuf(128, n // 4) for n in (100_000, bytes_ - 100_000)]
        for t in tiles:
            nisa.tensor_copy(t[:, 0:1], t[:, 1:2])

    assert broken(kernel) == rule


@pytest.mark.parametrize(("shift", "rule"), [(256, ""), (252, "address-overlap")])
def test_two_tensors_that_meet_in_one_instruction_share_no_byte(shift: int, rule: str) -> None:
    """One is written, partly overwritten by the other, and read together with it."""

    def kernel(x):
        out = nl.ndarray((128, 64), nl.float32, address=(0, 4096))
        a = nl.ndarray((128, 64), nl.float32, address=(0, 0))
        b = nl.ndarray((128, 64), nl.float32, address=(0, shift))
        nisa.memset(a, 1.0)
        nisa.memset(b, 2.0)
        nisa.tensor_tensor(out, a, b, nl.add)

    assert broken(kernel) == rule


def test_a_write_of_some_partitions_is_a_write_of_no_others() -> None:
    """Quadrants 0 and 2 are written; 1 and 3 were never."""

    def kernel(x, start):
        t = nl.ndarray((128, 4), nl.float32)
        nisa.memset(t[0:32], 1.0)
        nisa.memset(t[64:96], 1.0)
        nisa.tensor_copy(sbuf(32, 4), t[start : start + 32])

    rules = [broken(kernel, start) for start in (0, 32, 64, 96)]
    assert rules == ["", "uninitialized-read", "", "uninitialized-read"]


def test_a_write_of_every_other_column_leaves_the_others_unwritten() -> None:
    def kernel(x, first, step):
        t = nl.ndarray((128, 8), nl.float32)
        nisa.memset(t[:, 0:8:2], 1.0)
        part = t[:, first:8:step]
        nisa.tensor_copy(sbuf(*part.shape), part)

    rules = [broken(kernel, *where) for where in ((0, 2), (1, 2), (0, 1), (6, 1), (0, 4))]
    assert rules == ["", "uninitialized-read", *["uninitialized-read"] * 2, ""]


@pytest.mark.parametrize("written", [0, 1])
def test_a_partition_strided_dma_writes_what_it_strides_over(written: int) -> None:
    """A DMA may step partitions: rows 0, 2, 4, ... are written, those between are not."""

    def kernel(x, start):
        t = nl.ndarray((128, 64), nl.float32)
        nisa.dma_copy(t[written:128:2], x[0:64])
        out = nl.ndarray((64, 64), nl.float32, buffer=nl.hbm)
        nisa.dma_copy(out, t[start:128:2])

    def one(x, row):
        t = nl.ndarray((128, 64), nl.float32)
        nisa.dma_copy(t[written:128:2], x[0:64])
        nisa.dma_copy(nl.ndarray((1, 64), nl.float32, buffer=nl.hbm), t[row : row + 1])

    assert [broken(kernel, start) for start in (written, 1 - written)] == ["", "uninitialized-read"]
    rules = [broken(one, row) for row in (written + 2, written + 3)]
    assert rules == ["", "uninitialized-read"]


def accumulated(x, zero: slice | None, second, again=None) -> None:
    """A matmul, a memset of some columns, a matmul onto it, and perhaps one more."""
    t, u = sbuf(128, 64), psum(64, 64)
    nisa.nc_matmul(u, t, t)
    if zero is not None:
        nisa.memset(u[:, zero], 0.0)
    nisa.nc_matmul(u, t, t, accumulate=second)
    if again is not None:
        nisa.nc_matmul(u, t, t, accumulate=again)


FLAGS = [
    (None, None, None, ""),
    (None, True, None, ""),
    (slice(0, 64), False, None, ""),
    (slice(0, 64), True, None, "psum-accumulate"),
    (slice(63, 64), True, None, "psum-accumulate"),
    (slice(63, 64), None, None, "psum-foreign"),
    (slice(0, 1), None, None, "psum-foreign"),
    (slice(0, 64), False, True, ""),
    (slice(0, 32), False, None, ""),
    (slice(0, 32), False, True, ""),
]


@pytest.mark.parametrize(("zero", "second", "again", "rule"), FLAGS)
def test_accumulate_flags_around_a_memset(zero, second, again, rule: str) -> None:
    assert broken(accumulated, zero, second, again) == rule


@pytest.mark.parametrize("rows", [(0, 32), (32, 64)])
def test_accumulation_needs_the_very_rows_that_were_opened(rows) -> None:
    def kernel(x):
        t, u = sbuf(128, 64), psum(64, 64)
        nisa.nc_matmul(u[0:32], t[:, 0:32], t)
        nisa.nc_matmul(u[slice(*rows)], t[:, 0:32], t, accumulate=True)

    assert broken(kernel) == ("" if rows == (0, 32) else "psum-accumulate")


@pytest.mark.parametrize(
    ("first", "second", "meet", "rule"),
    [
        ("reads", "writes", False, "lnc-race"), ("reads", "writes", True, ""),
        ("writes", "reads", False, "lnc-race"), ("writes", "reads", True, ""),
        ("writes", "writes", False, "lnc-race"), ("writes", "writes", True, ""),
        ("reads", "reads", False, ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("apart", [0, 64])
def test_two_cores_at_one_row(first: str, second: str, meet: bool, rule: str, apart: int) -> None:
    """Core 0 acts, then core 1, at the same row or one row behind its last: a read counts too."""

    def act(x, what: str, row: int, value: float) -> None:
        t = sbuf(64, 64)
        if what == "reads":
            nisa.dma_copy(t, x[row : row + 64])
        else:
            nisa.memset(t, value)
            nisa.dma_copy(x[row : row + 64], t)

    def kernel(x):
        core = nl.program_id(0)
        if core == 0:
            act(x, first, 0, 5.0)
        if meet:
            nisa.core_barrier(x, (0, 1))
        if core == 1:
            for _ in range(8):  # behind core 0, whichever turn it takes
                nisa.memset(sbuf(64, 64), 0.0)
            act(x, second, apart, 7.0)

    assert broken(kernel, lnc=2) == ("" if apart else rule)


def converted(values, dtype) -> np.ndarray:
    """float32 -> dtype by VectorE."""

    def kernel(x):
        t, u = nl.load(x), nl.ndarray(x.shape, dtype)
        nisa.tensor_copy(u, t)
        out = nl.ndarray(x.shape, dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(out, u)
        return out

    x = np.array([[values]], np.float32).reshape(1, 1)
    return int(simulator.simulate(simulator.Kernel(kernel))(x)[0, 0])


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(nl.int8, -128, 127), (nl.uint8, 0, 255), (nl.int16, -(2**15), 32767)],
)
def test_integers_saturate_at_their_limits_one_value_per_call(dtype, low: int, high: int) -> None:
    """Alone in its call, so that no other value decides how all are converted."""
    for value in (low - 1, low, low + 1, high - 1, high, high + 1, high + 1000):
        assert converted(value, dtype) == min(max(value, low), high), value
