"""The written-element map equals a byte-per-element map, whatever the order of writes."""

from __future__ import annotations

from typing import Any

import numpy as np
from core_helpers import make_core
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_neuron.simulator.memory.storage import Pool


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(["sbuf", "shared_hbm"]))
def test_written_matches_a_plain_map(data: Any, buffer: str) -> None:
    rows, columns = 6, 8
    core = make_core()
    tensor = core.allocate((rows, columns), "float32", buffer)
    written = tensor.memory.written
    plain = np.zeros((rows, columns), bool)
    looks = data.draw(st.booleans())  # at masks in between: they make the map, and end rectangles

    def pick() -> tuple[slice, slice]:
        r = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
        c = sorted(data.draw(st.tuples(st.integers(0, columns), st.integers(0, columns))))
        by = data.draw(st.sampled_from([1, 1, 1, 2]))
        return slice(r[0], max(r[1], r[0] + 1)), slice(c[0], max(c[1], c[0] + 1), by)

    for _ in range(data.draw(st.integers(1, 12))):
        key = pick()
        if plain[key].size == 0:
            continue
        access = tensor[key].access()
        assert written.covers(access) == bool(plain[key].all())
        assert written.touches(access) == bool(plain[key].any())
        if looks:
            np.testing.assert_array_equal(written.mask(access), plain[key])
        if data.draw(st.integers(0, 4)) == 0:
            written.remove(access)
            plain[key] = False
        else:
            written.add(access)
            plain[key] = True
    assert written.covers(tensor.access()) == bool(plain.all())
    np.testing.assert_array_equal(written.mask(tensor.access()), plain)


def test_tiles_in_any_loop_order_fill_the_tensor() -> None:
    for by_column in (False, True):
        tensor = make_core().allocate((512, 1024), "bfloat16", "shared_hbm")
        tiles = [(i, j) for i in range(4) for j in range(4)]
        for i, j in sorted(tiles, key=lambda t: t[::-1] if by_column else t):
            written = tensor.memory.written
            assert not written.full
            written.add(tensor[i * 128 : (i + 1) * 128, j * 256 : (j + 1) * 256].access())
        assert written.full and written._map is None


def test_narrow_view_of_wide_elements_is_tracked_by_byte() -> None:
    tensor = make_core().allocate((4, 4), "float32", "sbuf")
    bytes_view = tensor.view("uint8")
    tensor.memory.written.add(bytes_view[:, 0:4].access())
    tensor.memory.written.add(bytes_view[:, 4:16:2].access())
    assert tensor.memory.written.covers(tensor[:, 0:1].access())
    assert not tensor.memory.written.covers(tensor[:, 0:2].access())
    tensor.memory.written.add(bytes_view[:, 5:16:2].access())
    assert tensor.memory.written.covers(tensor.access())


def place(array: Any) -> int:
    return int(array.ctypes.data)


def test_buffers_are_reused_and_never_while_seen() -> None:
    """Neither behind a tensor that is gone, nor behind a view of a view of it."""
    core = make_core()

    def allocate() -> np.ndarray:
        return core.allocate((128, 512), "float32", "sbuf").array()

    seen = allocate()
    first = place(seen)
    assert place(allocate()) != first
    narrow = seen[1:, ::2].T
    del seen
    narrow[:] = 7.0
    others = [allocate() for _ in range(3)]
    assert first not in map(place, others)
    for other in others:
        other[:] = 1.0
    assert (narrow == 7.0).all()
    del narrow
    assert place(allocate()) == first


def test_a_pool_keeps_no_more_than_its_limit() -> None:
    pool = Pool(keep_bytes=100)
    places = [place(pool.take(60)), place(pool.take(40))]
    lent = [pool.take(60), pool.take(40), pool.take(60)]
    assert [place(x) for x in lent[:2]] == places and place(lent[2]) not in places
    third = place(lent[2])
    del lent[2], lent[0], lent[0]  # 60 are kept, then 60 too many, then 40
    assert place(pool.take(60)) == third and place(pool.take(40)) == places[1]
