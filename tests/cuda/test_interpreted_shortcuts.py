"""The shorter ways through Triton's language give what Triton's own interpreter gives."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter

from nsa_neuron import interpreted_operators
from nsa_neuron.interpreted_language import INTERPRETED_LANGUAGE
from nsa_neuron.interpreted_operators import _Operands
from nsa_neuron.interpreted_shortcuts import _without_idle_checks

DTYPES = (
    tl.int1, tl.int8, tl.uint8, tl.int32, tl.uint32, tl.int64, tl.float16, tl.bfloat16, tl.float32,
    tl.float64,
)  # fmt: skip
SHAPES = ((), (4,), (2, 4), (1, 4), (2, 1), (8, 1))
PAIRS = (((), (4,)), ((2, 4), ()), ((4,), (2, 4)), ((1, 4), (2, 1)), ((4,), (4,)), ((8, 1), (2, 4)))
NUMBERS = (0, 3, -2, 200, 2**31, 2**40, 0.0, -0.0, 0.5, 1e300, True)
OPERATORS = (
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod,
    operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne, operator.and_,
    operator.or_, operator.lshift, operator.rshift,
)  # fmt: skip


@contextmanager
def as_shipped() -> Iterator[None]:
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    try:
        yield
    finally:
        scope.restore()


def tensor(dtype: Any, shape: tuple[int, ...]) -> Any:
    """Values from 1 on; called in the language that will use them."""
    kind = interpreter._get_np_dtype(dtype)
    data = np.arange(1, 1 + int(np.prod(shape))).reshape(shape or 1)
    data = (data * 0x3F00).astype(kind) if dtype is tl.bfloat16 else data.astype(kind)
    handle = interpreter.TensorHandle(data, dtype)
    return tl.tensor(handle, tl.block_type(dtype, list(shape)) if shape else dtype)


def pointer(shape: tuple[int, ...]) -> Any:
    handle = interpreter.TensorHandle(
        np.full(shape or 1, 4096, np.uint64), tl.pointer_type(tl.float32)
    )
    return tl.tensor(handle, tl.block_type(handle.dtype, list(shape)) if shape else handle.dtype)


def outcome(call: Callable[[], Any]) -> tuple[Any, ...]:
    """Everything that can be told of a result, or of a refusal."""
    try:
        x = call()
    except Exception as error:
        return type(error), str(error)
    shape = [int(size) for size in x.shape]
    kinds = str(x.type), str(x.dtype), str(x.handle.dtype), x.handle.data.dtype
    return *kinds, shape, int(x.numel), x.handle.data.shape, x.handle.data.tobytes()


def same(calls: Callable[[], Iterator[Callable[[], Any]]]) -> int:
    """Holds every call to the shipped language; twice, so that what is remembered is used."""
    with np.errstate(all="ignore"):
        with as_shipped():
            expected = [outcome(call) for call in calls()]
        for _ in range(2):
            with INTERPRETED_LANGUAGE:
                got = [outcome(call) for call in calls()]
            assert got == expected
    return sum(not isinstance(first[0], type) for first in expected)


@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.__name__)
def test_two_tensors(op):
    def calls():
        for a in DTYPES:
            for b in DTYPES:
                for left, right in PAIRS:
                    x, y = tensor(a, left), tensor(b, right)
                    yield lambda x=x, y=y: op(x, y)

    assert same(calls) > 50


@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.__name__)
def test_a_tensor_and_a_number(op):
    def calls():
        for dtype in DTYPES:
            for i, number in enumerate(NUMBERS):
                x, y = tensor(dtype, ()), tensor(dtype, (4,))
                both = [lambda x=x, n=number: op(x, n), lambda y=y, n=number: op(n, y)]
                yield from both[:: -1 if i % 2 else 1]  # either side may be the first to ask

    assert same(calls) > 50


def test_pointers():
    def calls():
        for shape in SHAPES:
            for other in (tensor(tl.int32, shape), tensor(tl.int64, (2, 4)), pointer(shape), 3, 0.5,
                          tensor(tl.float32, shape), tensor(tl.uint32, ())):  # fmt: skip
                yield lambda shape=shape, other=other: pointer(shape) + other
                yield lambda shape=shape, other=other: other + pointer(shape)
                yield lambda shape=shape, other=other: pointer(shape) - other
                yield lambda shape=shape, other=other: pointer(shape) < other

    assert same(calls) > 20


def test_shapes_types_and_casts():
    def calls():
        for dtype in DTYPES:
            for shape in SHAPES[1:]:
                x = tensor(dtype, shape)
                yield lambda x=x: x[None, :]
                yield lambda x=x: x.expand_dims(0)
                yield lambda x=x: tl.reshape(x, (1, 4))
                yield lambda x=x: tl.where(x > 2, x, 0)
                yield lambda x=x: -x
                for into in DTYPES:
                    yield lambda x=x, into=into: x.to(into)

    assert same(calls) > 300


def test_a_constant_is_nobodys_own():
    """What changes its operands' handles, as a shift does, leaves the next call its number."""
    with INTERPRETED_LANGUAGE:
        for shape in ((), (4,)):
            x = tensor(tl.int32, shape)
            for _ in range(3):
                _, two = interpreter.interpreter_semantic.binary_op_type_checking_impl(x, 2)
                assert set(two.handle.data.flat) == {2} and not two.handle.attr
                two.handle.data[:] = 77
                two.handle.set_attr("tt.divisibility", [16])


def test_a_value_wider_than_its_dtype_is_refused():
    with INTERPRETED_LANGUAGE, pytest.raises(ValueError, match=r"64 bits.* exceeds .*32 bits"):
        interpreter.TensorHandle(np.zeros(2, np.int64), tl.int32)


def test_the_language_is_as_shipped_afterwards():
    def members() -> list[Any]:
        owners = (tl.tensor, tl.block_type, tl.dtype, interpreter.TensorHandle)
        return [dict(vars(owner)) for owner in (*owners, interpreter.TritonSemantic)]

    before = members()
    with INTERPRETED_LANGUAGE:
        assert members() != before
    assert members() == before


@pytest.mark.parametrize(
    ("debug", "asked", "checked"),
    [(False, True, False), (True, True, True), (True, False, False), (False, False, False)],
)
def test_overflows_are_looked_for_where_somebody_is_told(debug, asked, checked):
    options = replace(interpreter.interpreter_builder.options, debug=debug, sanitize_overflow=asked)
    assert _without_idle_checks(options).sanitize_overflow is checked


def test_what_is_remembered_of_numbers_has_a_bound(monkeypatch):
    monkeypatch.setattr(interpreted_operators, "_MOST_CONSTANTS", 3)
    operands = _Operands(interpreter.TritonSemantic.binary_op_type_checking_impl)
    member = operands.member()
    with INTERPRETED_LANGUAGE:
        x = tensor(tl.int32, (4,))
        for number in (*range(9), 2, 2):
            _, y = member(interpreter.interpreter_semantic, x, number)
            assert set(y.handle.data.flat) == {number}
            assert 0 < len(operands.constants) <= 3
