"""Single instructions off the beaten path: other lanes, other dtypes, what stays unwritten."""

from __future__ import annotations

import numpy as np
import pytest
from isa_helpers import (
    BF16,
    F32,
    f32,
    integers,
    new,
    normal,
    ps,
    record,
    refused,
    sb,
    simulated,
)

from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

BF, U8, U16, U32, I32 = nl.bfloat16, nl.uint8, nl.uint16, nl.uint32, nl.int32
COMMAND = nisa.reduce_cmd
T = np.ones((64, 16), np.float32)


def hbm(*shape, dtype=nl.float32):
    return nl.ndarray(shape, dtype, buffer=nl.shared_hbm)


def rows_of(table, count, index):
    width = table.shape[1]
    return table.ap([[width, count], [1, width]], vector_offset=index)


@pytest.mark.parametrize("first", [0, 32, 64])
def test_accumulators_are_those_of_the_lanes_at_hand(first):
    """Sums of 32 rows on other partitions than others before them."""
    x = normal(128, 8)

    def body(t):
        out, lanes = sb(128, 4), slice(first, first + 32)
        nisa.activation(
            new(128, 8), nl.copy, t, reduce_op=nl.add, reduce_cmd=COMMAND.reset_reduce,
            reduce_res=out[:, 0:1],
        )  # fmt: skip
        nisa.activation(
            new(128, 8)[lanes], nl.copy, t[lanes], reduce_op=nl.add, reduce_cmd=COMMAND.reduce,
            reduce_res=out[lanes, 1:2],
        )  # fmt: skip
        nisa.tensor_scalar_cumulative(new(128, 8), t, nl.multiply, nl.add, 1.0)
        done = new(128, 8)
        nisa.tensor_scalar_cumulative(
            done[lanes], t[lanes], nl.multiply, nl.add, 1.0, reduce_cmd=COMMAND.reduce
        )
        nisa.tensor_copy(out[lanes, 2:3], done[lanes, 7:8])
        nisa.tensor_scalar_reduce(
            new(128, 8)[lanes], t[lanes], nl.add, 0.0, nl.add, out[lanes, 3:4],
            reduce_res_negate=True,
        )  # fmt: skip
        return out

    got, sums = simulated(body, x), x.astype(np.float64).sum(1)
    lanes = slice(first, first + 32)
    np.testing.assert_allclose(got[:, 0], sums, rtol=1e-4, atol=1e-5)
    for column, want in ((1, 2 * sums), (2, 2 * sums), (3, -sums)):
        np.testing.assert_allclose(got[lanes, column], want[lanes], rtol=1e-4, atol=1e-5)


def test_an_activation_that_reduces_begins_anew():
    def body(t):
        out = new(64, 2)
        for k in range(2):
            nisa.activation_reduce(new(64, 16), nl.copy, t, nl.add, out[:, k : k + 1])
        return out

    np.testing.assert_array_equal(simulated(body, T), np.full((64, 2), 16))


def test_idle_leaves_the_registers_of_its_lanes_undefined_and_no_others():
    def body(t, lanes):
        nisa.tensor_scalar_reduce(new(64, 16), t, nl.add, 1.0, nl.add)
        nisa.select_reduce(new(64, 16)[0:32], sb(64, 16, dtype=U8)[0:32], t[0:32], 0.0)
        nisa.tensor_scalar_reduce(
            new(64, 16)[lanes], t[lanes], nl.add, 1.0, nl.add, reduce_cmd=COMMAND.reduce
        )
        return t

    simulated(lambda t: body(t, slice(32, 64)), T)
    refused("undefined-accumulator", lambda t: body(t, slice(0, 32)), T)


