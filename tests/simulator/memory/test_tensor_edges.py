"""Views at their edges: run-time rows, single elements, byte-wise aliases; what accesses share."""

from __future__ import annotations

import numpy as np
import pytest
from core_helpers import make_core, numbered

from nsa_neuron.simulator import SimulationError
from nsa_neuron.simulator.memory.allocation import access_at
from nsa_neuron.simulator.memory.nki_object import NKIObject
from nsa_neuron.simulator.memory.written import MAX_RECTS

CORE = make_core()


def rows_of(shape=(16, 8), count=4):
    table = numbered(CORE, shape, "shared_hbm")
    return table.vector_select(0, CORE.allocate((count, 1), "int32", "sbuf"))


def rule_of(make):
    with pytest.raises(SimulationError) as caught:
        make()
    return caught.value.rule


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t[0:3],
        lambda t: t[1:4],
        lambda t: t[0:4:2],
        lambda t: t[0],
        lambda t: t[3, 2:4],
        lambda t: t.slice(0, 0, 3),
        lambda t: t.slice(-2, 0, 4),
        lambda t: t.select(0, 0),
    ],
)
def test_rows_chosen_at_run_time_are_not_chosen_again(make):
    assert rule_of(lambda: make(rows_of())) == "view"


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t[0:4, 2:5],
        lambda t: t[:, 2:5],
        lambda t: t[..., 2:5],
        lambda t: t.slice(1, 2, 5),
        lambda t: t.slice(-1, 2, 5),
    ],
)
def test_columns_of_rows_chosen_at_run_time_may_be(make):
    view = make(rows_of())
    assert (view.shape, view.strides, view.offset) == ((4, 3), (8, 1), 2)
    assert view.is_indirect() and view.dynamic.stride == 8 and view.dynamic.count == 16


def test_a_column_of_rows_chosen_at_run_time():
    for view in (rows_of()[:, 3], rows_of().select(1, 3)):
        assert (view.shape[0], view.offset, view.strides[0]) == (4, 3, 8)


def test_a_view_has_one_run_time_index():
    index = CORE.allocate((1, 1), "int32", "sbuf")
    table = numbered(CORE, (4, 4, 4), "shared_hbm")
    one = table.select(1, index)
    assert (one.shape, one.strides, one.offset) == ((4, 4), (16, 1), 0)
    assert (one.dynamic.dim, one.dynamic.stride, one.dynamic.count) == (1, 4, 4)
    assert rule_of(lambda: one.select(0, index)) == "view"
    assert rule_of(lambda: one.vector_select(0, index)) == "view"
    assert rule_of(lambda: one.view("int32")) == "view"
    assert one[1:2].dynamic is one.dynamic  # a static slice of it is none


def test_selected_dims_are_dropped_but_for_partitions():
    tile = numbered(CORE, (8, 4, 4), "sbuf")
    np.testing.assert_array_equal(tile.select(0, 5).array(), tile.array()[5:6])
    np.testing.assert_array_equal(tile.select(-3, -1).array(), tile.array()[7:8])
    np.testing.assert_array_equal(tile.select(1, 2).array(), tile.array()[:, 2])
    table = numbered(CORE, (8, 4), "shared_hbm")
    np.testing.assert_array_equal(table.select(0, 5).array(), table.array()[5])
    np.testing.assert_array_equal(table.select(1, -1).array(), table.array()[:, 3])
    line = numbered(CORE, (8,), "shared_hbm").select(0, 6)
    assert line.shape == (1,) and line.array()[0] == 6
    for index in (8, -9):
        assert rule_of(lambda index=index: table.select(0, index)) == "index"
    for dim in (2, -3, 1.0):
        assert rule_of(lambda dim=dim: table.select(dim, 0)) == "view"


