"""Formulas of single instructions and transfers, each against cycles and bytes counted by hand.

Rates are those of docs/trainium2.md 3 and 6.4; ns are cycles over the engine's clock.
"""

from __future__ import annotations

import pytest
from cost_helpers import hbm, nisa, nl, only, psum, sbuf, timeline

PE, VECTOR, SCALAR, GPSIMD = 2.4, 0.96, 1.2, 1.2
BF16, FP16, U8, U16, U32, I32 = (
    nl.bfloat16, nl.float16, nl.uint8, nl.uint16, nl.uint32, nl.int32,
)  # fmt: skip


def tile(n=512, dtype=None, rows=128):
    return sbuf((rows, n), dtype)


def predicated(src):
    return lambda: nisa.tensor_copy_predicated(tile(), src((128, 512)), tile(512, U8))


ON_VECTOR = {
    "memset of 16 bits": (lambda: nisa.memset(tile(512, BF16), 0.0), 256),
    "memset of 32 bits": (lambda: nisa.memset(tile(), 0.0), 512),
    "scan": (
        lambda: nisa.tensor_tensor_scan(tile(), tile(), tile(), 0.0, nl.multiply, nl.add),
        2 * 512,
    ),
    "reciprocal": (lambda: nisa.reciprocal(tile(), tile()), 8 * 512),
    "bn_stats": (lambda: nisa.bn_stats(tile(6), tile()), 512),
    "bn_aggr": (lambda: nisa.bn_aggr(tile(2), tile(48)), 13 / 3 * 48),
    "predicated, both in SBUF": (predicated(sbuf), 2 * 512),
    "predicated, one in PSUM": (predicated(psum), 512),
    "range_select": (
        lambda: nisa.range_select(tile(), tile(), nl.greater_equal, nl.less, tile(1), tile(1)),
        512,
    ),
    "tensor_scalar_reduce": (
        lambda: nisa.tensor_scalar_reduce(tile(), tile(), nl.add, 1.0, nl.add, tile(1)),
        512 + 64,
    ),
    "tensor_scalar_reduce, nothing read out": (
        lambda: nisa.tensor_scalar_reduce(tile(), tile(), nl.add, 1.0, nl.add),
        512,
    ),
    "scalar_tensor_tensor": (
        lambda: nisa.scalar_tensor_tensor(tile(), tile(), nl.multiply, 2.0, nl.add, tile()),
        512,
    ),
    "scalar_tensor_tensor of 16 bits": (
        lambda: nisa.scalar_tensor_tensor(
            tile(512, BF16), tile(512, BF16), nl.multiply, 2.0, nl.add, tile(512, BF16)
        ),
        256,
    ),
    "one of two inputs wide": (
        lambda: nisa.tensor_tensor(tile(512, BF16), tile(512, BF16), tile(), nl.add),
        512,
    ),
    "copy into a strided tile of 16 bits": (
        lambda: nisa.tensor_copy(sbuf((128, 512, 2), BF16)[:, :, 0], tile(512, BF16)),
        256,
    ),
    "copy into 32 bits": (lambda: nisa.tensor_copy(tile(), tile(512, BF16)), 512),
    "divide": (lambda: nisa.tensor_tensor(tile(), tile(), tile(), nl.divide), 9 * 512),
    "transpose of 32 x 32": (
        lambda: nisa.nc_transpose(
            tile(32, None, 32), tile(32, None, 32), engine=nisa.engine.vector
        ),
        64,
    ),
}


@pytest.mark.parametrize("name", ON_VECTOR)
def test_vector_engine(name):
    body, work = ON_VECTOR[name]
    t = timeline(body)
    assert t.lanes[t.lane[0]] == "vector"
    assert t.free[0] - t.issue[0] == pytest.approx((max(64, work) + 60) / VECTOR)
    assert t.end[0] - t.issue[0] == pytest.approx(((32 if work == 64 else work) + 152) / VECTOR)


