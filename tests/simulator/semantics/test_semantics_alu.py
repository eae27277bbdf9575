"""ALU operators and element-wise instructions against loops over single elements."""

from __future__ import annotations

import math
import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nsa_neuron.simulator.machine import dtypes
from nsa_neuron.simulator.semantics import activation, alu, elementwise

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

F = np.float32
SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.5, -3.0, math.inf, -math.inf, math.nan, 3e38, 1e-40, 16777217.0]
PAIRS = [(F(a), F(b)) for a in SPECIAL for b in SPECIAL]


def _max(a, b):
    return F(math.nan) if math.isnan(a) or math.isnan(b) else (a if a > b else b)


def _min(a, b):
    return F(math.nan) if math.isnan(a) or math.isnan(b) else (a if a < b else b)


SCALAR = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "maximum": _max,
    "minimum": _min,
    "equal": lambda a, b: F(a == b),
    "not_equal": lambda a, b: F(a != b),
    "greater": lambda a, b: F(a > b),
    "greater_equal": lambda a, b: F(a >= b),
    "less": lambda a, b: F(a < b),
    "less_equal": lambda a, b: F(a <= b),
    "logical_and": lambda a, b: F(bool(a) and bool(b)),
    "logical_or": lambda a, b: F(bool(a) or bool(b)),
    "logical_xor": lambda a, b: F(bool(a) != bool(b)),
    "abs_max": lambda a, b: a if abs(a) >= abs(b) else b,
    "abs_min": lambda a, b: a if abs(a) <= abs(b) else b,
    "divide": lambda a, b: a / b,
}
UNARY = {
    "abs": lambda a: F(abs(a)),
    "rsqrt": lambda a: F(1.0) / np.sqrt(a),
    "reciprocal": lambda a: F(1.0) / a,
    "square": lambda a: a * a,
    "relu": lambda a: F(math.nan) if math.isnan(a) else max(a, F(0.0)),
    "logical_not": lambda a: F(a == 0),
}