def test_new_dims_go_anywhere_but_before_the_partitions():
    tile, table = (numbered(CORE, (4, 6), buffer) for buffer in ("sbuf", "shared_hbm"))
    for t, places in ((tile, (1, 2, -1, -2)), (table, (0, 1, 2, -1, -2, -3))):
        for dim in places:
            np.testing.assert_array_equal(t.expand_dim(dim).array(), np.expand_dims(t.array(), dim))
    for dim in (0, -3, 3, -4):
        assert rule_of(lambda dim=dim: tile.expand_dim(dim)) == "view"
    assert rule_of(lambda: table.expand_dim(3)) == rule_of(lambda: table.expand_dim(-4)) == "view"
    wide = tile.expand_dim(1)
    assert wide.broadcast(1, 1).shape == wide.shape
    assert rule_of(lambda: wide.broadcast(1, 0)) == rule_of(lambda: wide.broadcast(2, 6)) == "view"


def test_dims_are_merged_in_order():
    table = numbered(CORE, (2, 3, 4), "shared_hbm")
    assert table.flatten_dims(1, 1).shape == (2, 3, 4)
    np.testing.assert_array_equal(table.flatten_dims(0, -1).array(), np.arange(24))
    np.testing.assert_array_equal(table.flatten_dims(0, 1).array(), table.array().reshape(6, 4))
    assert rule_of(lambda: table.flatten_dims(2, 1)) == "view"
    tile = numbered(CORE, (2, 3, 4), "sbuf")
    np.testing.assert_array_equal(tile.flatten_dims(1, 2).array(), tile.array().reshape(2, 12))
    assert rule_of(lambda: tile.flatten_dims(0, 1)) == "view"
    assert tile.reshape_dim(0, (2,)).shape == (2, 3, 4)
    assert rule_of(lambda: tile.reshape_dim(0, (2, 1))) == "view"


def test_what_a_tensor_says_of_itself():
    tile = numbered(CORE, (4, 6), "sbuf", name="q")
    assert len(tile) == 4 and not tile.is_indirect()
    assert repr(tile[1:, 2:4]) == "NkiTensor((3, 2), float32, sbuf 'q', offset=8)"
    assert repr(numbered(CORE, (4, 6), "sbuf")) == "NkiTensor((4, 6), float32, sbuf, offset=0)"
    assert rule_of(lambda: iter(tile)) == "view"
    assert tile != "q" and tile != None  # noqa: E711 -- as kernels write
    for other in (1, 1.0, np.float32(1), tile[:], tile):
        assert rule_of(lambda other=other: tile == other) == "legacy-api"


def test_patterns_begin_where_the_view_does_unless_they_say():
    table = numbered(CORE, (4, 8), "shared_hbm")
    part = table[1:2, 2:4]
    assert part.ap([[1, 3]]).array().tolist() == [10, 11, 12]
    assert table.ap([[1, 3]], offset=0).array().tolist() == [0, 1, 2]
    half = part.ap([[1, 4]], dtype="bfloat16")
    np.testing.assert_array_equal(
        half.array().view(np.uint16), part.array().reshape(-1).view(np.uint16)
    )
    rows = CORE.allocate((3, 1), "int32", "sbuf")
    assert table.ap([[8, 3], [1, 8]], vector_offset=rows).dynamic.count is None
    assert table.ap([[8, 2], [1, 8]], vector_offset=rows).dynamic.stride == 8
    one = rows[0:1, 0:1]
    assert table.ap([[1, 2]], scalar_offset=one, indirect_dim=-1).dynamic.stride == 1
    assert table.ap([[1, 4]], scalar_offset=one, dtype="bfloat16").dynamic.stride == 16
    for wrong in (
        {"pattern": [[8, 4], [1, 8]], "vector_offset": rows},  # a row without an index
        {"pattern": [[8, 3], [1, 8]], "vector_offset": rows, "indirect_dim": 1},
        {"pattern": [[8, 1]], "vector_offset": rows, "scalar_offset": one},
        {"pattern": [[8, 1]], "scalar_offset": rows},
        {"pattern": [[8, 1]], "scalar_offset": table[0:1, 0:1]},
        {"pattern": [[8, 1]], "scalar_offset": one, "indirect_dim": 2},
        {"pattern": []},
        {"pattern": [[8, 0]]},
        {"pattern": [[8, 1, 1]]},
    ):
        assert rule_of(lambda wrong=wrong: table.ap(**wrong)) == "view"
    tile = numbered(CORE, (4, 8), "sbuf")
    assert tile.ap([[8, 4], [1, 1], [1, 1], [1, 1], [1, 2]]).shape == (4, 1, 1, 1, 2)
    assert tile.ap([[3, 1], [1, 8]]).strides == (8, 1)  # one partition has no step
    assert rule_of(lambda: tile.ap([[7, 2], [1, 4]])) == "partition-step"
    assert rule_of(lambda: tile.ap([[8, 4], [1, 8]], vector_offset=rows)) == "view"