ON_SCALAR = {
    "short": (lambda: nisa.activation(tile(8), nl.copy, tile(8)), 8),
    "wide step": (lambda: nisa.activation(tile(64), nl.copy, sbuf((128, 64, 8))[:, :, 0]), 2 * 64),
    "a result read out": (
        lambda: nisa.activation(
            tile(), nl.copy, tile(), reduce_op=nl.add, reduce_res=tile(1),
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        ),
        512 + 64,
    ),
    "no result read out": (lambda: nisa.activation(tile(), nl.copy, tile()), 512),
    "16 bits": (lambda: nisa.activation(tile(512, BF16), nl.copy, tile(512, BF16)), 512),
    "tensor_copy": (lambda: nisa.tensor_copy(tile(), tile(), engine=nisa.engine.scalar), 512),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_SCALAR)
def test_scalar_engine(name):
    body, work = ON_SCALAR[name]
    t = timeline(body)
    assert t.lanes[t.lane[0]] == "scalar"
    assert t.free[0] - t.issue[0] == pytest.approx((max(64, work) + 60) / SCALAR)
    assert t.end[0] - t.issue[0] == pytest.approx((work + 190) / SCALAR)


GATHERED = {
    "iota": (lambda: nisa.iota(tile(256, I32), [[1, 256]]), 256),
    "affine_select": (
        lambda: nisa.affine_select(tile(256), [[1, 256]], 1, tile(256), 0.0),
        256,
    ),
    "rsqrt": (
        lambda: nisa.tensor_scalar(tile(), tile(), nl.rsqrt, 0.0, engine=nisa.engine.gpsimd),
        4 * 512,
    ),
    "power": (lambda: nisa.tensor_tensor(tile(), tile(), tile(), nl.power), 2 * 512),
    "integers": (
        lambda: nisa.tensor_tensor(tile(512, I32), tile(512, I32), tile(512, I32), nl.add),
        2 * 512,
    ),
    "across partitions": (
        lambda: nisa.tensor_partition_reduce(tile(512, None, 1), nl.add, tile()),
        8 * 512,
    ),
    "nc_n_gather": (lambda: nisa.nc_n_gather(tile(64), tile(), tile(64, U32)), 8 * 512),
    "topk": (
        lambda: nisa.topk(tile(8, BF16), tile(8, U32), tile(64, BF16), 1000),
        4 * 1000 + 8,
    ),
    "divide": (
        lambda: nisa.tensor_tensor(tile(), tile(), tile(), nl.divide, engine=nisa.engine.gpsimd),
        18 * 512,
    ),
    "random bits": (lambda: nisa.rng(tile(512, U32), engine=nisa.engine.gpsimd), 2 * 512),
}


@pytest.mark.parametrize("name", GATHERED)
def test_gpsimd_engine(name):
    body, work = GATHERED[name]
    t = timeline(body)
    assert t.lanes[t.lane[0]] == "gpsimd"
    assert t.end[0] == t.free[0] == pytest.approx((150 + work) / GPSIMD)


def transposing(size, dtype=None):
    return lambda: nisa.nc_transpose(psum(size[::-1], dtype), sbuf(size, dtype))


def fp8_pairs(m):
    """[128, 2, m] by [128, 2, 16]: so few columns that loading the m stationary ones shows."""

    def body():
        st, mv = sbuf((128, 2, m), nl.float8_e4m3), sbuf((128, 2, 16), nl.float8_e4m3)
        nisa.nc_matmul(psum((m, 16)), st, mv, perf_mode=nisa.matmul_perf_mode.double_row)

    return body


@pytest.mark.parametrize(
    ("body", "cycles", "flops", "columns"),
    [
        (transposing((128, 128), BF16), 128 + 6, 0, 128),
        (transposing((64, 128), BF16), 64 + 6, 0, 64),
        (transposing((32, 128)), max(64, 2 * 32, 128) + 6, 0, 32),
        (fp8_pairs(128), 64 + 6, 2 * 256 * 128 * 16, 16),
    ],
)
def test_tensor_engine(body, cycles, flops, columns):
    """A transpose streams its partitions as columns; loading a column takes half a cycle a row."""
    t = timeline(body)
    assert t.free[0] == pytest.approx(cycles / PE)
    assert (t.costs[0].flops, t.costs[0].pe_columns) == (flops, columns)


