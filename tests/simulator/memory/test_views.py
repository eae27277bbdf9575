"""Views against NumPy: every chain of view methods shows what NumPy shows, and shares storage."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
from core_helpers import make_core, numbered
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_neuron.simulator.memory.tensor import DynamicSlice
from nsa_neuron.simulator.rules.errors import ConstraintError, OutOfBoundsError, SimulationError

CORE = make_core()
shapes = st.lists(st.integers(1, 6), min_size=2, max_size=5).map(tuple)
buffers = st.sampled_from(["sbuf", "psum", "shared_hbm"])


def as_strided(tensor: Any, storage: np.ndarray) -> np.ndarray:
    """The elements by the documented formula, computed from shape, strides and offset alone."""
    index = np.array(tensor.offset)
    for size, stride in zip(tensor.shape, tensor.strides, strict=True):
        index = index[..., None] + np.arange(size) * stride
    return storage.reshape(-1)[index]


def step(draw: Any, tensor: Any, expected: np.ndarray) -> tuple[Any, np.ndarray]:
    """Apply one random view method to both."""
    free = [d for d in range(tensor.ndim) if d or not tensor.on_chip]
    kind = draw(
        st.sampled_from(["slice", "permute", "expand", "split", "flat", "bcast", "squeeze"])
    )
    if kind == "slice":
        d = draw(st.integers(0, tensor.ndim - 1))
        size = tensor.shape[d]
        start = draw(st.integers(0, size - 1))
        end = draw(st.integers(start + 1, size))
        by = 1 if d == 0 and tensor.on_chip else draw(st.integers(1, 3))
        key = (slice(None),) * d + (slice(start, end, by),)
        return tensor.slice(d, start, end, by), expected[key]
    if kind == "permute":
        order = draw(st.permutations(free))
        dims = ([0] if tensor.on_chip else []) + list(order)
        return tensor.permute(tuple(dims)), expected.transpose(dims)
    if kind == "expand" and tensor.ndim < 7:
        d = draw(st.integers(1 if tensor.on_chip else 0, tensor.ndim))
        return tensor.expand_dim(d), np.expand_dims(expected, d)
    if kind == "split":
        d = draw(st.sampled_from(free))
        size = tensor.shape[d]
        parts = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
        shape = (*tensor.shape[:d], parts, size // parts, *tensor.shape[d + 1 :])
        return tensor.reshape_dim(d, (parts, -1)), expected.reshape(shape)
    if kind == "flat" and tensor.is_contiguous():
        first = 1 if tensor.on_chip else 0
        shape = (*tensor.shape[:first], -1)
        return tensor.reshape(shape), expected.reshape(shape)
    ones = [d for d in free if tensor.shape[d] == 1]
    if kind == "bcast" and ones:
        d = draw(st.sampled_from(ones))
        shape = (*tensor.shape[:d], 3, *tensor.shape[d + 1 :])
        return tensor.broadcast(d, 3), np.broadcast_to(expected, shape)
    if kind == "squeeze" and ones and tensor.ndim > 2:
        d = draw(st.sampled_from(ones))
        return tensor.squeeze_dim(d), expected.squeeze(d)
    return tensor, expected


@settings(max_examples=200, deadline=None)
@given(st.data(), shapes, buffers)
def test_chains_of_views_match_numpy(data: Any, shape: tuple[int, ...], buffer: str) -> None:
    tensor = numbered(CORE, shape, buffer)
    storage = tensor.array().copy()
    view, expected = tensor, storage
    for _ in range(data.draw(st.integers(1, 5))):
        view, expected = step(data.draw, view, expected)
    assert view.shape == expected.shape
    np.testing.assert_array_equal(view.array(), expected)
    np.testing.assert_array_equal(as_strided(view, storage), expected)
    assert np.shares_memory(view.array(), tensor.array())
    assert view.get_pattern() == [list(p) for p in zip(view.strides, view.shape, strict=True)]


@settings(max_examples=200, deadline=None)
@given(st.data(), shapes, buffers)
def test_indexing_matches_numpy(data: Any, shape: tuple[int, ...], buffer: str) -> None:
    tensor = numbered(CORE, shape, buffer)
    key: list[Any] = []
    like: list[Any] = []
    for d, size in enumerate(shape[: data.draw(st.integers(1, len(shape)))]):
        start = data.draw(st.integers(-size, size - 1))
        kind = data.draw(st.sampled_from(["int", "slice", "all", "ds"]))
        keep = slice(start % size, start % size + 1)
        if kind == "int":
            key.append(start)
            like.append(keep if d == 0 and tensor.on_chip else start)
        elif kind == "slice":
            key.append(slice(start, None))
            like.append(slice(start, None))
        elif kind == "ds":
            key.append(DynamicSlice(start % size, 1))
            like.append(keep)
        else:
            key.append(slice(None))
            like.append(slice(None))
    expected = tensor.array()[tuple(like)]
    minimum = 2 if tensor.on_chip else 1
    while expected.ndim < minimum:
        expected = expected[..., None]
    view = tensor[tuple(key)]
    assert view.shape == expected.shape
    np.testing.assert_array_equal(view.array(), expected)


@settings(max_examples=100, deadline=None)
@given(st.data(), shapes)
def test_ap_addresses_storage_and_ignores_the_view(data: Any, shape: tuple[int, ...]) -> None:
    tensor = numbered(CORE, shape, "shared_hbm")
    total = prod(shape)
    pattern, room, offset = [], total - 1, data.draw(st.integers(0, total - 1))
    room -= offset
    for _ in range(data.draw(st.integers(1, 4))):
        stride = data.draw(st.integers(0, 5))
        count = data.draw(st.integers(1, 1 + (room // stride if stride else 3)))
        room -= stride * (count - 1)
        pattern.append([stride, count])
    receiver = tensor[0:1] if data.draw(st.booleans()) else tensor
    view = receiver.ap(pattern, offset=offset)
    assert view.shape == tuple(n for _, n in pattern)
    np.testing.assert_array_equal(view.array(), as_strided(view, tensor.array()))
    assert view.offset == offset


def test_documented_integer_rules() -> None:
    on_chip = numbered(CORE, (8, 4, 16), "sbuf")
    assert on_chip[:, 0, 10].shape == (8, 1)
    assert on_chip[0, 0, 10].shape == (1, 1)
    assert on_chip[2].shape == (1, 4, 16)
    assert on_chip[..., 0].shape == (8, 4)
    hbm = numbered(CORE, (4, 8, 16), "shared_hbm")
    assert hbm[1].shape == (8, 16)
    assert hbm[1, 2, 3].shape == (1,)
    assert float(hbm[1, 2, 3].array()[0]) == 1 * 128 + 2 * 16 + 3


def test_documented_patterns() -> None:
    tensor = numbered(CORE, (128, 64), "sbuf")
    part = tensor.slice(dim=1, start=8, end=24)
    assert part.get_pattern() == [[64, 128], [1, 16]] and part.offset == 8
    same = tensor.ap(pattern=[[64, 128], [1, 16]], offset=8)
    assert (same.get_pattern(), same.offset) == (part.get_pattern(), part.offset)


@pytest.mark.parametrize("buffer", ["sbuf", "shared_hbm"])
def test_reinterpretation_reads_the_same_bytes(buffer: str) -> None:
    tensor = numbered(CORE, (4, 6), buffer)
    raw = tensor.array().copy()
    np.testing.assert_array_equal(tensor.view("uint16").array(), raw.view(np.uint16))
    np.testing.assert_array_equal(tensor.view("uint8").view("float32").array(), raw)
    part = tensor[1:3, 2:4].view("int32")
    np.testing.assert_array_equal(part.array(), raw[1:3, 2:4].view(np.int32))
    narrow = tensor[1:3, 2:4].view("uint8")
    np.testing.assert_array_equal(narrow.array(), raw.view(np.uint8)[1:3, 8:16])
    wide = tensor.view("uint16")[1:3, 4:8].view("float32")
    np.testing.assert_array_equal(wide.array(), raw[1:3, 2:4])
    cast = tensor.ap([[12, 4], [1, 12]], offset=0, dtype="bfloat16")
    np.testing.assert_array_equal(cast.array().view(np.uint16), raw.view(np.uint16))


def test_rearrange_splits_permutes_and_merges() -> None:
    tensor = numbered(CORE, (8, 24), "sbuf")
    raw = tensor.array()
    view = tensor.rearrange(("b", ("h", "w")), ("b", "w", "h"), {"h": 4})
    np.testing.assert_array_equal(view.array(), raw.reshape(8, 4, 6).transpose(0, 2, 1))
    hbm = numbered(CORE, (2, 3, 4), "shared_hbm")
    merged = hbm.rearrange(("a", "b", "c"), (("a", "b"), "c"))
    np.testing.assert_array_equal(merged.array(), hbm.array().reshape(6, 4))


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda t: t[0:9], "index"),
        (lambda t: t[:, 3:3], "index"),
        (lambda t: t[:, 4], "index"),
        (lambda t: t[0, 0, 0, 0], "index"),
        (lambda t: t.permute((1, 0, 2)), "view"),
        (lambda t: t.broadcast(1, 2), "view"),
        (lambda t: t.expand_dim(0), "view"),
        (lambda t: t.squeeze_dim(1), "view"),
        (lambda t: t.reshape((4, 32)), "view"),
        (lambda t: t.reshape((8, 5)), "view"),
        (lambda t: t.permute((0, 2, 1)).reshape((8, 16)), "view"),
        (lambda t: t.permute((0, 2, 1)).flatten_dims(1, 2), "view"),
        (lambda t: t.slice(1, 2, 5), "index"),
        (lambda t: t.ap([[32, 4], [1, 16]]), "partition-step"),
        (lambda t: t.ap([[16, 8], [1, 1], [1, 1], [1, 1], [1, 1], [1, 1]]), "free-dims"),
        (lambda t: t[:, :, ::2].view("uint8"), "view"),
        (lambda t: t.select(0, t[0:1, 0, 0:1]), "view"),
        (lambda t: t.vector_select(0, t), "view"),
        (lambda t: t.indirect(t), "generation"),
        (lambda t: t.__setitem__(0, 1), "legacy-api"),
    ],
)
def test_refusals(make: Any, rule: str) -> None:
    tensor = numbered(CORE, (8, 4, 4), "sbuf")
    with pytest.raises(SimulationError) as caught:
        make(tensor)
    assert caught.value.rule == rule
    assert caught.value.location is not None and caught.value.location.filename == __file__


def test_refused_index_is_an_index_error() -> None:
    tensor = numbered(CORE, (8, 4), "sbuf")
    with pytest.raises(OutOfBoundsError, match="leaves the dim"):
        tensor[:, 4]
    with pytest.raises(ConstraintError):
        tensor.permute((1, 0))


def test_explicit_addresses_alias() -> None:
    first = CORE.allocate((4, 8), "float32", "sbuf", address=(32, 64))
    second = CORE.allocate((2, 4), "float32", "sbuf", address=(33, 80))
    other = CORE.allocate((4, 8), "float32", "sbuf")
    first.array()[...] = np.arange(32).reshape(4, 8)
    np.testing.assert_array_equal(second.array(), np.arange(32).reshape(4, 8)[1:3, 4:])
    assert not np.shares_memory(first.array(), other.array())
    with pytest.raises(SimulationError, match="does not fit"):
        CORE.allocate((4, 8), "float32", "sbuf", address=(126, 0))


def test_an_empty_share_may_be_made_but_not_used():
    whole = numbered(CORE, (128, 8), "sbuf")
    none = whole[:, DynamicSlice(8, 0)]
    assert none.shape == (128, 0)
    with pytest.raises(SimulationError) as error:
        none.access()
    assert error.value.rule == "index"


def test_slices_are_looked_up_by_what_was_asked_for_not_by_what_equals_it() -> None:
    tensor = numbered(CORE, (8, 4, 4), "sbuf")
    keys = [
        (slice(0, 8), slice(1, 2), slice(0, 1)),
        (slice(0, 8), 1, slice(0, 1)),
        (slice(0, 8), slice(1, 2), 0),
        (slice(0, 1), slice(1, 2), slice(0, 1)),
        (slice(None), slice(None), 1),
    ]
    shown = np.arange(128, dtype=np.float32).reshape(8, 4, 4)
    for _ in range(2):  # the second time from what was kept
        for key in keys:
            view = tensor[key]
            np.testing.assert_array_equal(view.array(), shown[key].reshape(view.shape))
            again = numbered(CORE, (8, 4, 4), "sbuf")[key]
            assert again.access().place is view.access().place
            assert again.memory is not view.memory
    for wrong in (1.0, np.float64(1), "1"):
        with pytest.raises(SimulationError):
            tensor[0:8, wrong:2, 0:1]
        with pytest.raises(SimulationError):
            tensor[0:8, wrong, 0:1]
    bytes_ = tensor.view("uint8")
    assert bytes_[0:8, 1:2, 0:1].access().place is not tensor[0:8, 1:2, 0:1].access().place
    assert bytes_[0:8, 1:2, 0:1].dtype == "uint8"


@pytest.mark.parametrize("buffer", ["sbuf", "psum", "shared_hbm"])
@pytest.mark.parametrize("shape", [(4, 6), (4, 2, 6), (4, 2, 3, 2)])
def test_dense_views_are_those_whose_free_elements_follow_each_other(buffer, shape):
    whole = numbered(make_core(), shape, buffer)
    on_chip = int(whole.on_chip)
    for d, size in enumerate(shape):
        for by in (1, 2) if d or not on_chip else (1,):
            for end in {1, size - 1, size}:
                view = whole.slice(d, 0, end, by)
                rows = as_strided(view, whole.array())
                each = [r.ravel() for r in rows] if on_chip else [rows.ravel()]
                dense = all((np.diff(e) == 1).all() for e in each)
                assert view.is_contiguous() == dense, (d, by, end)
