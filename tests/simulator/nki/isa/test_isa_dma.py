"""DMA: copies, gathers, scatters, transposes, sums; registers."""

from __future__ import annotations

import numpy as np
import pytest
from isa_helpers import BF16, F16, FLOATS, close, f32, in_psum, integers, normal, refused, sb
from told import tells

from nsa_neuron import simulator
from nsa_neuron.simulator import UninitializedReadError
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

SKIP = nisa.oob_mode.skip
HW, SW, NONE = (nisa.dge_mode[n] for n in ("hwdge", "swdge", "none"))


def run(kernel, *arrays, **options):
    return simulator.simulate(kernel, **options)(*arrays)


def loaded(tensor, dtype=None):
    tile = nl.ndarray(tensor.shape, dtype or tensor.dtype)
    nisa.dma_copy(tile, tensor)
    return tile


def result(shape, dtype=nl.float32):
    return nl.ndarray(shape, dtype, buffer=nl.shared_hbm)


@pytest.mark.parametrize("source", [*FLOATS, np.dtype(np.int32)])
@pytest.mark.parametrize("target", [nl.float32, nl.bfloat16, nl.int32])
def test_dma_copy_casts_and_pairs_elements_in_order(source, target):
    x = integers(6, 4, low=-9, high=9).astype(source)

    def kernel(t):
        out = result((4, 2, 3), target)
        tile = nl.ndarray((3, 8), t.dtype)
        nisa.dma_copy(tile, t)
        nisa.dma_copy(out, tile)
        return out

    np.testing.assert_array_equal(f32(run(kernel, x)), f32(x).reshape(4, 2, 3))


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.int32])
@pytest.mark.parametrize("target", ["same", nl.bfloat16])
def test_gather(dtype, target):
    x = integers(50, 3, 4, high=200).astype(dtype)
    index = integers(20, 1, high=50, dtype=np.uint32)

    def kernel(table, idx):
        tile = nl.ndarray((20, 12), table.dtype if target == "same" else target)
        rows = loaded(idx)
        src = table.ap([[12, 20], [1, 12]], vector_offset=rows, indirect_dim=0)
        nisa.dma_copy(tile, src, dge_mode=SW)
        return _out(tile)

    want = f32(x).reshape(50, 12)[index[:, 0]]
    close(f32(run(kernel, x, index)), want, BF16)


def _out(tile):
    out = result(tile.shape, tile.dtype)
    nisa.dma_copy(out, tile)
    return out


def test_scatter_with_skipped_rows():
    x = normal(8, 5)
    index = np.array([[3], [99], [0], [11], [7], [200], [5], [1]], np.int32)

    def kernel(rows, idx, table):
        dst = table.vector_select(0, loaded(idx))
        nisa.dma_copy(dst, loaded(rows), oob_mode=SKIP)

    table = np.zeros((12, 5), np.float32)
    run(kernel, x, index, table)
    want = np.zeros((12, 5), np.float32)
    valid = index[:, 0] < 12
    want[index[valid, 0]] = x[valid]
    np.testing.assert_array_equal(table, want)


def test_a_skipping_gather_keeps_rows_and_leaves_unwritten_ones_unwritten():
    x = normal(4, 3)
    index = np.array([[1], [9], [3]], np.int32)

    def kernel(table, idx, fill):
        tile = nl.ndarray((3, 3), nl.float32)
        if fill:
            nisa.memset(tile, -1.0)
        nisa.dma_copy(tile, table.vector_select(0, loaded(idx)), oob_mode=SKIP)
        return _out(tile)

    want = np.stack([x[1], np.full(3, -1), x[3]])
    np.testing.assert_array_equal(run(kernel, x, index, True), want)
    with pytest.raises(UninitializedReadError, match=r"3 of 9 .* first \(1, 0\)"):
        run(kernel, x, index, False)


@pytest.mark.parametrize("place", [0, 5, 6, -1])
def test_a_scalar_offset_is_checked_or_skipped(place):
    x = normal(6, 4)
    start = np.array([[place]], np.int32)

    def kernel(table, idx, skip):
        tile = nl.full((1, 4), 9.0, nl.float32)
        register = nisa.register_alloc()
        nisa.register_load(register, loaded(idx))
        nisa.dma_copy(
            tile,
            table.ap([[4, 1], [1, 4]], scalar_offset=register),
            oob_mode=SKIP if skip else nisa.oob_mode.error,
        )
        return _out(tile)

    inside = 0 <= place < 6
    want = x[place : place + 1] if inside else np.full((1, 4), 9)
    np.testing.assert_array_equal(run(kernel, x, start, True), want)
    if not inside:
        with pytest.raises(simulator.OutOfBoundsError):
            run(kernel, x, start, False)