def test_a_bank_is_shared_by_who_reads_it_and_who_writes_it():
    def body():
        bank = psum((128, 512))
        nisa.tensor_copy(bank, tile())
        nisa.activation(tile(), nl.copy, bank)

    def apart():
        one, two = psum((128, 512)), psum((128, 512))
        nisa.activation(one, nl.copy, tile())
        nisa.tensor_copy(tile(), two, engine=nisa.engine.vector)

    assert timeline(body, semaphore=0.0, vector_latency=0.0).issue[1] == pytest.approx(572 / VECTOR)
    assert timeline(apart).issue[1] == 0


def test_a_bank_is_free_again_after_the_interval_of_its_user():
    """Half of the overlap serialises: 572 cycles less the wait of 100 ns, halved."""

    def body():
        bank = psum((128, 512))
        nisa.tensor_copy(tile(), bank, engine=nisa.engine.vector)
        nisa.activation(tile(), nl.copy, bank)

    t = timeline(body, psum_bank_share=0.5)
    assert t.issue[1] == pytest.approx(0.5 * 572 / VECTOR)
    assert t.notes[1] == {"psum-bank": pytest.approx(0.5 * 572 / VECTOR)}


def test_a_bank_of_addressed_tensors_is_the_same_for_all_of_them():
    def body(byte, columns=slice(0, 512)):
        one = nl.ndarray((128, 512), nl.float32, buffer=nl.psum, address=(0, 0))
        two = nl.ndarray((128, 512), nl.float32, buffer=nl.psum, address=(0, byte))
        nisa.tensor_copy(tile(), one, engine=nisa.engine.vector)
        nisa.activation(tile(columns.stop - columns.start), nl.copy, two[:, columns])

    busy = timeline(lambda: body(0)).issue[1]
    assert busy == pytest.approx(572 / VECTOR)
    assert timeline(lambda: body(2048)).issue[1] == 0
    wide = nl.float32

    def across():
        both = nl.ndarray((128, 1024), wide, buffer=nl.psum, address=(0, 0))
        second = nl.ndarray((128, 512), wide, buffer=nl.psum, address=(0, 2048))
        nisa.tensor_copy(tile(1024), both, engine=nisa.engine.vector)
        nisa.activation(tile(), nl.copy, second)

    assert timeline(across).issue[1] == pytest.approx(1084 / VECTOR)


def test_banks_of_two_cores_are_apart():
    def body():
        bank = nl.ndarray((128, 512), nl.float32, buffer=nl.psum, address=(0, 0))
        if nl.program_id(0) == 0:
            nisa.tensor_copy(tile(), bank, engine=nisa.engine.vector)
        else:
            nisa.activation(tile(), nl.copy, bank)

    assert list(timeline(body, lnc=2).issue) == [0, 0]


# DMA: 2 ns per descriptor, 4 per run in HBM, 32 bytes per ns and engine, 100 to complete.
ROUND = {
    "dma_trigger": 50.0, "dma_start": 800.0, "dma_start_hwdge": 1000.0, "dma_completion": 100.0,
    "dma_descriptor": 2.0, "dma_hbm_run": 4.0, "dma_rate": 32.0, "hbm_stack": 1e6,
    "dma_transpose": 0.5, "dma_transpose_sbuf": 0.25, "dma_transpose_other": 0.125,
    "dma_trigger_swdge": 300.0, "dma_descriptor_swdge": 10.0, "dma_run_time": 1600.0,
    "dma_collective": 0.5,
}  # fmt: skip


def transfer(body, **changes):
    t = timeline(body, **{**ROUND, **changes})
    k = next(k for k, cost in enumerate(t.costs) if cost.transfer)
    return t, k, t.costs[k].transfer


def whole(x, start=800.0):
    """Ns from the trigger to the end."""
    return start + max(time for _, time in x.parts) + 100


def gathered(table_shape=(1000, 256), scatter=False, rows=128):
    index = sbuf((rows, 1), I32)
    table = hbm(table_shape, BF16)
    view = table.ap([[table_shape[1], rows], [1, 256]], vector_offset=index)
    inside = sbuf((rows, 256), BF16)
    nisa.dma_copy(*((view, inside) if scatter else (inside, view)))