def tile(shape, seed, low=-4.0, high=4.0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(F)


def test_every_operator_is_covered():
    assert set(alu.BINARY) == {*SCALAR, "power", "mod", "fmod"}
    assert set(alu.UNARY) == set(UNARY)
    assert set(alu.IDENTITY) | {"bitwise_and", "bitwise_or", "bitwise_xor"} == alu.REDUCTIONS


@pytest.mark.parametrize("op", SCALAR)
def test_binary_operators_on_special_values(op):
    a, b = (np.array(side, F) for side in zip(*PAIRS, strict=True))
    want = [SCALAR[op](x, y) for x, y in PAIRS]
    got = alu.apply(op, a, b)
    assert got.dtype == F
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(alu.apply(op, b, a, reverse=True), want)


@pytest.mark.parametrize("op", UNARY)
def test_unary_operators_ignore_the_second_operand(op):
    a = np.array(SPECIAL, F)
    want = [UNARY[op](x) for x in a]
    np.testing.assert_array_equal(alu.apply(op, a, None), want)
    np.testing.assert_array_equal(alu.apply(op, a, F(7), reverse=True), want)


def test_power_mod_and_fmod():
    base, exponent = tile((4, 9), 0, 0.1, 9.0), tile((4, 9), 1)
    want = [
        [math.pow(x, y) for x, y in zip(*r, strict=True)] for r in zip(base, exponent, strict=True)
    ]
    np.testing.assert_allclose(alu.apply("power", base, exponent), want, rtol=1e-6)
    assert alu.apply("power", base, F(0.0)).tolist() == np.ones((4, 9)).tolist()
    x, y = np.array([7, -7, 7, -7], F), np.array([3, 3, -3, -3], F)
    assert alu.apply("mod", x, y).tolist() == [1, 2, -2, -1]
    assert alu.apply("fmod", x, y).tolist() == [1, -1, 1, -1]


@pytest.mark.parametrize("op", ["add", "subtract", "maximum", "less", "logical_xor"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (128, 2), (2, 3, 4), (2, 2, 2, 3)])
def test_tensor_tensor_pairs_elements_in_order(op, shape):
    a, b = tile(shape, 1), tile(shape, 2)
    got = elementwise.tensor_tensor(a, b.reshape(shape[0], -1), op)
    want = [SCALAR[op](x, y) for x, y in zip(a.ravel(), b.ravel(), strict=True)]
    assert got.shape == shape
    np.testing.assert_array_equal(got.ravel(), want)


@pytest.mark.parametrize("reverse", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("ops", [("subtract", "divide"), ("less", "subtract"), ("add", "abs")])
@pytest.mark.parametrize("vector", [False, True])
def test_tensor_scalar(ops, reverse, vector):
    data = tile((5, 2, 3), 3)
    first, second = (tile((5, 1), 4), tile((5, 1), 5)) if vector else (1.3, -0.7)
    before = data.copy()
    got = elementwise.tensor_scalar(data, ops[0], first, reverse[0], ops[1], second, reverse[1])
    for p in range(5):
        x0 = first[p, 0] if vector else F(first)
        x1 = second[p, 0] if vector else F(second)
        for i in np.ndindex(2, 3):
            value = data[(p, *i)]
            for op, x, swap in zip(ops, (x0, x1), reverse, strict=True):
                if op in UNARY:
                    value = UNARY[op](value)
                else:
                    value = SCALAR[op](x, value) if swap else SCALAR[op](value, x)
            assert got[(p, *i)] == value
    assert np.array_equal(data, before)


def test_tensor_scalar_with_one_or_unary_operator():
    data = tile((3, 4), 6, 0.5, 2.0)
    np.testing.assert_array_equal(
        elementwise.tensor_scalar(data, "rsqrt", None), F(1) / np.sqrt(data)
    )
    np.testing.assert_array_equal(elementwise.tensor_scalar(data, "multiply", 2.0), data + data)


@pytest.mark.parametrize("reverse", [(False, False), (True, True)])
def test_scalar_tensor_tensor(reverse):
    data, other, scale = tile((4, 6), 7), tile((4, 2, 3), 8), tile((4, 1), 9)
    got = elementwise.scalar_tensor_tensor(
        data, "subtract", scale, "multiply", other, reverse[0], reverse[1]
    )
    flat = other.reshape(4, 6)
    for p in range(4):
        for j in range(6):
            step = scale[p, 0] - data[p, j] if reverse[0] else data[p, j] - scale[p, 0]
            assert got[p, j] == step * flat[p, j]


def test_reciprocal():
    got = elementwise.reciprocal(np.array([[2.0, -0.0, math.inf, math.nan]], F))
    np.testing.assert_array_equal(got, [[0.5, -math.inf, 0.0, math.nan]])


INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32]
BITS = {"bitwise_and": operator.and_, "bitwise_or": operator.or_, "bitwise_xor": operator.xor}


def _bit_reference(op, a, b, width):
    mask = (1 << width) - 1
    a, b = a & mask, b & mask
    if op in BITS:
        return BITS[op](a, b)
    if b >= width:
        return 0
    return (a << b) & mask if op == "left_shift" else a >> b


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("op", [*BITS, "left_shift", "right_shift"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_bit_operators_work_on_patterns(op, dtype, data):
    info = np.iinfo(dtype)
    small = st.integers(info.min, info.max) | st.integers(0, info.bits + 2)
    a, b = (data.draw(hnp.arrays(dtype, (2, 5), elements=small)) for _ in range(2))
    constant = data.draw(st.integers(-3, info.bits + 2))
    got = alu.bitvec(op, a, b)
    swapped = alu.bitvec(op, b, a, reverse=True)
    by_constant = alu.bitvec(op, a, constant)
    for i in np.ndindex(2, 5):
        want = _bit_reference(op, int(a[i]), int(b[i]), info.bits)
        assert int(got[i]) == want == int(swapped[i])
        assert int(by_constant[i]) == _bit_reference(op, int(a[i]), constant, info.bits)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_invert(dtype):
    info = np.iinfo(dtype)
    a = np.array([0, 1, info.max, info.min], dtype)
    assert alu.bitvec("invert", a, None).tolist() == [~int(v) & (2**info.bits - 1) for v in a]


def test_bit_operators_of_two_widths_extend_with_zeros():
    got = alu.bitvec("bitwise_or", np.array([[-1]], np.int8), np.array([[0x1200]], np.uint16))
    assert got.dtype == np.uint16 and got.tolist() == [[0x12FF]]


def test_tensor_scalar_bitvec_chains_two_operators():
    data = np.array([[0x0F0F, 0x1234], [0xFFFF, 1]], np.uint16)
    shift = np.array([[4], [8]], np.int16)
    got = elementwise.tensor_scalar_bitvec(data, "bitwise_and", 0x0FF0, False, "left_shift", shift)
    assert got.tolist() == [[0xF000, 0x2300], [0xF000, 0]]
    assert elementwise.tensor_scalar_bitvec(data, "invert", None)[1].tolist() == [0, 0xFFFE]
    one = elementwise.tensor_scalar_bitvec(data, "left_shift", 1, True)  # 1 << data
    assert one.tolist() == [[0, 0], [0, 2]]


@settings(max_examples=60, deadline=None)
@given(
    a=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=8),
    b=st.integers(0, 2**32 - 1),
)
def test_pool_integers_are_exact_modulo_two_to_the_32(a, b):
    left = np.array(a, np.int32)
    for right in (np.full(len(a), b, np.uint32), np.full(len(a), b % 2**31, np.int32)):
        y = int(right[0])
        for op, f in (
            ("add", operator.add),
            ("subtract", operator.sub),
            ("multiply", operator.mul),
        ):
            for dtype in (np.int32, np.uint32):
                got = alu.integer(op, left, right, np.dtype(dtype))
                assert got.dtype == dtype
                assert [int(v) % 2**32 for v in got] == [f(x, y) % 2**32 for x in a]
        got = alu.integer("less", left, right, np.dtype(np.int32))
        assert got.tolist() == [int(x < y) for x in a]
        got = alu.integer("maximum", left, right, np.dtype(np.uint32))
        assert got.tolist() == [max(x, y) % 2**32 for x in a]


@pytest.mark.parametrize("dtype", [dtypes.bfloat16, dtypes.int32, dtypes.float8_e4m3], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_tensor_copy_predicated_keeps_bits(dtype, reverse):
    rng = np.random.default_rng(0)
    shape, width = (4, 6), dtype.itemsize
    old, new = (
        rng.integers(0, 256, (4, 6 * width), np.uint8).view(dtype.numpy).reshape(shape)
        for _ in range(2)
    )
    predicate = rng.integers(0, 3, (4, 2, 3), np.uint16)
    got = elementwise.tensor_copy_predicated(old, new, predicate, reverse)
    assert got.dtype == old.dtype and got.shape == shape
    flat = predicate.reshape(shape)
    for i in np.ndindex(*shape):
        source = new if (flat[i] != 0) != reverse else old
        assert dtypes.bits(got)[i] == dtypes.bits(source)[i]
    constant = elementwise.tensor_copy_predicated(old, 2.0, predicate, reverse)
    chosen = (flat != 0) != reverse
    assert (dtypes.load_f32(constant)[chosen] == 2.0).all()
    assert np.array_equal(dtypes.bits(constant)[~chosen], dtypes.bits(old)[~chosen])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("on_false", [-5.0, np.array([[1.0], [2.0], [3.0]], F)])
def test_select_reduce(on_false, reverse):
    on_true = tile((3, 2, 4), 10)
    predicate = np.random.default_rng(2).integers(-1, 2, (3, 8)).astype(np.int8)
    got = elementwise.select_reduce(predicate, on_true, on_false, reverse)
    assert got.dtype == F
    for p in range(3):
        for j in range(8):
            other = on_false[p, 0] if isinstance(on_false, np.ndarray) else on_false
            take = (predicate[p, j] != 0) != reverse
            assert got.reshape(3, 8)[p, j] == (on_true.reshape(3, 8)[p, j] if take else other)


@pytest.mark.parametrize("op0", ["equal", "less", "less_equal", "greater", "greater_equal"])
@pytest.mark.parametrize("start", [0, 37])
def test_range_select(op0, start):
    data = tile((4, 2, 8), 11)
    bound0 = np.array([[0], [5], [40], [3.5]], F)
    bound1 = np.array([[10], [45], [41], [math.inf]], F)
    got = elementwise.range_select(data, op0, "less", bound0, bound1, start)
    compare = {
        **{"equal": operator.eq, "less": operator.lt, "less_equal": operator.le},
        **{"greater": operator.gt, "greater_equal": operator.ge},
    }[op0]
    for p in range(4):
        for j in range(16):
            keep = compare(start + j, bound0[p, 0]) and start + j < bound1[p, 0]
            want = data.reshape(4, 16)[p, j] if keep else np.finfo(F).min
            assert got.reshape(4, 16)[p, j] == want


def test_fold_subtract_and_logical():
    x = np.array([[5, 2, 1], [0, 0, 3]], F)
    assert alu.fold("subtract", x, (1,)).tolist() == [2, -3]
    assert alu.fold("logical_and", x, (1,)).tolist() == [1, 0]
    assert alu.fold("logical_xor", x, (1,)).tolist() == [1, 1]


def _tensor_scalar(d, o, out):
    return elementwise.tensor_scalar(d, "multiply", 2.0, False, "add", o[:, :1], out=out)


def _scalar_tensor_tensor(d, o, out):
    return elementwise.scalar_tensor_tensor(d, "subtract", d[:, :1], "multiply", o, out=out)


@pytest.mark.parametrize(
    "call",
    [
        lambda d, o, out: elementwise.tensor_tensor(d, o, "subtract", out),
        lambda d, o, out: elementwise.tensor_tensor(d, o, "less", out),
        lambda d, o, out: elementwise.reciprocal(d, out),
        lambda d, o, out: elementwise.tensor_scalar(d, "add", o[:, :1], out=out),
        _tensor_scalar,
        _scalar_tensor_tensor,
        *(
            lambda d, o, out, op=op: activation.activation(op, d, o[:, :1], 0.5, out)
            for op in ("exp", "sigmoid", "gelu", "copy", "erf_dx", "softplus")
        ),
        lambda d, o, out: activation.activation("tanh", d, o[:, :1], 1.0, out),
        lambda d, o, out: activation.activation("tanh", d, None, d[:, 1:2], out),
        lambda d, o, out: activation.activation("sigmoid", d, out=out),
    ],
)
@pytest.mark.parametrize("alias", ["none", "data", "other", "shifted"])
def test_out_changes_where_the_result_goes_and_nothing_else(call, alias):
    """A destination may overlap any operand: the result is that of separate memory."""
    pool = tile((4, 9), 20, 0.5, 2.0)
    data, other = tile((4, 6), 21, 0.5, 2.0), tile((4, 6), 22, 0.5, 2.0)
    if alias == "shifted":
        data = pool[:, :6]
    want = call(data.copy(), other.copy(), None)
    out = {"none": pool[:, 3:], "data": data, "other": other, "shifted": pool[:, 3:]}[alias]
    inside = {id(data), id(other)} & {id(out)}
    kept = other.copy()
    got = call(data, other, out)
    np.testing.assert_array_equal(got, want)
    if not inside:
        assert np.array_equal(other, kept)
