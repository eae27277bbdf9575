"""`nl` functions where they are easily wrong: large values, unlike dtypes, axes, odd sizes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from nl_helpers import apply, normal, to_result

from nsa_neuron import simulator
from nsa_neuron.simulator.nki import collectives as ncc
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
E4, E5 = np.dtype(ml_dtypes.float8_e4m3), np.dtype(ml_dtypes.float8_e5m2)


@pytest.mark.parametrize("shift", [-3e4, 0.0, 3e4])
def test_softmax_is_the_same_wherever_its_logits_lie(shift):
    x = (8 * normal(16, 3, 6)).astype(np.float32)
    moved = (x + np.float32(shift)).astype(np.float64)
    wide = np.exp(moved - moved.max(2, keepdims=True))
    want = wide / wide.sum(2, keepdims=True)
    got = apply(lambda t: nl.softmax(t, 2), moved.astype(np.float32))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("epsilon", [1e-6, 0.25])
def test_rms_norm_of_small_rows_is_bounded_by_epsilon(epsilon):
    x, w = 1e-3 * normal(8, 32), normal(8, 32, seed=1)
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(1, keepdims=True) + epsilon) * w
    got = apply(lambda x, w: nl.rms_norm(x, w, 1, 32, epsilon), x, w)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("dtypes", "given", "want"),
    [
        ((np.float32, BF16), None, np.float32), ((BF16, np.float32), None, BF16),
        ((np.float32, BF16), nl.float16, F16),
    ],
)  # fmt: skip
def test_where_has_the_dtype_of_its_first_tile_or_the_one_given(dtypes, given, want):
    c = (normal(8, 6) > 0).astype(np.float32)
    x, y = normal(8, 6, seed=1).astype(dtypes[0]), normal(8, 6, seed=2).astype(dtypes[1])
    got = apply(lambda c, x, y: nl.where(c, x, y, given), c, x, y)
    assert got.dtype == want
    wide = np.where(c, x.astype(np.float32), y.astype(np.float32))
    np.testing.assert_allclose(got.astype(np.float32), wide.astype(want).astype(np.float32))


def test_where_of_integers_takes_a_number_as_one():
    c, x = (normal(8, 6) > 0).astype(np.int32), np.arange(48, dtype=np.int32).reshape(8, 6)
    np.testing.assert_array_equal(apply(lambda c, x: nl.where(c, x, 7), c, x), np.where(c, x, 7))


@pytest.mark.parametrize(
    ("one", "other", "want"),
    [
        (E4, E5, BF16), (E4, E4, E4), (BF16, F16, np.float32), (BF16, E4, BF16),
        (E5, np.float32, np.float32), (np.int32, BF16, BF16), (np.int8, np.int32, np.int32),
        (np.int32, np.uint8, np.int32), (np.int16, np.uint16, np.int16),
    ],
)  # fmt: skip
def test_the_dtype_of_two_tiles(one, other, want):
    a, b = np.ones((4, 4), one), np.ones((4, 4), other)
    assert apply(nl.add, a, b).dtype == want


@pytest.mark.parametrize("shapes", [((4, 8), (8, 4)), ((4, 2, 3), (4, 3)), ((4, 1, 3), (2, 2, 3))])
def test_tiles_of_other_partitions_or_sizes_do_not_pair(shapes):
    with pytest.raises(simulator.SimulationError) as error:
        apply(nl.add, *(normal(*shape) for shape in shapes))
    assert error.value.rule == "shape"


def test_tiles_of_as_many_elements_pair_in_order():
    a, b = normal(4, 6), normal(4, 2, 3, seed=1)
    got = apply(nl.add, a, b)
    assert got.shape == (4, 2, 3)
    np.testing.assert_array_equal(got, a.reshape(4, 2, 3) + b)


@pytest.mark.parametrize("axis", [(1, 2), 2])
def test_means_and_variances_of_several_axes_are_of_all_of_them(axis):
    x = (normal(8, 4, 50) + 3).astype(BF16)
    wide = x.astype(np.float64)
    mean = apply(lambda t: nl.mean(t, axis, nl.float32), x)
    np.testing.assert_allclose(mean.reshape(-1), wide.mean(axis).reshape(-1), rtol=1e-5)
    var = apply(lambda t: nl.var(t, axis, nl.float32), x)
    np.testing.assert_allclose(var.reshape(-1), wide.var(axis).reshape(-1), rtol=1e-5)


@pytest.mark.parametrize("x", [7.0, -7.0])
def test_a_scalar_on_the_left_stays_on_the_left(x):
    y = normal(4, 5) + 3
    np.testing.assert_allclose(apply(lambda t: nl.subtract(x, t), y), x - y, rtol=1e-6)
    np.testing.assert_array_equal(apply(lambda t: nl.less(x, t), y), x < y)


def test_not_of_integers_is_of_their_lowest_bit():
    x = np.array([[0, 1, 1, 0]], np.int32)
    np.testing.assert_array_equal(apply(nl.logical_not, x), 1 - x)


@pytest.mark.parametrize("size", [1, 100, 2048, 2049, 4100, 128 * 2048, 128 * 2048 + 5])
def test_hbm_is_filled_to_its_last_element(size):
    def kernel(x):
        return nl.full((size,), 3, nl.float32, buffer=nl.shared_hbm)

    got = simulator.simulate(kernel)(np.zeros((1, 1), np.float32))
    assert got.shape == (size,) and (got == 3).all()


@pytest.mark.parametrize("partitions", [33, 64, 100, 128])
def test_one_row_on_many_partitions(partitions):
    x = normal(1, 5)
    got = apply(lambda t: nl.broadcast_to(t, (partitions, 5)), x)
    np.testing.assert_array_equal(got, np.tile(x, (partitions, 1)))


def test_cosine_is_shifted_before_its_argument_is_reduced():
    x = np.array([[0.0, np.pi / 2, np.pi, 3 * np.pi / 2, 100.0, -100.0]], np.float32)
    np.testing.assert_allclose(apply(nl.cos, x), np.cos(x.astype(np.float64)), atol=2e-6)


@pytest.mark.parametrize("value", [2.0**23 - 0.5, 2.0**23, 2.0**31, -(2.0**31) - 512, 3e38, -3e38])
def test_large_values_are_whole_already(value):
    x = np.full((1, 4), value, np.float32)
    for name in ("floor", "ceil", "trunc"):
        np.testing.assert_array_equal(apply(getattr(nl, name), x), getattr(np, name)(x))


def test_identities_are_shared_by_size_and_dtype():
    def kernel(x):
        kinds = [nl.shared_identity_matrix(n, d) for n in (4, 8) for d in (nl.bfloat16, nl.uint8)]
        again = [nl.shared_identity_matrix(n, d) for n in (4, 8) for d in (nl.bfloat16, nl.uint8)]
        assert all(a is b for a, b in zip(kinds, again, strict=True))
        assert [(t.shape[0], str(t.dtype)) for t in kinds] == [
            (4, "bfloat16"), (4, "uint8"), (8, "bfloat16"), (8, "uint8"),
        ]  # fmt: skip
        return to_result(nl.copy(kinds[2], nl.float32))

    np.testing.assert_array_equal(simulator.simulate(kernel)(normal(1, 1)), np.eye(8))


def test_an_identity_of_a_loop_that_has_ended_is_made_anew():
    def kernel(x):
        out = nl.ndarray((4, 4), nl.float32, buffer=nl.shared_hbm)

        def body(i):
            nl.shared_identity_matrix(4, nl.float32)

        nl.fori_loop(0, 2, body)
        nisa.dma_copy(out, nl.shared_identity_matrix(4, nl.float32))
        return out

    np.testing.assert_array_equal(simulator.simulate(kernel)(normal(1, 1)), np.eye(4))


def test_integers_for_enums_break_a_rule_every_time():
    def kernel(x):
        tile = nl.load(x)
        for _ in range(2):
            nisa.tensor_copy(tile, tile, engine=5)
        return to_result(tile)

    run = simulator.simulate(kernel, relax={"enum"})
    run(normal(4, 4))
    assert len([e for e in run.run.cores[0].relaxed if e.rule == "enum"]) == 2
    with pytest.raises(simulator.SimulationError) as error:
        simulator.simulate(kernel)(normal(4, 4))
    assert error.value.rule == "enum"


def ranked(call, ranks=2, shape=(4, 6)):
    """`call(src, dst)` on tensors of HBM of each rank, filled with its number."""

    def kernel(x):
        src, dst = (nl.ndarray(shape, x.dtype, buffer=nl.shared_hbm) for _ in range(2))
        nisa.dma_copy(src, x)
        nisa.dma_copy(dst, x)
        call(src, dst)
        return dst

    data = [np.full(shape, r, np.float32) for r in range(ranks)]
    return simulator.simulate(kernel, ranks=ranks)(simulator.PerRank(data))


ALL = ncc.ReplicaGroup([[0, 1]])


@pytest.mark.parametrize("count", [1, 4, 5])
def test_up_to_four_channels(count):
    def call(src, dst):
        ncc.collective_permute_implicit(
            [[src]] * count, [[dst]] * count, ALL, list(range(count))
        )  # fmt: skip

    if count == 5:
        with pytest.raises(simulator.SimulationError, match="at most 4 channels"):
            ranked(call)
        return
    zero, one = ranked(call)
    assert (zero == 1).all() and (one == 0).all()


@pytest.mark.parametrize("pairs", [[(0, 1), (0, 0)], [(0, 1), (1, 1)], [(0, 2)], [(-1, 0)]])
def test_each_rank_is_source_and_target_once(pairs):
    with pytest.raises(simulator.SimulationError, match="source of at most one pair"):
        ranked(lambda src, dst: ncc.collective_permute([src], [dst], pairs))


def test_several_tensors_are_gathered_in_hbm_only():
    def kernel(x):
        tiles = [nl.load(x) for _ in range(4)]
        ncc.all_reduce(tiles[:2], tiles[2:], ALL, nl.add)
        return x

    with pytest.raises(simulator.SimulationError, match="several tensors only in HBM"):
        simulator.simulate(kernel, ranks=2)(np.ones((4, 6), np.float32))
    both = ranked(lambda src, dst: ncc.all_reduce([src, src], [dst, dst], ALL, nl.add))
    assert all((x == 1).all() for x in both)


@pytest.mark.parametrize("steps", range(6))
def test_after_so_many_steps_the_data_of_that_predecessor_is_here(steps):
    group, found = ncc.ReplicaGroup([[2, 0, 1]]), {}

    def kernel(x):
        rank = ncc.collective_permute_implicit_current_processing_rank_id(steps, group)
        found[ncc.rank_id().value] = rank.value
        return x

    simulator.simulate(kernel, ranks=3)(np.ones((2, 2), np.float32))
    order = [2, 0, 1]
    assert found == {r: order[(order.index(r) - steps) % 3] for r in range(3)}


def test_ranks_do_not_see_each_other_s_arguments():
    def kernel(x):
        tile = nl.load(x)
        nisa.tensor_scalar(tile, tile, nl.add, 1.0)
        nl.store(x, tile)
        return x

    shared = np.zeros((2, 2), np.float32)
    for got in simulator.simulate(kernel, ranks=3)(shared):
        assert (got == 1).all()
    assert not shared.any()


def test_ranks_that_order_their_group_otherwise_do_not_meet():
    def kernel(x, order):
        out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        ncc.all_gather([x], [out], ncc.ReplicaGroup([list(order)]), 0)
        return out

    run = simulator.simulate(kernel, ranks=2)
    with pytest.raises(simulator.SimulationError):
        run(np.ones((2, 2), np.float32), simulator.PerRank([(0, 1), (1, 0)]))

    def reduced(x, order):
        out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        ncc.all_reduce([x], [out], ncc.ReplicaGroup([list(order)]), nl.add)
        return out

    run = simulator.simulate(reduced, ranks=2)
    with pytest.raises(simulator.DeadlockError):
        run(np.ones((2, 2), np.float32), simulator.PerRank([(0, 1), (1, 0)]))
    same = run(np.ones((2, 2), np.float32), simulator.PerRank([(1, 0), (1, 0)]))
    assert all((x == 2).all() for x in same)


@pytest.mark.parametrize("precise", [True, False])
def test_without_precision_nothing_is_rounded_as_it_is_stored(precise):
    """Seen through a view of the same bits: tf32 keeps 10 of the 23 bits of a mantissa."""
    x = np.full((1, 4), 1 + 2.0**-20, np.float32)

    def kernel(a):
        narrow, wide = nl.ndarray((1, 4), nl.tfloat32), nl.load(a)
        nisa.tensor_copy(narrow, wide)
        return to_result(narrow.view(nl.float32))

    got = simulator.simulate(kernel, precise=precise)(x)
    np.testing.assert_array_equal(got, np.ones((1, 4)) if precise else x)


def test_steps_of_a_grid_count_elements_from_one_chosen_cell_to_the_next():
    def kernel(x):
        grid = nl.tiles(x, tile_shape=(32, 16))
        assert grid.shape == (4, 4) and grid.index_step_elements == (32, 16)
        assert grid[::2].index_step_elements == (64, 16)
        assert grid[1, ::3].index_step_elements == (48,)
        assert grid[1:3].is_data_representable and not grid[::2].is_data_representable
        assert nl.tiles(x, tile_shape=(48, 20))[2, 3].element_shape == (32, 4)
        return x

    simulator.simulate(kernel)(np.zeros((128, 64), np.float32))


@pytest.mark.parametrize(("dtype", "rule"), [(nl.int64, ""), (nl.int32, "dtype-match")])
@pytest.mark.parametrize("to", [True, False])
def test_64_bits_are_copied_not_converted(dtype, rule, to):
    def kernel(x):
        wide = nl.ndarray((4, 4), nl.int64, buffer=nl.shared_hbm)
        other = nl.ndarray((4, 4), dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(wide, x)
        if to:
            nisa.dma_copy(other, wide)
            return other
        nisa.dma_copy(other, nl.full((4, 4), 3, nl.int32) if dtype is nl.int32 else x)
        nisa.dma_copy(wide, other)
        return wide

    run, x = simulator.simulate(kernel), np.full((4, 4), 2**40, np.int64)
    if not rule:
        np.testing.assert_array_equal(run(x), x)
        return
    with pytest.raises(simulator.SimulationError) as error:
        run(x)
    assert error.value.rule == rule


def table_of(kind=nl.uint32, shape=(3, 2)):
    return nl.full(shape, 0, kind, buffer=nl.shared_hbm)


@pytest.mark.parametrize(
    ("call", "rule", "said"),
    [
        (lambda x, y: ncc.all_reduce([x], [y], [[0, 1]], nl.add), "collective", "a ReplicaGroup"),
        (lambda x, y: ncc.all_reduce([x, 3], [y, y], ALL, nl.add), "collective", "of tensors"),
        (lambda x, y: ncc.all_reduce([x], [y, y], ALL, nl.add), "collective", "hold 1 tensors"),
        (lambda x, y: ncc.all_reduce([], [], ALL, nl.add), "collective", "of tensors"),
        (lambda x, y: ncc.all_reduce([x], [y.view(nl.int32)], ALL, nl.add), "collective",
         "another dtype"),
        (lambda x, y: ncc.all_gather([nl.zeros((2, 2, 2), nl.float32)],
                                     [nl.zeros((4, 2, 2), nl.float32)], ALL, 0),
         "collective", "2-D in SBUF"),
        (lambda x, y: ncc.collective_permute_implicit([x], [y], ALL), "collective", "of tensors"),
        (lambda x, y: ncc.collective_permute_implicit(x, [[y]], ALL), "collective",
         "one list per channel"),
        (lambda x, y: ncc.collective_permute_implicit([[x], [x]], [[y]], ALL), "collective",
         "one list per channel"),
        (lambda x, y: ncc.reduce_scatter([x], [y], ALL, 1, nl.add), "collective", "be that dim"),
        (lambda x, y: ncc.all_to_all_v([x], [y], ALL, table_of(), has_rdispls=True),
         "generation", "has_rdispls"),
        (lambda x, y: ncc.all_to_all_v([x], [y], ALL, table_of(shape=(4, 2))), "collective",
         "wrong shape or dtype"),
        (lambda x, y: ncc.all_to_all_v([x], [y], ALL, table_of(nl.int32)), "collective",
         "wrong shape or dtype"),
        (lambda x, y: ncc.all_to_all_v([x], [y], ALL, table_of(), priority=1), "generation", "v4"),
    ],
)  # fmt: skip
def test_what_a_collective_does_not_take(call, rule, said):
    with pytest.raises(simulator.SimulationError) as error:
        ranked(call)
    assert error.value.rule == rule
    assert said in f"{error.value.operand}: {error.value.message}"


@pytest.mark.parametrize(
    ("count", "start", "rule"),
    [(12, 0, ""), (13, 0, "oob"), (12, 12, ""), (12, 13, "oob"), (0, 24, ""), (0, 25, "oob")],
)
def test_chunks_fit_their_slot_and_their_source(count, start, rule):
    """Of 24 elements each of two ranks has a slot of 12; starts are those of the sender."""

    def kernel(x, meta):
        src, dst = (nl.ndarray((24,), x.dtype, buffer=nl.shared_hbm) for _ in range(2))
        table = nl.ndarray(meta.shape, meta.dtype, buffer=nl.shared_hbm)
        for to, of in ((src, x), (dst, x), (table, meta)):
            nisa.dma_copy(to, of)
        ncc.all_to_all_v([src], [dst], ALL, table)
        return dst

    x = np.arange(24, dtype=np.float32)
    meta = np.array([[count] * 2, [start] * 2, [0] * 2], np.uint32)
    run = simulator.simulate(kernel, ranks=2)
    if rule:
        with pytest.raises(simulator.SimulationError) as error:
            run(x, meta)
        assert error.value.rule == rule
        return
    for got in run(x, meta):
        want = x.copy()
        for slot in (0, 12):
            want[slot : slot + count] = x[start : start + count]
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda t: nl.transpose(nl.zeros((4, 2, 2), nl.float32)), "shape"),
        (lambda t: nl.gather_flattened(t, nl.zeros((4, 4), nl.uint32), axis=1), "value"),
        (lambda t: nl.softmax(t, 0), "axis"),
        (lambda t: nl.add(1.0, 2.0), "usage"),
        (lambda t: nl.floor(3.0), "usage"),
        (lambda t: nl.store(t, 3.0), "usage"),
        (lambda t: nl.shared_constant([1, 2]), "usage"),
        (lambda t: nl.ndarray((4, 4), nl.float32, buffer="sbuf"), "usage"),
        (lambda t: nl.load(t), "usage"),
        (lambda t: nl.broadcast_to(t, (4, 4, 4)), "shape"),
        (lambda t: nl.tiles(t, tile_shape=(4, 4))[0, 1], "grid"),
        (lambda t: nl.tiles(t, tile_shape=(4, 4))[0, 0, 0], "grid"),
        (lambda t: nl.tiles(3, tile_shape=(4, 4)), "usage"),
        (lambda t: nl.tiles(t, tile_shape=(4,)), "grid"),
        (lambda t: nl.tiles(t, tile_shape=[4, 4]), "usage"),
        (lambda t: nl.tiles(t, tile_shape=(4, 0)), "grid"),
    ],
)
def test_what_a_function_does_not_take(call, rule):
    with pytest.raises(simulator.SimulationError) as error:
        apply(lambda t: call(t) or t, normal(4, 4))
    assert error.value.rule == rule


TILES = [
    ("store", "value", lambda h, t: nl.store(h, h)),
    ("transpose", "x", lambda h, t: nl.transpose(h)),
    ("matmul", "x", lambda h, t: nl.matmul(h, t, transpose_x=True)),
    ("matmul", "y", lambda h, t: nl.matmul(t, h, transpose_x=True)),
    ("gather_flattened", "data", lambda h, t: nl.gather_flattened(h, t)),
    ("gather_flattened", "indices", lambda h, t: nl.gather_flattened(t, h)),
    ("sum", "x", lambda h, t: nl.sum(h, 1)),
    ("mean", "x", lambda h, t: nl.mean(h, 1)),
    ("var", "x", lambda h, t: nl.var(h, 1)),
    ("softmax", "x", lambda h, t: nl.softmax(h, 1)),
    ("rms_norm", "w", lambda h, t: nl.rms_norm(t, h, 1, 4)),
    ("where", "condition", lambda h, t: nl.where(h, t, t)),
    ("broadcast_to", "x", lambda h, t: nl.broadcast_to(h, (4, 4))),
    ("dropout", "x", lambda h, t: nl.dropout(h, 0.5)),
    ("add", "x", lambda h, t: nl.add(h, t)),
    ("add", "y", lambda h, t: nl.add(t, h)),
    ("add", "y", lambda h, t: nl.add(1.0, h)),
    ("exp", "x", lambda h, t: nl.exp(h)),
    ("rsqrt", "x", lambda h, t: nl.rsqrt(h)),
    ("floor", "x", lambda h, t: nl.floor(h)),
    ("divide", "y", lambda h, t: nl.divide(t, h)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "operand", "call"), TILES, ids=[f"{name}-{k}" for k, (name, *_) in enumerate(TILES)]
)
def test_a_tensor_in_hbm_is_no_tile(name, operand, call):
    run = simulator.simulate(lambda h: call(h, nl.load(h)), relax=("doubtful",))
    with pytest.raises(simulator.SimulationError) as error:
        run(normal(4, 4))
    said = (error.value.rule, error.value.instruction, error.value.operand)
    assert said == ("usage", f"nl.{name}", operand)


@pytest.mark.parametrize("name", ["dropout", "gather", "transpose", "load_transpose2d", "sin"])
def test_a_dtype_that_is_asked_for_is_that_of_the_result(name):
    x = normal(16, 16)
    calls = {
        "dropout": lambda t: nl.dropout(t, 0.0, nl.bfloat16),
        "gather": lambda t: nl.gather_flattened(t, nl.zeros((16, 4), nl.int32), dtype=nl.bfloat16),
        "transpose": lambda t: nl.transpose(t, nl.bfloat16),
        "sin": lambda t: nl.sin(t, nl.bfloat16),
    }
    if name == "load_transpose2d":
        run = simulator.simulate(lambda x: to_result(nl.load_transpose2d(x, nl.bfloat16)))
        got = run(x)
    else:
        got = apply(calls[name], x)
    want = {
        "dropout": x, "gather": np.repeat(x[:, :1], 4, 1), "transpose": x.T,
        "load_transpose2d": x.T, "sin": np.sin(x),
    }[name]  # fmt: skip
    assert got.dtype == BF16
    np.testing.assert_allclose(got.astype(np.float32), want, rtol=2**-8, atol=1e-6)


def test_uniform_numbers_in_hbm_are_those_of_a_tile():
    def kernel(x):
        nl.random_seed(nl.full((1, 1), 5, nl.int32))
        tile = nl.rand((8, 16), nl.float32)
        nl.random_seed(nl.full((1, 1), 5, nl.int32))
        return to_result(tile), nl.rand((8, 16), nl.float32, buffer=nl.shared_hbm)

    tile, far = simulator.simulate(kernel)(normal(1, 1))
    np.testing.assert_array_equal(tile, far)
    assert 0 <= tile.min() and tile.max() < 1 and np.unique(tile).size == tile.size