AXES = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}


@pytest.mark.parametrize("dtype", [np.float32, BF16, F16, np.int32])
@pytest.mark.parametrize("shape", [(16, 7), (5, 3, 9), (4, 2, 3, 8)])
@pytest.mark.parametrize("explicit", [False, True])
def test_dma_transpose(dtype, shape, explicit):
    x = integers(*shape, high=200).astype(dtype)
    axes = AXES[len(shape)]
    turned = tuple(shape[a] for a in axes)

    def kernel(t):
        from_hbm, from_sbuf = nl.ndarray(turned, t.dtype), nl.ndarray(turned, t.dtype)
        nisa.dma_transpose(from_hbm, t, axes if explicit else None)
        nisa.dma_transpose(from_sbuf, loaded(t))
        return _out(from_hbm), _out(from_sbuf)

    for got in run(kernel, x):
        np.testing.assert_array_equal(f32(got), f32(x).transpose(axes))


@pytest.mark.parametrize("shape", [(16, 100), (8, 2, 50), (4, 3, 4, 16)])
def test_hwdge_transposes(shape):
    x = normal(*shape, dtype=BF16)
    axes = AXES[len(shape)]

    def kernel(t):
        tile = nl.ndarray(tuple(shape[a] for a in axes), t.dtype)
        nisa.dma_transpose(tile, t, dge_mode=HW)
        return _out(tile)

    np.testing.assert_array_equal(f32(run(kernel, x)), f32(x).transpose(axes))


@pytest.mark.parametrize(("rows", "columns", "used"), [(32, 1, 32), (128, 2, 240), (16, 1, 16)])
@pytest.mark.parametrize("rank", [2, 4])
def test_gathering_transposes_read_indices_by_columns(rows, columns, used, rank):
    inner = (24,) if rank == 2 else (3, 1, 8)
    x = normal(300, *inner, dtype=BF16)
    index = integers(rows, columns, high=300, dtype=np.uint32)
    axes = AXES[rank]
    shape = (used, *inner)

    def kernel(table, idx):
        pattern = [[24, used], [1, 24]] if rank == 2 else [[24, used], [8, 3], [8, 1], [1, 8]]
        src = table.ap(pattern, vector_offset=loaded(idx), indirect_dim=0)
        tile = nl.ndarray(tuple(shape[a] for a in axes), table.dtype)
        nisa.dma_transpose(tile, src, axes)
        return _out(tile)

    want = f32(x)[index.T.reshape(-1)[:used]].transpose(axes)
    np.testing.assert_array_equal(f32(run(kernel, x, index)), want)


def test_a_gathering_transpose_that_skips_keeps_those_columns():
    x = normal(20, 6, dtype=BF16)
    index = integers(16, 1, high=20, dtype=np.uint32)
    index[[2, 9]] = 1000

    def kernel(table, idx):
        tile = nl.full((6, 16), 5.0, table.dtype)
        src = table.ap([[6, 16], [1, 6]], vector_offset=loaded(idx))
        nisa.dma_transpose(tile, src, oob_mode=SKIP)
        return _out(tile)

    want = np.full((6, 16), 5.0, np.float32)
    valid = index[:, 0] < 20
    want[:, valid] = f32(x)[index[valid, 0]].T
    np.testing.assert_array_equal(f32(run(kernel, x, index)), want)


@pytest.mark.parametrize("count", [1, 3, 16])
@pytest.mark.parametrize("dtype", [np.float32, BF16, np.int32])
def test_dma_compute_adds_in_fp32(count, dtype):
    x = np.rint(normal(count, 10, 6) * 50).astype(dtype)

    def kernel(t):
        out = result((10, 6), nl.bfloat16)
        srcs = [loaded(t[i]) if i % 2 else t[i] for i in range(count)]
        nisa.dma_compute(out, srcs, nl.add, scales=[1.0] * count)
        return out

    close(run(kernel, x), f32(x).sum(0))


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_dma_compute_adds_to_gathered_rows(dtype):
    x, y = normal(30, 8, dtype=dtype), normal(12, 8, dtype=dtype)
    index = np.random.default_rng(0).permutation(30)[:12].astype(np.int32).reshape(12, 1)

    def kernel(table, data, idx):
        tile, rows = loaded(data), loaded(idx)
        src = table.ap([[8, 12], [1, 8]], vector_offset=rows)
        nisa.dma_compute(tile, [src, tile], nl.add)
        return _out(tile)

    close(run(kernel, x, y, index), f32(y) + f32(x)[index[:, 0]])


