"""Whether two blocks of a tensor can meet: cases by hand, and no meeting missed."""

from __future__ import annotations

import pytest
from cost_helpers import hbm, nisa, nl, record, sbuf
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_neuron.simulator.cost.overlap import may_overlap


def accesses(make, *blocks):
    """What memsets or stores of these blocks of one tensor write."""

    def body():
        tensor = make()
        for block in blocks:
            part = tensor[block]
            if make is matrix:
                nisa.dma_copy(part, sbuf(part.shape))
            else:
                nisa.memset(part, 0.0)

    return [i.writes[0] for i in record(body).instructions]


def matrix():
    return hbm((256, 64))


def tile():
    return sbuf((128, 8, 16))


def meet(make, a, b):
    first, second = accesses(make, a, b)
    found = may_overlap(first, second)
    assert may_overlap(second, first) == found
    return found


LEFT, RIGHT, MIDDLE = slice(0, 32), slice(32, 64), slice(31, 33)
TOP, BOTTOM, CENTRE = slice(0, 128), slice(128, 256), slice(64, 192)


@pytest.mark.parametrize(
    ("a", "b", "meets"),
    [
        ((TOP, LEFT), (TOP, RIGHT), False),  # the same rows, columns apart
        ((TOP, LEFT), (TOP, MIDDLE), True),
        ((TOP, RIGHT), (TOP, MIDDLE), True),
        ((TOP, LEFT), (BOTTOM, LEFT), False),  # the same columns, rows apart
        ((TOP, LEFT), (CENTRE, LEFT), True),
        ((TOP, LEFT), (CENTRE, RIGHT), False),
        ((TOP, LEFT), (CENTRE, MIDDLE), True),
        ((TOP, slice(0, 64)), (TOP, RIGHT), True),
    ],
)
def test_blocks_of_a_matrix_meet_where_rows_and_columns_do(a, b, meets):
    assert meet(matrix, a, b) is meets


ALL = slice(0, 128)


@pytest.mark.parametrize(
    ("a", "b", "meets"),
    [
        ((ALL, slice(0, 8), slice(0, 8)), (ALL, slice(0, 8), slice(8, 16)), False),
        ((ALL, slice(0, 8), slice(0, 9)), (ALL, slice(0, 8), slice(8, 16)), True),
        ((ALL, slice(0, 4), slice(0, 8)), (ALL, slice(4, 8), slice(0, 8)), False),
        ((ALL, slice(0, 5), slice(0, 8)), (ALL, slice(4, 8), slice(0, 8)), True),
        ((ALL, slice(0, 8), slice(0, 16, 2)), (ALL, slice(0, 8), slice(1, 16, 2)), False),
        ((ALL, slice(0, 8), slice(0, 16, 2)), (ALL, slice(0, 8), slice(0, 16, 4)), True),
        ((slice(0, 64), slice(0, 8), slice(0, 9)), (slice(64, 128), slice(0, 8), slice(8, 16)),
         False),
    ],
)  # fmt: skip
def test_blocks_of_each_partition_meet_where_all_their_sides_do(a, b, meets):
    assert meet(tile, a, b) is meets


def spans(size):
    """Slices of a side, steps of up to three included."""
    ends = st.tuples(st.integers(0, size - 1), st.integers(1, size), st.integers(1, 3))
    return ends.filter(lambda e: e[0] < e[1]).map(lambda e: slice(*e))


@settings(max_examples=60)
@given(*(st.tuples(spans(6), spans(8)) for _ in range(2)))
def test_no_meeting_is_missed_and_blocks_without_steps_are_told_exactly(a, b):
    def body():
        tensor = sbuf((1, 6, 8), nl.float32)
        for block in (a, b):
            nisa.memset(tensor[(slice(0, 1), *block)], 0.0)

    first, second = (i.writes[0] for i in record(body).instructions)
    shared = all(set(range(8)[p]) & set(range(8)[q]) for p, q in zip(a, b, strict=True))
    if shared:
        assert may_overlap(first, second)
    elif all(s.step == 1 for s in (*a, *b)):
        assert not may_overlap(first, second)