@pytest.mark.parametrize("buffer", ["sbuf", "shared_hbm"])
def test_accesses_of_one_tensor_meet_where_their_bytes_do(buffer):
    tensor = numbered(CORE, (8, 8), buffer)
    middle = tensor[2:4, 2:4].access()
    for key, meets in (
        ((slice(2, 4), slice(2, 4)), True), ((slice(3, 5), slice(3, 5)), True),
        ((slice(1, 3), slice(1, 3)), True), ((slice(4, 6), slice(2, 4)), False),
        ((slice(0, 2), slice(2, 4)), False), ((slice(0, 8), slice(0, 8)), True),
    ):  # fmt: skip
        other = tensor[key].access()
        assert middle.overlaps(other) == other.overlaps(middle) == meets, key
    beside = tensor[2:4, 4:6].access(), tensor[2:4, 0:2].access()
    on_chip = buffer == "sbuf"  # hulls of rows in HBM run over the columns between them
    assert [middle.overlaps(a) for a in beside] == [not on_chip] * 2


def test_accesses_of_two_tensors_meet_where_their_addresses_do():
    def at(partition, byte, buffer="sbuf"):
        address = None if partition is None else (partition, byte)
        return CORE.allocate((4, 8), "float32", buffer, address=address).access()

    middle = at(32, 64)
    for partition, byte, meets in (
        (32, 64, True), (35, 64, True), (36, 64, False), (28, 64, False), (29, 64, True),
        (32, 92, True), (32, 96, False), (32, 32, False), (32, 36, True), (35, 92, True),
        (36, 92, False), (None, 0, False),
    ):  # fmt: skip
        other = at(partition, byte)
        assert middle.overlaps(other) == other.overlaps(middle) == meets, (partition, byte)
    assert not middle.overlaps(at(32, 64, "psum"))


@pytest.mark.parametrize("bytewise", [False, True])
def test_an_alias_reads_what_the_other_tensor_wrote_and_no_more(bytewise):
    core = make_core()
    first = core.allocate((4, 8), "float32", "sbuf", address=(32, 64))
    second = core.allocate((3, 4), "float32", "sbuf", address=(33, 72))
    kind = second.view("uint8") if bytewise else second
    step = 4 if bytewise else 1
    read = first.memory.readable
    assert not read(first[1:4, 2:6].access())
    second.memory.written.add(kind[0:2, 1 * step : 3 * step : 2].access())
    second.memory.written.add(kind[0:2, 1 * step + 1 : 3 * step : 2].access())
    assert read(first[1:3, 3:5].access())
    for rows, columns in (((0, 3), (3, 5)), ((1, 4), (3, 5)), ((1, 3), (2, 5)), ((1, 3), (3, 6))):
        assert not read(first[slice(*rows), slice(*columns)].access()), (rows, columns)
    second.memory.written.fill()
    assert read(first[1:4, 2:6].access())
    for rows, columns in (((0, 2), (2, 3)), ((1, 2), (1, 3)), ((3, 4), (5, 7))):
        assert not read(first[slice(*rows), slice(*columns)].access()), (rows, columns)
    apart = core.allocate((4, 8), "float32", "sbuf", address=(40, 64))
    apart.memory.written.fill()
    assert not read(first.access())


