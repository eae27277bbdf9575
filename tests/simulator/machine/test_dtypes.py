"""Data types: identity, spellings, and conversions against exact rational arithmetic."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_neuron.simulator.machine import dtypes

FLOATS = {
    # name: (explicit mantissa bits, smallest normal exponent, largest finite, has infinities)
    "bfloat16": (7, -126, (2 - 2.0**-7) * 2.0**127, True),
    "float16": (10, -14, 65504.0, True),
    "tfloat32": (10, -126, (2 - 2.0**-10) * 2.0**127, True),
    "float8_e4m3": (3, -6, 240.0, True),
    "float8_e5m2": (2, -14, 57344.0, True),
    "float8_e4m3fn": (3, -6, 448.0, False),
}
fp32 = st.floats(width=32, allow_nan=True, allow_infinity=True)


def round_exactly(x: float, name: str) -> float:
    """Nearest value of a format, ties to the even mantissa, by rational arithmetic."""
    mantissa, min_exponent, largest, has_inf = FLOATS[name]
    overflow = math.inf if has_inf else math.nan
    if math.isnan(x) or x == 0:
        return x
    if math.isinf(x):
        return math.copysign(overflow, x)
    exponent = max(math.frexp(x)[1] - 1, min_exponent)
    quantum = Fraction(2) ** (exponent - mantissa)
    rounded = Fraction(round(Fraction(x) / quantum)) * quantum  # round() is half to even
    if abs(rounded) > Fraction(largest):
        return math.copysign(overflow, x)
    return math.copysign(float(rounded), x)


def stored(values: np.ndarray, dtype: dtypes.DType) -> np.ndarray:
    out = np.zeros(values.shape, dtype.numpy)
    dtypes.store(out, values, dtype)
    return out


@pytest.mark.parametrize("name", FLOATS)
@settings(max_examples=150, deadline=None)
@given(values=st.lists(fp32, min_size=1, max_size=40))
def test_rounding_to_floats_is_nearest_even(name, values):
    got = dtypes.load_f32(stored(np.array(values, np.float32), dtypes.resolve(name)))
    want = np.array([round_exactly(v, name) for v in values], np.float32)
    np.testing.assert_array_equal(got, want)
    zero = want == 0
    np.testing.assert_array_equal(np.signbit(got[zero]), np.signbit(want[zero]))


@pytest.mark.parametrize("name", FLOATS)
def test_ties_and_edges_of_floats(name):
    mantissa, min_exponent, largest, _ = FLOATS[name]
    step = 2.0**-mantissa
    tiny = 2.0 ** (min_exponent - mantissa)
    cases = [1 + step / 2, 1 + 3 * step / 2, 1 + step / 2 + 2.0**-23, largest, -largest]
    cases += [tiny, tiny / 2, tiny * 0.51, tiny * 1.5, -0.0, math.inf, -math.inf, math.nan]
    last = 2.0 ** math.floor(math.log2(largest)) * step
    cases += [largest + last / 2, largest + 0.49 * last, np.finfo(np.float32).min]
    values = np.array(cases, np.float64).astype(np.float32)
    got = dtypes.load_f32(stored(values, dtypes.resolve(name)))
    np.testing.assert_array_equal(got, [round_exactly(float(v), name) for v in values])


def test_fp32_min_becomes_minus_infinity_in_narrow_floats():
    # The note on nisa.range_select: the fill value turns into -inf when dst is narrower.
    low = np.full((2, 3), np.finfo(np.float32).min, np.float32)
    for name in ("bfloat16", "float16", "float8_e4m3", "float8_e5m2"):
        assert np.all(dtypes.load_f32(stored(low, dtypes.resolve(name))) == -np.inf)


@pytest.mark.parametrize("name", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
@settings(max_examples=150, deadline=None)
@given(values=st.lists(fp32, min_size=1, max_size=40))
def test_fp32_to_integer_rounds_to_even_and_saturates(name, values):
    info = np.iinfo(name)

    def convert(v: float) -> int:
        if math.isnan(v):
            return 0
        if math.isinf(v):
            return info.max if v > 0 else info.min
        return min(max(round(Fraction(v)), info.min), info.max)

    got = stored(np.array(values, np.float32), dtypes.resolve(name))
    assert got.tolist() == [convert(v) for v in values]


@pytest.mark.parametrize("name", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_integer_limits(name):
    info = np.iinfo(name)
    values = [0.5, 1.5, 2.5, -0.5, -1.5, 2147483648.0, 4294967296.0, -2147483904.0, 3e38, -3e38]
    got = stored(np.array(values, np.float32), dtypes.resolve(name))
    want = [min(max(round(Fraction(v)), info.min), info.max) for v in values]
    assert got.tolist() == want


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.integers(-(2**31), 2**32 - 1), min_size=1, max_size=20))
def test_integers_to_integers_saturate_and_to_floats_go_through_fp32(values):
    wide = np.array(values, np.int64)
    for name in ("int8", "uint16", "int32", "uint32"):
        info = np.iinfo(name)
        got = stored(wide, dtypes.resolve(name))
        assert got.tolist() == [min(max(v, info.min), info.max) for v in values]
    inside = wide[(wide >= -(2**31)) & (wide < 2**31)].astype(np.int32)
    got = dtypes.load_f32(stored(inside, dtypes.bfloat16))
    want = [round_exactly(float(np.float32(v)), "bfloat16") for v in inside.tolist()]
    assert got.tolist() == want


@pytest.mark.parametrize("dtype", [d for d in dtypes.ALL if d.kind != "packed"], ids=str)
def test_every_code_loads_and_stores_back(dtype):
    """A load followed by a store keeps every value that fp32 can hold."""
    width = dtype.itemsize * 8
    codes = np.arange(1 << min(width, 16), dtype=np.uint32)
    if width == 32:
        codes = codes * np.uint32(65521) + np.uint32(12345)
    raw = codes.astype(f"uint{width}").view(dtype.numpy)
    if dtype.kind in ("int", "uint") and width == 32:
        raw = raw >> 8 if dtype is dtypes.uint32 else raw // 256
    if dtype is dtypes.bool_:
        raw = raw % 2
    if dtype is dtypes.tfloat32:
        raw = (raw.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    values = dtypes.load_f32(raw)
    assert values.dtype == np.float32
    back = stored(values, dtype)
    number = ~np.isnan(values)
    assert np.array_equal(dtypes.bits(back)[number], dtypes.bits(raw)[number])
    if dtype.is_float:
        assert np.isnan(dtypes.load_f32(back)[~number]).all()
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(values, raw.astype(np.float32))


@pytest.mark.parametrize("dtype", [d for d in dtypes.ALL if d.kind != "packed"], ids=str)
def test_views_of_any_strides(dtype):
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2, (4, 6, 5)).astype(np.float32)
    if dtype is dtypes.float8_e8m0fnu:
        values += 1  # powers of two only: it has no zero
    for make in (
        lambda a: a,
        lambda a: a[:, ::2],
        lambda a: a.transpose(0, 2, 1),
        lambda a: a[:, ::-1, 1:4:2],
        lambda a: np.broadcast_to(a[:, :1], a.shape),
        lambda a: np.broadcast_to(a[:1, :1, :1], a.shape),
        lambda a: a[:0],
    ):
        storage = stored(values, dtype)
        np.testing.assert_array_equal(dtypes.load_f32(make(storage)), make(values))
    storage = np.zeros((4, 12, 5), dtype.numpy)
    dtypes.store(storage[:, ::2].transpose(0, 2, 1), values.transpose(0, 2, 1), dtype)
    np.testing.assert_array_equal(dtypes.load_f32(storage)[:, ::2], values)
    assert not dtypes.bits(storage)[:, 1::2].any()


def test_store_pairs_elements_in_row_major_order():
    out = np.zeros((2, 2, 3), np.int16)
    dtypes.store(out, np.arange(12, dtype=np.float32).reshape(2, 6))
    assert out.ravel().tolist() == list(range(12))


def test_raw_elements_are_copied_bit_for_bit():
    codes = np.arange(1 << 16, dtype=np.uint16)  # all bf16 codes, signalling NaN included
    source = codes.view(ml_dtypes.bfloat16)
    out = np.zeros(source.shape, dtypes.bfloat16.numpy)
    dtypes.store(out, source, dtypes.bfloat16)
    assert np.array_equal(out.view(np.uint16), codes)
    large = np.array([2**31 - 1, -(2**31) + 1, 16777217], np.int32)
    out32 = np.zeros(3, np.int32)
    dtypes.store(out32, large)
    assert out32.tolist() == large.tolist()


def test_store_bits_truncates_and_zero_extends():
    narrow, wide = np.zeros(2, np.int8), np.zeros(2, np.int32)
    dtypes.store_bits(narrow, np.array([0x1FF, 0x80], np.uint32))
    dtypes.store_bits(wide, np.array([0xFF, 0x80], np.uint8))
    assert narrow.tolist() == [-1, -128]
    assert wide.tolist() == [255, 128]


def test_bool_stores_truth():
    got = stored(np.array([0.0, -0.0, 0.25, -3.0, 300.0, np.nan], np.float32), dtypes.bool_)
    assert got.tolist() == [0, 0, 1, 1, 1, 1]


def test_high_precision_mode_holds_low_precision_floats_as_fp32():
    x = np.array([1.0 + 2.0**-20, 1e-30], np.float32)
    for dtype in dtypes.ALL:
        if dtype.is_float:
            held = np.zeros(2, dtype.storage(precise=False))
            dtypes.store(held, x)
            assert np.array_equal(dtypes.load_f32(held), x)
        else:
            assert dtype.storage(precise=False) == dtype.numpy
    assert dtypes.bfloat16.itemsize == 2


def test_sizes_kinds_and_generations():
    sizes = {"bool": 1, "int32": 4, "tfloat32": 4, "bfloat16": 2, "float8_e4m3": 1}
    sizes |= {"float8_e5m2_x4": 4, "float8_e4m3fn_x4": 4, "float4_e2m1fn_x4": 2}
    for name, size in sizes.items():
        assert dtypes.resolve(name).itemsize == size
    gen4 = {str(d) for d in dtypes.ALL if d.gen4_only}
    assert gen4 == {
        *("float8_e8m0fnu", "float8_e5m2_x4", "float8_e4m3fn_x4", "float4_e2m1fn_x4"),
    }
    assert {str(d) for d in dtypes.ALL if d.is_fp8} == {
        *("float8_e4m3", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"),
    }


@pytest.mark.parametrize("dtype", dtypes.ALL, ids=str)
def test_a_dtype_is_its_name_and_one_object(dtype):
    assert isinstance(dtype, str) and f"{dtype}" == dtype.name == str(dtype)
    assert dtypes.resolve(str(dtype)) is dtype
    assert dtypes.resolve(f"nki.language.{dtype}") is dtype
    assert {dtype: 1}[str(dtype)] == 1
    assert copy.deepcopy(dtype) is dtype and pickle.loads(pickle.dumps(dtype)) is dtype
    others = [d for d in dtypes.ALL if d is not dtype]
    assert all(dtype != d for d in others) and dtype not in others


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        (np.float32, "float32"),
        (np.dtype("int16"), "int16"),
        (np.bool_, "bool"),
        (np.dtype(bool), "bool"),
        (ml_dtypes.bfloat16, "bfloat16"),
        (np.dtype(ml_dtypes.float8_e5m2), "float8_e5m2"),
        ("float8e4", "float8_e4m3"),
        ("float8e5", "float8_e5m2"),
        ("bool_", "bool"),
        ("torch.float16", "float16"),
        (float, "float32"),
        (int, "int32"),
        (bool, "bool"),
    ],
)
def test_spellings(spelling, name):
    assert dtypes.resolve(spelling) is dtypes.resolve(name)
    assert dtypes.resolve(name) == spelling
    assert not dtypes.resolve(name) != spelling


def test_torch_dtypes_are_recognised_without_importing_torch():
    torch = pytest.importorskip("torch")
    pairs = {torch.bfloat16: "bfloat16", torch.bool: "bool", torch.uint8: "uint8"}
    for theirs, name in pairs.items():
        assert dtypes.resolve(theirs) == name
        assert theirs == dtypes.resolve(name) and dtypes.resolve(name) == theirs


@pytest.mark.parametrize(
    "bad", [np.uint64, "float64", "complex64", 3, None, object, [], np.ndarray]
)
def test_what_is_not_a_dtype(bad):
    assert dtypes.find(bad) is None
    assert dtypes.float32 != bad
    with pytest.raises(dtypes.UnknownDTypeError, match="not an NKI dtype"):
        dtypes.resolve(bad)


def test_64_bit_types_are_refused_with_the_type_to_use():
    with pytest.raises(dtypes.UnknownDTypeError, match=r"convert to nl\.uint32"):
        dtypes.resolve(np.dtype(np.uint64))


def test_int64_is_held_and_never_computed_with():
    assert dtypes.resolve(np.dtype(np.int64)) is dtypes.resolve("int64") is dtypes.int64
    assert dtypes.int64 == "int64" and dtypes.int64 not in dtypes.ALL
