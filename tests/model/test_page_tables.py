"""Page tables of caches by hand: who has which page, and at which row of the pool a token lies."""

from __future__ import annotations

import numpy as np
import pytest

from nsa_neuron.errors import CacheExhausted
from nsa_neuron.nn.cache.pages import NONE, PageTable

PAGE = 4


def table(pages: int = 6, heads: int = 1) -> PageTable:
    return PageTable.empty("slc", PAGE, heads, pages, batch=2, most=3)


def held(pages: PageTable, sequence: int) -> list[int]:
    return pages.table[sequence].tolist()


def test_pages_are_taken_as_rows_need_them():
    t = table()
    for new, wanted in ((1, [0, NONE, NONE]), (4, [0, NONE, NONE]), (5, [0, 1, NONE])):
        t.grow(0, new - 1, new)
        assert held(t, 0) == wanted
    t.grow(1, 0, 9)
    assert held(t, 1) == [2, 3, 4] and t.users.tolist() == [1] * 5 + [0] and t.free == 1
    assert t.copies == []


def test_a_shared_page_is_copied_before_it_is_written_and_only_then():
    t = table()
    t.grow(0, 0, 6)
    t.take_over(np.array([0, 0]))  # a fork
    assert held(t, 1) == [0, 1, NONE] and t.users.tolist() == [2, 2, 0, 0, 0, 0]
    t.grow(1, 6, 7)
    assert held(t, 1) == [0, 2, NONE] and held(t, 0) == [0, 1, NONE]
    assert t.copies == [(1, 2)] and t.users.tolist() == [2, 1, 1, 0, 0, 0]
    t.grow(0, 6, 9)  # its own by now
    assert held(t, 0) == [0, 1, 3] and t.copies == [(1, 2)]


@pytest.mark.parametrize(
    ("first", "last", "kept"),
    [
        (0, 12, [0, 1, 2]), (0, 9, [0, 1, 2]), (0, 8, [0, 1, NONE]), (0, 5, [0, 1, NONE]),
        (0, 4, [0, NONE, NONE]), (0, 0, [NONE] * 3), (3, 12, [0, 1, 2]), (4, 12, [NONE, 1, 2]),
        (7, 9, [NONE, 1, 2]), (8, 9, [NONE, NONE, 2]),
    ],
)  # fmt: skip
def test_pages_are_kept_while_they_hold_a_row_that_is_kept(first, last, kept):
    t = table()
    t.grow(0, 0, 12)
    t.keep(0, first, last)
    assert held(t, 0) == kept
    assert t.users.tolist() == [int(page in kept) for page in range(6)]


def test_a_page_is_free_when_its_last_user_gave_it_back():
    t = table()
    t.grow(0, 0, 4)
    t.take_over(np.array([0, 0]))
    t.keep(0, 0, 0)
    assert t.users[0] == 1 and held(t, 1) == [0, NONE, NONE]
    t.keep(1, 0, 0)
    assert t.free == 6


def test_a_full_pool_says_so():
    t = table(pages=2)
    t.grow(0, 0, 8)
    with pytest.raises(CacheExhausted, match="sequence 1 needs a page of pool 'slc', and all 2"):
        t.grow(1, 0, 1)


@pytest.mark.parametrize(
    ("heads", "wanted"),
    [
        (1, [[9], [21], [3]]),  # page 2, row 1; nowhere: page 5, row 1; page 0, row 3
        (2, [[17, 21], [41, 45], [3, 7]]),
    ],
)
def test_rows_lie_by_page_then_head_then_place(heads, wanted):
    t = table(pages=5, heads=heads)
    t.table[0], t.table[1] = [2, 4, NONE], [0, NONE, NONE]
    found = t.rows(np.array([0, 1, 1]), np.array([1, 5, 3]), otherwise=5)
    assert found.tolist() == wanted
    # Before the first token and behind the table it is the same.
    nowhere = t.rows(np.array([0, 0]), np.array([-1, 12]), otherwise=5)
    assert (nowhere // (PAGE * heads) == 5).all()


def test_resizing_keeps_pages_and_makes_room():
    t = table()
    t.grow(0, 0, 8)
    t.resize(np.array([0, 0, 1]), most=4, pages=9)
    assert t.table.tolist() == [[0, 1, NONE, NONE], [0, 1, NONE, NONE], [NONE] * 4]
    assert t.users.tolist() == [2, 2, 0, 0, 0, 0, 0, 0, 0]