def test_both_operators_of_a_scalar_are_reversed_each_by_its_own_flag():
    x = normal(8, 6)
    tile = normal(8, 6)

    def body(t, other):
        outs = []
        for one, two in ((False, True), (True, False)):
            out = new(8, 6)
            nisa.tensor_scalar(out, t, nl.subtract, 2.0, one, nl.subtract, 5.0, two)
            outs.append(out)
            out = new(8, 6)
            nisa.scalar_tensor_tensor(out, t, nl.subtract, 2.0, nl.subtract, other, one, two)
            outs.append(out)
        return tuple(outs)

    a, b, c, d = simulated(body, x, tile)
    np.testing.assert_allclose(a, 5 - (x - 2), rtol=1e-6)
    np.testing.assert_allclose(b, tile - (x - 2), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(c, (2 - x) - 5, rtol=1e-6)
    np.testing.assert_allclose(d, (2 - x) - tile, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtypes", [(U32, U32, U32), (I32, U32, I32), (I32, I32, U32)])
def test_32_bit_integers_of_either_sign_are_exact_on_gpsimd(dtypes):
    x = np.array([[2**24 + 1, 7]], np.int32)

    def body(t):
        a, b, out = (new(1, 2, dtype=d) for d in dtypes)
        nisa.tensor_copy(a, t.view(dtypes[0]))
        nisa.memset(b, 1)
        nisa.tensor_tensor(out, a, b, nl.add)
        return out

    got, run = record(body, x)
    np.testing.assert_array_equal(got.astype(np.int64), [[2**24 + 2, 8]])
    assert [i.engine for i in run.instructions if i.opcode == "tensor_tensor"] == ["gpsimd"]


@pytest.mark.parametrize("psum_role", [0, 1, 2])
def test_integers_in_psum_stay_with_vector_engine(psum_role):
    x = integers(4, 4)

    def body(t):
        tiles = [new(4, 4, dtype=I32) if k != psum_role else ps(4, 4, dtype=I32) for k in range(3)]
        for tile in tiles[1:]:
            nisa.tensor_copy(tile, t)
        nisa.tensor_tensor(*tiles, nl.add)
        return tiles[0]

    got, run = record(body, x)
    np.testing.assert_array_equal(got, 2 * x)
    assert [i.engine for i in run.instructions if i.opcode == "tensor_tensor"] == ["vector"]


@pytest.mark.parametrize("reverse", [False, True])
def test_selection_may_be_reversed_and_compares_with_two_bounds(reverse):
    x, mask = normal(16, 8), (np.arange(128).reshape(16, 8) % 3 == 0).astype(np.uint8)
    low, high = np.full((16, 1), 2, np.float32), np.full((16, 1), 6, np.float32)

    def body(t, m, lo, hi):
        picked, ranged = new(16, 8), new(16, 8)
        nisa.select_reduce(picked, m, t, 9.0, reverse_pred=reverse)
        nisa.range_select(ranged, t, nl.greater_equal, nl.less, lo, hi)
        return picked, ranged

    picked, ranged = simulated(body, x, mask, low, high)
    np.testing.assert_array_equal(picked, np.where((mask != 0) != reverse, x, 9.0))
    inside = (np.arange(8) >= 2) & (np.arange(8) < 6)
    np.testing.assert_array_equal(ranged, np.where(inside, x, np.finfo(np.float32).min))


def test_a_predicated_copy_leaves_unwritten_what_it_does_not_write():
    mask = np.zeros((64, 16), np.uint8)
    mask[:, :8] = 1

    def body(t, m, columns):
        out = new(64, 16)
        nisa.tensor_copy_predicated(out, t, m)
        nisa.tensor_copy(new(64, columns.stop - columns.start), out[:, columns])
        return t

    simulated(lambda t, m: body(t, m, slice(0, 8)), T, mask)
    refused("uninitialized-read", lambda t, m: body(t, m, slice(0, 9)), T, mask)


def test_a_shuffle_leaves_unwritten_what_it_keeps():
    def body(t, row):
        out = new(32, 16)
        nisa.nc_stream_shuffle(out, t[0:32], [0] * 31 + [255])
        nisa.tensor_copy(new(32, 16)[:31] if row < 31 else new(32, 16), out[: row + 1])
        return t

    simulated(lambda t: body(t, 30), T)
    refused("uninitialized-read", lambda t: body(t, 31), T)


def test_transposes_of_both_kinds_are_written_and_foreign():
    """A transpose into PSUM can be read, and a product does not add to it."""

    def body(t, mode):
        eye, bank = new(64, 64), ps(16, 64)
        nisa.memset(eye, 0.0)
        nisa.affine_select(eye, [[-1, 64]], 1, sb(64, 64), 1.0, nl.not_equal)
        nisa.nc_matmul(bank, t, eye, is_transpose=True)
        nisa.tensor_copy(out := new(16, 64), bank)
        if mode:
            nisa.nc_matmul(bank, t, eye, accumulate=True)
        return out

    np.testing.assert_array_equal(simulated(lambda t: body(t, False), T), T.T)
    refused("psum-accumulate", lambda t: body(t, True), T)


def indices(values):
    return np.array(values, np.uint32).reshape(-1, 1)


@pytest.mark.parametrize("wide_table", [False, True])
def test_rows_by_index_are_cast_as_they_move(wide_table):
    table_type, tile_type = (nl.float32, BF) if wide_table else (BF, nl.float32)
    x = normal(8, 6).astype(F32 if wide_table else BF16)
    where = indices([3, 0, 5, 7])

    def body(t, at):
        table, tile, out = hbm(8, 6, dtype=table_type), new(4, 6, dtype=tile_type), hbm(8, 6)
        nisa.dma_copy(table, t)
        nisa.dma_copy(tile, rows_of(table, 4, at))
        nisa.dma_copy(out, sb(8, 6))
        nisa.dma_copy(rows_of(out, 4, at), tile)
        back = new(8, 6)
        nisa.dma_copy(back, out)
        return tile, back

    tile, back = simulated(body, x, where)
    want = f32(x)[[3, 0, 5, 7]]
    want = want.astype(BF16).astype(np.float32) if wide_table else want
    np.testing.assert_array_equal(f32(tile), want)
    scattered = np.zeros((8, 6), np.float32)
    scattered[[3, 0, 5, 7]] = want
    np.testing.assert_array_equal(back, scattered)


def test_scattered_rows_are_written_others_are_not():
    def body(t, at, rows):
        table = hbm(8, 16)
        nisa.dma_copy(rows_of(table, 2, at), t[0:2])
        nisa.dma_copy(new(rows.stop - rows.start, 16), table[rows])
        return t

    where = indices([3, 4])
    simulated(lambda t, at: body(t, at, slice(3, 5)), T, where)
    refused("uninitialized-read", lambda t, at: body(t, at, slice(2, 5)), T, where)


def test_rows_can_be_skipped_only_where_both_sides_have_the_same():
    skip = nisa.oob_mode.skip

    def body(t, at, flat):
        table = hbm(4, 16)
        nisa.dma_copy(table, t[0:4])
        tile = sb(1, 32) if flat else sb(2, 16)
        nisa.dma_copy(tile, rows_of(table, 2, at), oob_mode=skip)
        return tile

    got = simulated(lambda t, at: body(t, at, False), T, indices([9, 1]))
    np.testing.assert_array_equal(got, [[0] * 16, [1] * 16])
    refused("shape", lambda t, at: body(t, at, True), T, indices([9, 1]))
    simulated(lambda t, at: body(t, at, True), T, indices([0, 1]))


def test_a_gathered_sum_keeps_the_rows_that_are_skipped():
    x = normal(4, 6)

    def body(t, at):
        table, tile = hbm(4, 6), new(4, 6)
        nisa.dma_copy(table, t)
        nisa.memset(tile, 2.0)
        skip = nisa.oob_mode.skip
        nisa.dma_compute(tile, [rows_of(table, 4, at), tile], nl.add, oob_mode=skip)
        return tile

    got = simulated(body, x, indices([3, 9, 1, 0]))
    np.testing.assert_array_equal(got, [x[3] + 2, [2] * 6, x[1] + 2, x[0] + 2])


def test_indices_of_a_sum_are_unique():
    def body(t, at):
        table, tile = hbm(4, 16), sb(2, 16)
        nisa.dma_copy(table, t[0:4])
        nisa.dma_compute(tile, [rows_of(table, 2, at), tile], nl.add)
        return t

    simulated(body, T, indices([3, 1]))
    refused("value", body, T, indices([3, 3]))


def test_a_scattered_sum_writes_the_rows_it_names_and_no_others():
    def body(t, at, rows):
        table, tile = hbm(8, 16), sb(2, 16)
        nisa.memset(tile, 3.0)
        nisa.dma_copy(table[3:5], t[0:2])
        view = rows_of(table, 2, at)
        nisa.dma_compute(view, [tile, view], nl.add)
        back = new(rows.stop - rows.start, 16)
        nisa.dma_copy(back, table[rows])
        return back

    where = indices([4, 3])
    x = normal(64, 16)
    got = simulated(lambda t, at: body(t, at, slice(3, 5)), x, where)
    np.testing.assert_array_equal(got, x[0:2] + np.float32(3))
    refused("uninitialized-read", lambda t, at: body(t, at, slice(2, 5)), x, where)
    refused("uninitialized-read", lambda t, at: body(t, at, slice(3, 6)), x, where)
    refused("uninitialized-read", lambda t, at: body(t, at, slice(3, 5)), x, indices([4, 5]))


@pytest.mark.parametrize("first", [5, 33, 97])
def test_transfers_begin_at_any_partition_engines_do_not(first):
    """DMA moves bytes: no quadrants, no half of them."""
    there = slice(first, first + 16)

    def body(t, at):
        tile, table = sb(128, 16), hbm(16, 16)
        nisa.dma_copy(table, t[0:16])
        nisa.dma_copy(tile[there], table)
        nisa.dma_compute(tile[there], [tile[there], table], nl.add)
        turned = sb(128, 16)
        nisa.dma_transpose(turned[there], tile[there])
        nisa.dma_copy(tile[there], rows_of(table, 16, at))
        back, last = new(16, 16), new(16, 16)
        nisa.dma_copy(back, turned[there])
        nisa.dma_copy(last, tile[there])
        return back, last

    x = normal(64, 16)
    back, last = simulated(body, x, indices(range(15, -1, -1)))
    np.testing.assert_array_equal(back, 2 * x[0:16].T)
    np.testing.assert_array_equal(last, x[15::-1])
    refused("start-partition", lambda t: nisa.tensor_copy(sb(128, 16)[there], t[0:16]), T)


def test_a_table_that_begins_inside_its_tensor_ends_with_it():
    """Rows 2 to 7 of 8 are six rows; a count of its own makes them fewer."""

    def body(t, at):
        table = hbm(8, 16)
        nisa.dma_copy(table, t[0:8])
        view = table.ap([[16, 1], [1, 16]], offset=32, vector_offset=at)
        tile = new(1, 16)
        nisa.dma_copy(tile, view)
        return tile

    x = np.arange(64 * 16, dtype=np.float32).reshape(64, 16)
    np.testing.assert_array_equal(simulated(body, x, indices([5]))[0], x[7])
    refused("oob", body, x, indices([6]))


def test_random_words_go_on_where_they_stopped_each_lane_for_itself():
    """64 words in one draw are 32 and 32; other partitions have others, and do not move on."""
    gpsimd = nisa.engine.gpsimd

    def body(t):
        whole, parts, again = (new(64, n, dtype=U32) for n in (64, 64, 64))
        state = new(64, 6, dtype=U32)
        nisa.rand_get_state(state)
        nisa.rng(whole, engine=gpsimd)
        nisa.rand_set_state(state)
        nisa.rng(parts[:, 0:32], engine=gpsimd)
        nisa.rng(parts[:, 32:64], engine=gpsimd)
        nisa.rand_set_state(state)
        nisa.rng(again[32:64], engine=gpsimd)
        nisa.rng(again[0:32], engine=gpsimd)
        return whole, parts, again

    whole, parts, again = simulated(body, T)
    np.testing.assert_array_equal(whole, parts)
    np.testing.assert_array_equal(whole, again)
    assert len(np.unique(whole[:, 0])) == 64


@pytest.mark.parametrize("sizes", [(3, 5, 8), (8, 1, 7), (16,)])
def test_words_of_vector_engine_do_not_depend_on_how_many_are_drawn_at_once(sizes):
    def body(t):
        seed, out = new(1, 1, dtype=U32), new(1, 16, dtype=U32)
        nisa.memset(seed, 11)
        nisa.set_rng_seed(seed)
        start = 0
        for size in sizes:
            nisa.rng(out[:, start : start + size])
            start += size
        return out

    whole = simulated(lambda t: one(t), T)
    np.testing.assert_array_equal(simulated(body, T), whole)


def one(t):
    seed, out = new(1, 1, dtype=U32), new(1, 16, dtype=U32)
    nisa.memset(seed, 11)
    nisa.set_rng_seed(seed)
    nisa.rng(out)
    return out


def test_a_seed_is_its_32_bits_whatever_their_dtype():
    def body(t):
        outs = []
        for dtype, value in ((nl.float32, 1.5), (U32, 0x3FC00000), (I32, 0x3FC00000)):
            seed, out = new(1, 1, dtype=dtype), new(1, 8, dtype=U32)
            nisa.memset(seed, value)
            nisa.set_rng_seed(seed)
            nisa.rng(out)
            outs.append(out)
        return tuple(outs)

    a, b, c = simulated(body, T)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(b, c)


def test_nonzero_pads_with_the_value_that_is_asked_for_on_every_16th_partition():
    x = np.zeros((32, 4), np.int32)
    x[16, 1] = x[16, 3] = 5

    def body(t):
        out = new(32, 5, dtype=I32)
        nisa.nonzero_with_count(out, t, index_offset=10, padding_val=-7)
        first = sb(32, 5, dtype=I32)
        nisa.tensor_copy(first[0:1], out[0:1])
        nisa.dma_copy(first[16:17], out[16:17])
        return first

    got = simulated(body, x)
    np.testing.assert_array_equal(got[16], [11, 13, -7, -7, 2])
    np.testing.assert_array_equal(got[0], [-7, -7, -7, -7, 0])

    def beside(t):
        out = new(32, 5, dtype=I32)
        nisa.nonzero_with_count(out, t)
        nisa.dma_copy(new(1, 5, dtype=I32), out[1:2])
        return t

    refused("uninitialized-read", beside, x)


def test_the_mean_of_partitions_is_no_sum():
    x = normal(64, 5)

    def body(t):
        out = new(1, 5)
        nisa.tensor_partition_reduce(out, nl.average, t)
        return out

    np.testing.assert_allclose(simulated(body, x)[0], x.mean(0), rtol=1e-5, atol=1e-6)


def test_of_equal_values_the_lower_index_is_chosen_first():
    def body(t):
        values, found = new(16, 4, dtype=BF), new(16, 4, dtype=U32)
        nisa.topk(values, found, t, 600)
        return values, found

    x = np.zeros((16, 38), BF16)
    x[3, 2] = 1  # element 35
    values, found = simulated(body, x)
    np.testing.assert_array_equal(f32(values), np.tile([0, 0, 0, 1], (16, 1)))
    np.testing.assert_array_equal(found, np.tile([2, 1, 0, 35], (16, 1)))


def test_lists_of_a_gather_run_over_partitions_first():
    x = np.tile(np.arange(64, dtype=np.float32), (16, 1))
    index = np.arange(32, dtype=np.uint16).reshape(16, 2)

    def body(t, at):
        out = new(16, 32)
        nisa.local_gather(out, t, at)
        return out

    want = np.tile(np.r_[index[:, 0], index[:, 1]].astype(np.float32), (16, 1))
    np.testing.assert_array_equal(simulated(body, x, index), want)


def test_sums_of_scalars_do_not_read_what_they_have_overwritten():
    """The second operand lies in the destination: it is read before the first step is stored."""
    x = normal(32, 8)

    def body(t):
        scale = new(32, 1)
        nisa.tensor_copy(scale, t[:, 0:1])
        out = new(32, 8)
        nisa.tensor_scalar(out, t, nl.multiply, 2.0, op1=nl.add, operand1=scale)
        nisa.tensor_scalar(t, t, nl.multiply, 2.0, op1=nl.add, operand1=t[:, 0:1])
        both = new(32, 16)
        nisa.tensor_copy(both[:, 0:8], out)
        nisa.tensor_copy(both[:, 8:16], t)
        return both

    got = simulated(body, x)
    np.testing.assert_allclose(got[:, 0:8], 2 * x + x[:, 0:1], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(got[:, 0:8], got[:, 8:16])


def test_tf32_results_and_strided_ones_are_rounded_and_placed():
    x = np.full((4, 8), 1 + 2.0**-12, np.float32)

    def body(t):
        narrow, holes = new(4, 8, dtype=nl.tfloat32), sb(4, 8, 2)
        nisa.tensor_scalar(narrow, t, nl.multiply, 1.0)
        nisa.tensor_scalar(holes[:, :, 1], t, nl.multiply, 2.0)
        flat = new(4, 16)
        nisa.tensor_copy(flat, holes)
        wide = new(4, 8)
        nisa.tensor_copy(wide, narrow)
        return wide, flat

    wide, flat = simulated(body, x)
    np.testing.assert_array_equal(wide, np.ones((4, 8)))
    want = np.zeros((4, 16), np.float32)
    want[:, 1::2] = 2 * x
    np.testing.assert_array_equal(flat, want)


@pytest.mark.parametrize(("value", "code"), [(17.0, 16.0), (17.0 + 2.0**-12, 18.0), (19.0, 20.0)])
def test_fp8_is_rounded_once(value, code):
    """Between 16 and 18 lies 17: a hair above it is nearer to 18."""
    x = np.full((1, 4), value, np.float32)

    def body(t):
        out = new(1, 4, dtype=nl.float8_e4m3)
        nisa.tensor_copy(out, t)
        return out

    np.testing.assert_array_equal(f32(simulated(body, x)), np.full((1, 4), code))


@pytest.mark.parametrize(
    ("value", "near"), [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (2.4999998, 2)]
)
def test_halves_become_even_integers(value, near):
    def body(t):
        out = new(1, 4, dtype=I32)
        nisa.tensor_copy(out, t)
        return out

    got = simulated(body, np.full((1, 4), value, np.float32))
    np.testing.assert_array_equal(got, np.full((1, 4), near))


@pytest.mark.parametrize("value", [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-11 + 2.0**-20])
def test_tf32_ties_go_to_even(value):
    def body(t):
        out, wide = new(1, 4, dtype=nl.tfloat32), new(1, 4)
        nisa.tensor_copy(out, t)
        nisa.tensor_copy(wide, out)
        return wide

    want = np.round(value * 1024) / 1024  # NumPy rounds halves to even, too
    got = simulated(body, np.full((1, 4), value, np.float32))
    np.testing.assert_array_equal(got, np.full((1, 4), want, np.float32))


def test_a_group_in_another_partition_range_of_a_bank_is_another_group():
    """Two groups at once are doubtful in one place of a bank, not in two rows of tiles."""

    def body(t, second):
        bank = ps(128, 16)
        st = sb(64, 32)
        upper = bank[second : second + 32]
        nisa.nc_matmul(bank[0:32], st, t, accumulate=False)
        nisa.nc_matmul(upper[:, 0:8] if second == 0 else upper, st, t[:, : 8 if not second else 16],
                       accumulate=False)  # fmt: skip
        nisa.nc_matmul(bank[0:32], st, t, accumulate=True)
        return t

    _, run = record(lambda t: body(t, 64), T)
    assert not [w for w in run.cores[0].warnings if "another group" in w]


@pytest.mark.parametrize("width", [4, 16])
def test_a_selection_is_from_as_many_elements_as_it_writes(width):
    def body(t, n):
        tile = new(64, 8)
        nisa.affine_select(tile, [[1, 8]], 1, t[:, 0:n], -1.0, nl.greater_equal)
        return tile

    simulated(lambda t: body(t, 8), T)
    refused("element-count", lambda t: body(t, width), T)