def test_masks_of_elements_and_of_their_bytes():
    tensor = make_core().allocate((2, 4), "float32", "sbuf")
    written = tensor.memory.written
    assert written.empty and not written.touches(tensor.access())
    assert not written.covers(tensor.access()) and not written.mask(tensor.access()).any()
    written.add(tensor.view("uint8")[:, 0:6].access())
    assert written.mask(tensor.access()).tolist() == [[True, False, False, False]] * 2
    assert written.touches(tensor[:, 1:2].access()) and not written.covers(tensor[:, 1:2].access())
    chosen = np.array([[False, True, False, True], [True, False, False, False]])
    written.add_mask(tensor.access(), chosen)
    assert written.mask(tensor.access()).tolist() == [
        [True, True, False, True],
        [True] + [False] * 3,
    ]
    written.add_mask(tensor.access(), np.ones((2, 4), bool))
    assert written.mask(tensor.access()).all() and written.covers(tensor.access())
    written.remove(tensor[0:1, 2:4].access())
    assert written.mask(tensor.access()).tolist() == [[True, True, False, False], [True] * 4]
    assert not written.empty


def test_what_is_full_stays_full_and_a_hole_is_one():
    tensor = make_core().allocate((4, 4), "float32", "sbuf")
    written = tensor.memory.written
    written.add_mask(tensor.access(), np.ones((4, 4), bool))
    assert written.full and written.mask(tensor[1:3].access()).shape == (2, 4)
    assert written.touches(tensor[0:1].access()) and written.mask(tensor.access()).all()
    written.add_mask(tensor.access(), np.zeros((4, 4), bool))
    written.add(tensor[0:1].access())
    assert written.full
    written.remove(tensor[1:2, 1:2].access())
    assert not written.full and not written.covers(tensor[1:2].access())
    assert int((~written.mask(tensor.access())).sum()) == 1


def test_scattered_rectangles_become_a_map_and_are_kept():
    size = 2 * MAX_RECTS + 4
    tensor = make_core().allocate((size, size), "float32", "sbuf")
    written, plain = tensor.memory.written, np.zeros((size, size), bool)
    for i in range(0, size, 2):
        written.add(tensor[i : i + 1, i : i + 2].access())
        plain[i : i + 1, i : i + 2] = True
        assert written.covers(tensor[i : i + 1, i : i + 2].access())
    np.testing.assert_array_equal(written.mask(tensor.access()), plain)


def test_an_access_is_its_place_in_an_allocation():
    tensor = numbered(CORE, (8, 8), "sbuf", address=(32, 64))
    part = tensor[2:4, 2:6].access()
    assert (part.p0, part.p1, part.lo, part.hi) == (2, 4, 8, 24)
    assert (part.partition, part.nbytes, part.start, part.inside) == (34, 32, 18, True)
    assert (part.allocation.partition, part.allocation.nbytes) == (32, 256)
    assert numbered(CORE, (8, 8), "sbuf").access().allocation.partition == 0
    again = access_at(part.allocation, part.place)
    assert again.layout is part.layout and not again.dynamic


class Settings(NKIObject):
    tiles: int
    depth = 2
    name: str = "x"


class Sized(Settings):
    width: int = 4

    def __post_init__(self):
        self.elements = self.width * self.depth


def test_fields_by_position_then_keyword_in_the_order_of_the_classes():
    assert vars(Sized(1, name="y", width=8)) == {
        "tiles": 1, "name": "y", "depth": 2, "width": 8, "elements": 16
    }  # fmt: skip
    assert vars(Settings(1, "z", 3)) == {"tiles": 1, "name": "z", "depth": 3}
    assert not hasattr(Settings(), "tiles") and Settings().depth == 2
    with pytest.raises(TypeError, match=r"unexpected field 'wide'; fields: .*'tiles'"):
        Settings(wide=1)
    with pytest.raises(TypeError, match="unexpected 4 positional arguments"):
        Settings(1, 2, 3, 4)


def test_a_class_that_makes_itself_is_left_alone():
    class Own(NKIObject):
        depth = 2

        def __init__(self, depth):
            self.twice = 2 * depth

    class Below(Own):
        width = 3

    assert Own(4).twice == Below(4).twice == 8
    with pytest.raises(TypeError):
        Below(width=1)

    class Slots(NKIObject):
        __slots__ = ("a",)

    assert not hasattr(Slots(), "a")