def test_dma_compute_scatters_sums_and_skips():
    x, y = normal(30, 8), normal(12, 8)
    index = np.random.default_rng(0).permutation(36)[:12].astype(np.int32).reshape(12, 1)

    def kernel(table, data, idx):
        rows = loaded(idx)
        dst = table.ap([[8, 12], [1, 8]], vector_offset=rows)
        nisa.dma_compute(dst, [loaded(data), dst], nl.add, oob_mode=SKIP)

    want = x.copy()
    valid = index[:, 0] < 30
    want[index[valid, 0]] += y[valid]
    run(kernel, x, y, index)
    np.testing.assert_array_equal(x, want)


def test_registers_move_load_and_store():
    x = np.array([[-7]], np.int16)

    def kernel(t):
        first, second = nisa.register_alloc(3), nisa.register_alloc()
        nisa.register_move(second, first)
        third = nisa.register_alloc(loaded(t))
        tile = nl.ndarray((1, 3), nl.int32)
        for i, register in enumerate((first, second, third)):
            nisa.register_store(tile[:, i : i + 1], register)
        return _out(tile)

    np.testing.assert_array_equal(run(kernel, x), [[3, 3, -7]])
    assert nisa.get_nc_version() == nisa.nc_version.gen3
    assert nisa.get_nc_version() < nisa.nc_version.gen4 and nisa.get_nc_sub_version() == 0


T = np.ones((32, 16), np.float32)
BF, U32 = nl.bfloat16, nl.uint32


def hbm(*shape, dtype=nl.float32):
    tensor = nl.ndarray(shape, dtype, buffer=nl.hbm)
    nisa.dma_copy(tensor, sb(1, tensor.size, dtype=dtype))
    return tensor


def _rows(table, count=16, index=None, width=None):
    index = sb(count, 1, dtype=U32) if index is None else index
    width = table.shape[1] if width is None else width
    return table.ap([[table.shape[1], count], [1, width]], vector_offset=index)


def _turn(src, dst=None, **kw):
    shape = tuple(src.shape[a] for a in AXES[len(src.shape)])
    nisa.dma_transpose(sb(*shape, dtype=src.dtype) if dst is None else dst, src, **kw)


def _moving_start(t, **kw):
    offset = sb(1, 1, dtype=nl.int32)
    nisa.dma_copy(sb(1, 16), hbm(32, 16).ap([[16, 1], [1, 16]], scalar_offset=offset), **kw)


def _gather_add(t, rows=None, **kw):
    tile = sb(16, 16)
    src = _rows(hbm(32, 16), index=rows) if rows is not None else _rows(hbm(32, 16))
    nisa.dma_compute(tile, [src, tile], kw.pop("op", nl.add), **kw)


def _unique(count=16):
    index = nl.ndarray((count, 1), U32)
    nisa.iota(index, [[0, 1]], channel_multiplier=1)
    return index