@pytest.mark.parametrize("scatter", [False, True])
def test_rows_by_index_are_never_neighbours(scatter):
    """128 rows of 512 bytes of a matrix without holes; the index is no data that is moved."""
    t, k, x = transfer(lambda: gathered(scatter=scatter))
    assert (x.descriptors, x.hbm_runs, x.row_bytes) == (128, 128, 512)
    assert x.nbytes == x.hbm_bytes == 128 * 512
    assert x.parts == tuple((e, 8 * 2 + 8 * 4 + 8 * 512 / 32) for e in range(16))
    assert t.free[k] - t.issue[k] == 300 + 128 * 10  # no run-time address beside the indices
    assert x.guesses == ("dma_trigger_swdge", "dma_descriptor_swdge")
    assert t.end[k] - t.issue[k] == whole(x)


def test_rows_by_index_of_one_row_for_each_of_sixteen_partitions():
    _, _, x = transfer(lambda: gathered(rows=16))
    assert x.parts == tuple((e, 8 * 2 + 8 * 4 + 8 * 512 / 32) for e in range(2))
    assert x.uniform == 0  # two engines are not all


def test_pieces_of_two_patterns_end_where_either_does():
    """Rows of 96 elements, one side in runs of 32, the other of 48: cut at 32, 48, 64, 96."""

    def body():
        to = sbuf((1, 3, 40))[:, :, 0:32]
        of = hbm((1, 2, 60))[:, :, 0:48]
        nisa.dma_copy(to, of)

    _, _, x = transfer(body)
    assert (x.descriptors, x.hbm_runs, x.row_bytes) == (4, 2, 96)
    assert x.parts == ((0, 4 * 2 + 2 * 4 + 384 / 32),)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_each_source_of_a_sum_is_moved(count):
    def body():
        nisa.dma_compute(tile(512), [hbm((128, 512)) for _ in range(count)], nl.add)

    _, _, x = transfer(body)
    moved = 128 * 2048
    assert (x.descriptors, x.row_bytes, x.nbytes) == (128 * count, 2048, moved)
    assert (x.hbm_bytes, x.hbm_runs) == (count * moved, count)
    per_engine = 8 * count * 2 + max(1, count / 16) * 4 + count * 8 * 2048 / 32
    assert x.parts == tuple((e, per_engine) for e in range(16))


def test_rows_that_are_added_to_by_index_are_read_and_written():
    def body():
        index, table = sbuf((128, 1), I32), hbm((1000, 256))
        view = table.ap([[256, 128], [1, 256]], vector_offset=index)
        nisa.dma_compute(view, [tile(256), view], nl.add)

    _, _, x = transfer(body)
    assert (x.nbytes, x.hbm_bytes) == (128 * 1024, 2 * 128 * 1024)
    assert x.descriptors == 2 * 128  # one for each source; the index is none


@pytest.mark.parametrize(
    ("size", "of", "share", "guess"),
    [
        ((128, 128), hbm, 0.5, ()),
        ((128, 128), sbuf, 0.25, ()),
        ((16, 128), hbm, 0.5, ()),
        ((128, 64), hbm, 0.125, ("dma_transpose_other",)),
        ((24, 128), hbm, 0.125, ("dma_transpose_other",)),
        ((48, 128), sbuf, 0.25, ()),
    ],
)
def test_transposes_reach_a_share_of_the_rate(size, of, share, guess):
    """Friendly: into 128 partitions, 16 columns at a time."""
    _, _, x = transfer(lambda: nisa.dma_transpose(sbuf(size[::-1], BF16), of(size, BF16)))
    _, _, full = transfer(
        lambda: nisa.dma_transpose(sbuf(size[::-1], BF16), of(size, BF16)),
        dma_transpose=1.0, dma_transpose_sbuf=1.0, dma_transpose_other=1.0,
    )  # fmt: skip
    bytes_ = size[0] * size[1] * 2 / len(x.parts)
    for (_, slow), (_, fast) in zip(x.parts, full.parts, strict=True):
        assert slow - fast == pytest.approx(bytes_ / 32 * (1 / share - 1))
    assert x.guesses == guess


def test_hardware_descriptors_begin_later():
    def body():
        nisa.dma_copy(tile(64), hbm((128, 64)), dge_mode=nisa.dge_mode.hwdge)

    t, k, x = transfer(body)
    assert t.begin[k] - t.issue[k] == 1000
    assert t.end[k] == whole(x, 1000)
    assert t.free[k] - t.issue[k] == 50 and x.guesses == ()


