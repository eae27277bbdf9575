"""Strides of views by hand and against NumPy: reshapes, merges, sizes left open, slices."""

from __future__ import annotations

import numpy as np
import pytest

from nsa_neuron.simulator.memory import views

SHAPES = [(6, 4), (2, 3, 4), (1, 6, 1, 4), (4, 1, 6), (24,), (3, 8), (2, 2, 2, 3), (1, 24, 1)]


def refusal(function, *arguments):
    with pytest.raises(views.ViewError) as caught:
        function(*arguments)
    return caught.value.message


def elements(shape, strides):
    """The places of all elements, in order."""
    found = np.zeros((), int)
    for size, stride in zip(shape, strides, strict=True):
        found = found[..., None] + np.arange(size) * stride
    return found.ravel().tolist()


@pytest.mark.parametrize("old", SHAPES)
@pytest.mark.parametrize("new", SHAPES)
def test_every_reshape_of_a_dense_tensor_keeps_the_order(old, new):
    strides = views.reshape(old, views.row_major(old), new)
    assert elements(new, strides) == list(range(24))
    if 1 not in new:
        assert strides == views.row_major(new)


@pytest.mark.parametrize(
    ("shape", "strides", "new", "want"),
    [
        ((4, 6), (12, 1), (2, 2, 6), (24, 12, 1)),
        ((4, 6), (12, 1), (4, 2, 3), (12, 3, 1)),
        ((4, 6), (12, 1), (4, 1, 6), (12, 6, 1)),
        ((4, 6), (12, 2), (2, 2, 3, 2), (24, 12, 4, 2)),
        ((4, 6), (12, 2), (24,), (2,)),
        ((4, 6), (1, 4), (2, 2, 6), (2, 1, 4)),
        ((2, 3, 4), (100, 4, 1), (2, 12), (100, 1)),
        ((2, 3, 4), (12, 4, 1), (6, 2, 2), (4, 2, 1)),
        ((4, 6), (12, 1), (24,), None),
        ((4, 6), (12, 1), (8, 3), None),
        ((4, 6), (1, 4), (24,), None),
        ((2, 3, 4), (100, 4, 1), (6, 4), None),
        ((3, 4), (0, 1), (12,), None),
    ],
)
def test_reshapes_without_a_copy_or_none(shape, strides, new, want):
    if want is None:
        assert "without a copy" in refusal(views.reshape, shape, strides, new)
        return
    assert views.reshape(shape, strides, new) == want
    assert elements(new, want) == elements(shape, strides)


@pytest.mark.parametrize(
    ("sizes", "total", "want"),
    [
        ((-1,), 6, (6,)), ((2, -1), 6, (2, 3)), ((-1, 6), 6, (1, 6)), ((2, 3), 6, (2, 3)),
        ((-1, -1), 6, "at most one size may be -1"), ((4, -1), 6, "do not divide"),
        ((0, -1), 6, "do not divide"), ((-2, -1), 6, "do not divide"), ((2, 2), 6, "must stay"),
        ((-2, -3), 6, "must stay"), ((), 1, ()),
    ],
)  # fmt: skip
def test_a_size_left_open(sizes, total, want):
    if isinstance(want, str):
        assert want in refusal(views.infer, sizes, total)
    else:
        assert views.infer(sizes, total) == want


def test_dims_that_follow_each_other_are_merged_past_those_of_size_1():
    shape, strides = (2, 3, 1, 4), (12, 4, 999, 1)
    assert views.merge(shape, strides, 0, 3) == ((24,), (1,))
    assert views.merge(shape, strides, 1, 3) == ((2, 12), (12, 1))
    assert views.merge(shape, strides, 1, 2) == ((2, 3, 4), (12, 4, 1))
    assert views.merge(shape, strides, 2, 2) == (shape, strides)
    assert "dims 0..1 are not contiguous" in refusal(views.merge, (2, 3), (7, 2), 0, 1)


def test_slices_are_python_s_but_stay_inside():
    for size in (1, 4, 7):
        for start in (None, *range(-size, size)):
            for stop in (None, *range(-size, size + 1)):
                for step in (None, 1, 2, 5):
                    want = range(size)[start:stop:step]
                    if not want:
                        assert "empty" in refusal(views.slice_range, size, start, stop, step)
                        continue
                    first, by, count = views.slice_range(size, start, stop, step)
                    assert (first, by, count) == (want.start, step or 1, len(want))
    for start, stop, step in ((0, 5, 1), (-5, 4, 1), (0, 4, 0), (3, 0, -1)):
        refusal(views.slice_range, 4, start, stop, step)