REFUSALS = [
    ("element-count", lambda t: nisa.dma_copy(sb(4, 4), t)),
    ("buffer", lambda t: nisa.dma_copy(t, in_psum(t))),
    ("generation", lambda t: nisa.dma_copy(t, t, 0)),
    ("dge", lambda t: nisa.dma_copy(t, t, engine=nisa.engine.sync)),
    ("dge", lambda t: nisa.dma_copy(t, t, dge_mode=HW, engine=nisa.engine.gpsimd)),
    ("dge", lambda t: nisa.dma_copy(sb(16, 16), _rows(hbm(32, 16)), dge_mode=HW)),
    ("dge", lambda t: nisa.dma_copy(_rows(hbm(32, 16)), _rows(hbm(32, 16)))),
    ("dge", lambda t: _moving_start(t, dge_mode=NONE)),
    ("oob", lambda t: nisa.dma_copy(sb(16, 16), _rows(hbm(8, 16), index=_unique()))),
    ("shape", lambda t: nisa.dma_copy(sb(16, 16), _rows(hbm(8, 16), index=sb(16, 2, dtype=U32)))),
    ("enum", lambda t: nisa.dma_copy(t, t, dge_mode=2)),
    ("legacy-api", lambda t: nisa.dma_copy(t, t, mask=t)),
    ("axis", lambda t: _turn(t, axes=(0, 1))),
    ("shape", lambda t: _turn(t, dst=sb(32, 16))),
    ("shape", lambda t: nisa.dma_transpose(t, sb(2, 2, 2, 2, 2))),
    ("dtype-match", lambda t: _turn(t, dst=sb(16, 32, dtype=BF))),
    ("dtype", lambda t: _turn(sb(4, 4, dtype=nl.uint8))),
    ("generation", lambda t: _turn(t, priority=1)),
    ("dge", lambda t: _turn(t, dge_mode=SW)),
    ("dge", lambda t: _turn(sb(32, 16, dtype=BF), dge_mode=HW)),
    ("dge", lambda t: _turn(sb(16, 4), dge_mode=HW)),
    ("dge", lambda t: _turn(sb(16, 130, dtype=BF), dst=hbm(130, 16, dtype=BF), dge_mode=HW)),
    ("dge", lambda t: _turn(sb(2, 4, 4, dtype=BF), dge_mode=HW)),
    ("dge", lambda t: _turn(t, oob_mode=SKIP)),
    ("buffer", lambda t: _turn(in_psum(t))),
    ("dge", lambda t: _turn(_rows(hbm(32, 16, dtype=BF)), dge_mode=HW)),
    ("dtype", lambda t: _turn(_rows(hbm(32, 16)))),
    ("dtype", lambda t: _turn(_rows(hbm(32, 16, dtype=BF), index=sb(16, 1, dtype=nl.int32)))),
    ("shape", lambda t: _turn(_rows(hbm(32, 16, dtype=BF), 24))),
    ("shape", lambda t: _turn(_rows(hbm(8, 200, dtype=BF)), dst=hbm(200, 16, dtype=BF))),
    ("shape", lambda t: _turn(_rows(hbm(32, 16, dtype=BF), index=sb(16, 2, dtype=U32)))),
    ("oob", lambda t: _turn(_rows(hbm(4, 16, dtype=BF), index=_unique()))),
    ("operator", lambda t: nisa.dma_compute(t, [t, t], nl.multiply)),
    ("value", lambda t: nisa.dma_compute(t, [t, t], nl.add, scales=[1.0, 2.0])),
    ("value", lambda t: nisa.dma_compute(t, [t, t], nl.add, scales=[1.0])),
    ("tile-size", lambda t: nisa.dma_compute(t, [t] * 17, nl.add)),
    ("tile-size", lambda t: nisa.dma_compute(t, [], nl.add)),
    ("element-count", lambda t: nisa.dma_compute(t, [t, t[:, 0:1]], nl.add)),
    ("buffer", lambda t: nisa.dma_compute(t, [t, in_psum(t)], nl.add)),
    ("usage", lambda t: nisa.dma_compute(t, t, nl.add)),
    ("value", lambda t: _gather_add(t)),
    ("value", lambda t: _gather_add(t, rows=_unique(), unique_indices=False)),
    ("value", lambda t: nisa.dma_compute(sb(16, 16), [_rows(hbm(32, 16)), sb(16, 16)], nl.add)),
    ("shape", lambda t: nisa.dma_compute(sb(16, 16), [_rows(hbm(32, 16))] * 2, nl.add)),
    ("register", lambda t: nisa.register_load(nisa.register_alloc(), t)),
    ("register", lambda t: nisa.register_load(t, t[0:1, 0:1])),
    ("register", lambda t: nisa.register_move(nisa.register_alloc(), 2**32)),
    ("register", lambda t: nisa.register_store(t, nisa.register_alloc(1))),
    ("buffer", lambda t: nisa.register_load(nisa.register_alloc(), in_psum(t)[0:1, 0:1])),
]


@pytest.mark.parametrize(
    ("rule", "body"), REFUSALS, ids=[f"{i}-{r[0]}" for i, r in enumerate(REFUSALS)]
)
def test_refusals(rule, body, request):
    tells(refused(rule, body, T), request)


def test_a_transpose_at_a_run_time_offset_can_be_skipped():
    x = normal(8, 16, 4)

    def kernel(t, idx):
        tile = nl.full((4, 16), 2.0, nl.float32)
        nisa.dma_transpose(tile, t.select(0, loaded(idx)), oob_mode=SKIP)
        return _out(tile)

    for place in (3, 8):
        want = x[place].T if place < 8 else np.full((4, 16), 2.0)
        np.testing.assert_array_equal(run(kernel, x, np.array([[place]], np.int32)), want)


def test_a_tensor_larger_than_an_hbm_stack_is_refused_before_it_is_made():
    def kernel():
        return result((2**20, 2**13))

    with pytest.raises(simulator.CapacityError) as caught:
        run(kernel)
    assert caught.value.rule == "hbm-capacity" and caught.value.value == 2**35