@pytest.mark.parametrize("rows", [8, 128])
def test_software_descriptors_of_a_run_time_address_take_what_takes_longer(rows):
    """8 descriptors are made in 380 ns, 128 in 1580; a run-time address takes 1500 at least."""

    def body(dynamic):
        table = hbm((64, rows, 64))
        index = sbuf((1, 1), I32)
        view = (
            table.ap([[64, rows], [1, 64]], scalar_offset=index, indirect_dim=0)
            if dynamic
            else table[0]
        )
        nisa.dma_copy(sbuf((rows, 64)), view, dge_mode=nisa.dge_mode.swdge)

    made = 300 + 10 * rows
    t, k, x = transfer(lambda: body(True), dma_run_time=1500.0)
    assert t.free[k] - t.issue[k] == max(made, 1500)
    assert ("dma_run_time" in x.guesses) == (made < 1500)
    t, k, x = transfer(lambda: body(False), dma_run_time=1500.0)
    assert t.free[k] - t.issue[k] == made and "dma_run_time" not in x.guesses


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_between_hbm_tensors_pieces_are_dealt_out_evenly(rows):
    _, _, x = transfer(lambda: nisa.dma_copy(hbm((rows, 256))[:, 0:128], hbm((rows, 128))))
    used = min(16, rows)
    assert (x.descriptors, x.hbm_runs) == (rows, rows + 1)
    each = rows / used * 2 + (rows + 1) / used * 4 + rows * 512 / used / 32
    assert [e for e, _ in x.parts] == list(range(used))
    assert [time for _, time in x.parts] == pytest.approx([each] * used)


def test_a_tile_across_two_engines_shares_by_partitions():
    """Partitions 32 to 44: eight on engine 4, four on engine 5; one run in HBM for each."""
    _, _, x = transfer(lambda: nisa.dma_copy(sbuf((128, 64))[32:44], hbm((12, 64))))
    assert dict(x.parts) == pytest.approx(
        {4: 8 * 2 + 4 + 8 * 256 / 32, 5: 4 * 2 + 4 + 4 * 256 / 32}
    )


def test_a_copy_on_chip_has_no_runs_in_hbm():
    _, _, x = transfer(lambda: nisa.dma_copy(tile(64), tile(64)))
    assert (x.hbm_bytes, x.hbm_runs) == (0, 0)
    assert x.parts == tuple((e, 8 * 2 + 8 * 256 / 32) for e in range(16))


def test_what_a_queue_frees_after_a_transfer_on_another_engine():
    """Loads, stores and copies wait in queues of their own, all triggered by SyncE."""

    def body():
        nisa.dma_copy(tile(64), hbm((128, 64)))
        nisa.dma_copy(hbm((128, 64)), tile(64))
        nisa.dma_copy(tile(64), tile(64))

    t = timeline(body, **ROUND)
    assert list(t.issue) == [0, 50, 100] and list(t.free) == [50, 100, 150]


def test_registers_cost_where_they_are_stored():
    def body():
        held = sbuf((1, 1), I32)
        nisa.register_store(held, nisa.register_alloc(3))

    t = timeline(body, register_access=700.0, run_time_operand=0.0)
    k = only(t, "register_store")
    assert t.end[k] - t.issue[k] == 700 == t.free[k] - t.issue[k]
    assert t.costs[k].guesses[0] == "register_access"


def test_a_barrier_takes_its_engine_for_a_trigger_only():
    def body():
        flag = nl.ndarray((1, 1), nl.float32, buffer=nl.shared_hbm)
        nisa.core_barrier(flag, (0, 1), engine=nisa.engine.vector)
        nisa.memset(tile(), 0.0, engine=nisa.engine.vector)

    t = timeline(body, lnc=2, dma_trigger=50.0, core_meeting=2000.0)
    assert list(t.free[[0, 2]]) == [50, 50] and list(t.end[[0, 2]]) == [2000, 2000]
    assert list(t.issue[[1, 3]]) == [50, 50]
    assert t.costs[0].guesses == ("core_meeting",)
