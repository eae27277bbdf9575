"""Instructions at the limits of their arguments: one step inside runs, one outside breaks a rule.

Limits are numbers of docs/trainium2.md 3, written here a second time.
"""

from __future__ import annotations

import numpy as np
import pytest
from isa_helpers import in_psum, new, ps, refused, sb, simulated
from told import tells

from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

BF, F8, U8, U16, U32, I8, I16, I32, TF = (
    nl.bfloat16, nl.float8_e4m3, nl.uint8, nl.uint16, nl.uint32, nl.int8, nl.int16, nl.int32,
    nl.tfloat32,
)  # fmt: skip
COMMAND, ENGINE, DGE = nisa.reduce_cmd, nisa.engine, nisa.dge_mode
DOUBLE = nisa.matmul_perf_mode.double_row
T = np.ones((64, 16), np.float32)


def hbm(*shape, dtype=nl.float32):
    tensor = nl.ndarray(shape, dtype, buffer=nl.hbm)
    flat = tensor.reshape((tensor.size // shape[-1], shape[-1]))
    for start in range(0, flat.shape[0], 128):
        rows = min(128, flat.shape[0] - start)
        nisa.dma_copy(flat[start : start + rows], sb(rows, shape[-1], dtype=dtype))
    return tensor


def counting(count, dtype=U32, columns=1):
    index = new(count, columns, dtype=dtype)
    nisa.iota(index, [[count, columns]], channel_multiplier=1)
    return index


def rows(table, count, index):
    width = table.shape[1]
    return table.ap([[width, count], [1, width]], vector_offset=index)


def activate(t, **kw):
    nisa.activation(new(64, 16), nl.exp, t, **kw)


def reduced(t, size, axis, keep):
    nisa.tensor_reduce(sb(4, keep), nl.add, sb(4, *size), axis)


def matmul(k=64, m=16, n=16, dtype=nl.float32, other=None, **kw):
    st, mv = sb(k, m, dtype=dtype), sb(k, n, dtype=other or dtype)
    nisa.nc_matmul(ps(m, n), st, mv, **kw)


def tiled(position, size, double=False):
    k, m = min(size[0], 32), min(size[1], 32)
    if double:
        st, mv = sb(k, 2, m, dtype=F8), sb(k, 2, 16, dtype=F8)
        nisa.nc_matmul(
            ps(m, 16), st, mv, tile_position=position, tile_size=size, perf_mode=DOUBLE
        )  # fmt: skip
        return
    matmul(k, m, tile_position=position, tile_size=size)


def turned(*shape, dtype=BF, on_chip=True, **kw):
    to = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}[len(shape)]
    size = tuple(shape[a] for a in to)
    dst = sb(*size, dtype=dtype) if on_chip else hbm(*size, dtype=dtype)
    nisa.dma_transpose(dst, hbm(*shape, dtype=dtype), **kw)


def gathered(count=32, columns=1, table=(64, 16), used=None, dtype=BF):
    """A transposing gather by an index tile of [count, columns]."""
    used = count * columns if used is None else used
    source = hbm(*table, dtype=dtype)
    view = source.ap(
        [[table[1], used], [1, table[1]]], vector_offset=counting(count, columns=columns)
    )
    width = table[1]
    dst = sb(width, used, dtype=dtype) if width <= 128 else hbm(width, used, dtype=dtype)
    nisa.dma_transpose(dst, view)


def shuffled(active, at, source=None, mask=None):
    whole = sb(128, 4)
    dst = new(128, 4)[at : at + active]
    src = whole[0 : source or active]
    nisa.nc_stream_shuffle(dst, src, mask or [0] * 32)


def selected(start, **kw):
    bound = sb(64, 1)
    nisa.range_select(
        new(64, 16), sb(64, 16), nl.greater_equal, nl.less, bound, bound, range_start=start, **kw
    )


def looked_up(count, columns, valid=None):
    size = 16 * columns if valid is None else valid
    index = sb(16, columns, dtype=U16)
    nisa.local_gather(new(16, size * count), sb(16, 64), index, count, valid)


def topk(n, k, rows_=16):
    columns = -(-n // 16)
    nisa.topk(new(rows_, k, dtype=BF), new(rows_, k, dtype=U32), sb(rows_, columns, dtype=BF), n)


def computed(scales=None, count=2):
    tile = sb(16, 16)
    nisa.dma_compute(new(16, 16), [tile] * count, nl.add, scales=scales)


def moved(dst, src, **kw):
    nisa.dma_copy(dst, src, **kw)


def at_run_time(side, **kw):
    index = sb(1, 1, dtype=I32)
    table = hbm(32, 16)
    view = table.ap([[16, 1], [1, 16]], scalar_offset=index)
    tile = sb(1, 16)
    nisa.dma_copy(*((view, tile) if side == "dst" else (tile, view)), **kw)


def scalar(op0, operand0, op1=None, operand1=None, dtype=nl.float32, **kw):
    nisa.tensor_scalar(new(64, 16, dtype=dtype), sb(64, 16, dtype=dtype), op0, operand0,
                       op1=op1, operand1=operand1, **kw)  # fmt: skip


def two_psum(instruction, both):
    a, b = in_psum(sb(64, 16)), in_psum(sb(64, 16)) if both else sb(64, 16)
    if instruction == "stt":
        nisa.scalar_tensor_tensor(new(64, 16), a, nl.add, 1.0, nl.add, b)
    elif instruction == "scan":
        nisa.tensor_tensor_scan(new(64, 16), a, b, 0.0, nl.add, nl.add)
    elif instruction == "predicated":
        mask = in_psum(sb(64, 16, dtype=U8)) if both else sb(64, 16, dtype=U8)
        nisa.tensor_copy_predicated(sb(64, 16), a, mask)
    elif instruction == "select":
        mask = in_psum(sb(64, 16, dtype=U8)) if both else sb(64, 16, dtype=U8)
        nisa.select_reduce(new(64, 16), mask, a, 0.0)
    else:
        nisa.tensor_tensor(new(64, 16), a, b, nl.add)


# rule: inside, outside
LIMITS = [
    ("dtype", lambda t: activate(t, bias=sb(64, 1, dtype=BF)),
     lambda t: activate(t, bias=sb(64, 1, dtype=TF))),
    ("dtype", lambda t: activate(t, scale=sb(64, 1)),
     lambda t: activate(t, scale=sb(64, 1, dtype=TF))),
    ("operator", lambda t: activate(t, reduce_cmd=COMMAND.reset),
     lambda t: activate(t, reduce_cmd=COMMAND.reduce)),
    ("operator", lambda t: activate(t, reduce_op=nl.add, reduce_cmd=COMMAND.reset_reduce),
     lambda t: activate(t, reduce_cmd=COMMAND.reset_reduce)),
    *(("value", lambda t, d=d, v=v: nisa.memset(new(4, 4, dtype=d), v),
       lambda t, d=d, v=v, s=s: nisa.memset(new(4, 4, dtype=d), v + s))
      for d, v, s in ((I8, 127, 1), (I8, -128, -1), (U8, 255, 1), (U8, 0, -1), (I16, 32767, 1),
                      (U16, 65535, 1), (I32, 2**31 - 1, 1), (I32, -(2**31), -1),
                      (U32, 2**32 - 1, 1))),
    ("value", lambda t: nisa.memset(new(4, 4, dtype=I32), 1),
     lambda t: nisa.memset(new(4, 4, dtype=I32), 1.0)),
    ("engine", lambda t: nisa.tensor_tensor(new(64, 16), t, t, nl.power, engine=ENGINE.gpsimd),
     lambda t: nisa.tensor_tensor(new(64, 16), t, t, nl.power, engine=ENGINE.vector)),
    *(("psum-inputs", lambda t, w=w: two_psum(w, False), lambda t, w=w: two_psum(w, True))
      for w in ("stt", "scan", "predicated", "select", "tensor_tensor")),
    ("value", lambda t: nisa.tensor_scalar_reduce(new(64, 16), t, nl.add, 1.0, nl.add,
                                                  reduce_cmd=COMMAND.load_reduce, reduce_init=2.0),
     lambda t: nisa.tensor_scalar_reduce(new(64, 16), t, nl.add, 1.0, nl.add, reduce_init=2.0)),
    ("value", lambda t: nisa.tensor_scalar_reduce(new(64, 16), t, nl.add, 1.0, nl.add),
     lambda t: nisa.tensor_scalar_reduce(new(64, 16), t, nl.add, 1.0, nl.add,
                                         reduce_cmd=COMMAND.load_reduce)),
    ("dtype", lambda t: nisa.tensor_scalar_cumulative(new(4, 4), sb(4, 4, dtype=I16), nl.add,
                                                      nl.add, 1.0),
     lambda t: nisa.tensor_scalar_cumulative(new(4, 4), sb(4, 4, dtype=I32), nl.add, nl.add, 1.0)),
    ("dtype", lambda t: nisa.tensor_scalar_cumulative(new(4, 4, dtype=U16), sb(4, 4), nl.add,
                                                      nl.add, 1.0),
     lambda t: nisa.tensor_scalar_cumulative(new(4, 4, dtype=U32), sb(4, 4), nl.add, nl.add, 1.0)),
    ("axis", lambda t: reduced(t, (2, 3, 5), (2, 3), 2),
     lambda t: reduced(t, (2, 3, 5), (2, 2), 6)),
    ("axis", lambda t: reduced(t, (2, 3, 5), (-1,), 6), lambda t: reduced(t, (2, 3, 5), (1, 3), 3)),
    ("element-count", lambda t: reduced(t, (2, 3, 5), 3, 6), lambda t: reduced(t, (2, 3, 5), 3, 2)),
    ("value", lambda t: nisa.tensor_reduce(new(4, 1, dtype=U8), nl.bitwise_or,
                                           sb(4, 4, dtype=U8), 1),
     lambda t: nisa.tensor_reduce(new(4, 1, dtype=U8), nl.bitwise_or, sb(4, 4, dtype=U8), 1,
                                  negate=True)),
    ("tile-size", lambda t: nisa.bn_stats(new(4, 6), sb(4, 512)),
     lambda t: nisa.bn_stats(new(4, 6), sb(4, 513))),
    ("shape", lambda t: nisa.bn_aggr(new(4, 2), sb(4, 9)),
     lambda t: nisa.bn_aggr(new(4, 2), sb(4, 10))),
    ("engine", lambda t: scalar(nl.add, 1.0, nl.rsqrt, None, engine=ENGINE.gpsimd),
     lambda t: scalar(nl.add, 1.0, nl.rsqrt, None, engine=ENGINE.vector)),
    ("operator", lambda t: scalar(nl.bitwise_and, 1, nl.bitwise_or, 1, I32),
     lambda t: scalar(nl.bitwise_and, 1, nl.add, 1, I32)),
    ("operator", lambda t: scalar(nl.add, 1, nl.multiply, 1, I32),
     lambda t: scalar(nl.add, 1, nl.bitwise_or, 1, I32)),
    ("dtype", lambda t: scalar(nl.bitwise_and, 1, nl.bitwise_or, 1, I32),
     lambda t: scalar(nl.bitwise_and, 1, nl.bitwise_or, 1.0, I32)),
    *(("engine", lambda t, a=a: scalar(*a, engine=ENGINE.scalar),
       lambda t, b=b: scalar(*b, engine=ENGINE.scalar))
      for a, b in (((nl.multiply, 2.0), (nl.subtract, 2.0)), ((nl.add, 2.0), (nl.maximum, 2.0)),
                   ((nl.multiply, 2.0, nl.add, 1.0), (nl.add, 1.0, nl.multiply, 2.0)))),
    ("value", lambda t: scalar(nl.add, 1.0), lambda t: scalar(nl.add, 1.0, None, 0)),
    ("value", lambda t: scalar(nl.abs, 0), lambda t: scalar(nl.abs, 1)),
    ("value", lambda t: scalar(nl.abs, None), lambda t: scalar(nl.abs, sb(64, 1))),
    ("value", lambda t: scalar(nl.add, 1.0, nl.abs, 0), lambda t: scalar(nl.add, 1.0, nl.abs, 1)),
    ("start-partition", lambda t: shuffled(32, 96), lambda t: shuffled(64, 32)),
    ("start-partition", lambda t: shuffled(64, 64), lambda t: shuffled(33, 32)),
    ("start-partition", lambda t: shuffled(96, 0), lambda t: shuffled(96, 32)),
    ("bounds", lambda t: shuffled(32, 0, 16, [15] * 32), lambda t: shuffled(32, 0, 15, [15] * 32)),
    ("value", lambda t: shuffled(32, 0, 32, [31] * 32), lambda t: shuffled(32, 0, 32, [32] * 32)),
    ("dtype", lambda t: nisa.nc_find_index8(new(64, 8, dtype=U16), t, sb(64, 8)),
     lambda t: nisa.nc_find_index8(new(64, 8, dtype=I16), t, sb(64, 8))),
    ("tile-size", lambda t: nisa.max8(new(4, 8), sb(4, 8)),
     lambda t: nisa.max8(new(4, 8), sb(4, 7))),
    ("tile-size", lambda t: nisa.max8(new(1, 8), sb(1, 16384)),
     lambda t: nisa.max8(new(1, 8), sb(1, 16385))),
    ("value", lambda t: selected(2**24 - 16), lambda t: selected(2**24 - 15)),
    ("value", lambda t: selected(-(2**24)), lambda t: selected(-(2**24) - 1)),
    ("value", lambda t: selected(0, on_false_value=float(np.finfo(np.float32).min)),
     lambda t: selected(0, on_false_value=-3e38)),
    *(("dtype", lambda t: nisa.select_reduce(new(4, 4), sb(4, 4, dtype=U8), sb(4, 4, dtype=I16),
                                             0.0),
       lambda t, d=d: nisa.select_reduce(new(4, 4), sb(4, 4, dtype=U8), sb(4, 4, dtype=d), 0.0))
      for d in (TF, I32, U32)),
    ("buffer", lambda t: nisa.tensor_copy(sb(64, 16), t, engine=ENGINE.gpsimd),
     lambda t: nisa.tensor_copy(sb(64, 16), in_psum(t), engine=ENGINE.gpsimd)),
    ("buffer", lambda t: nisa.memset(sb(64, 16), 0.0, engine=ENGINE.gpsimd),
     lambda t: nisa.memset(ps(64, 16), 0.0, engine=ENGINE.gpsimd)),
    ("dge", lambda t: moved(new(64, 16), t, dge_mode=DGE.hwdge, engine=ENGINE.scalar),
     lambda t: moved(new(64, 16), t, dge_mode=DGE.hwdge, engine=ENGINE.vector)),
    ("dge", lambda t: moved(new(64, 16), t, dge_mode=DGE.hwdge),
     lambda t: moved(new(64, 16), t, dge_mode=DGE.hwdge, engine=ENGINE.gpsimd)),
    ("dge", lambda t: moved(new(64, 16), t, dge_mode=DGE.hwdge),
     lambda t: moved(new(64, 16, dtype=BF), t, dge_mode=DGE.hwdge)),
    *(("dge", lambda t, s=s: at_run_time(s, dge_mode=DGE.swdge),
       lambda t, s=s: at_run_time(s, dge_mode=DGE.none)) for s in ("dst", "src")),
    ("value", lambda t: computed([1.0, 1.0]), lambda t: computed([1.0, 0.5])),
    ("value", lambda t: computed([1.0, 1.0, 1.0], 3), lambda t: computed([1.0, 1.0, 1.0], 2)),
    ("tile-size", lambda t: computed(None, 16), lambda t: computed(None, 17)),
    ("dge", lambda t: turned(16, 128, dge_mode=DGE.hwdge),
     lambda t: turned(16, 129, dge_mode=DGE.hwdge, on_chip=False)),
    ("dge", lambda t: turned(16, 64, dge_mode=DGE.hwdge),
     lambda t: turned(32, 64, dge_mode=DGE.hwdge)),
    ("dge", lambda t: turned(4, 4, 64, dge_mode=DGE.hwdge),
     lambda t: turned(4, 6, 64, dge_mode=DGE.hwdge)),
    ("dge", lambda t: turned(16, 3, 64, dge_mode=DGE.hwdge),
     lambda t: turned(32, 3, 64, dge_mode=DGE.hwdge)),
    ("dge", lambda t: turned(16, 64, dge_mode=DGE.hwdge),
     lambda t: turned(16, 64, dtype=nl.float32, dge_mode=DGE.hwdge)),
    ("dtype", lambda t: turned(16, 64, dtype=nl.float32), lambda t: turned(16, 64, dtype=U8)),
    ("axis", lambda t: turned(4, 4, 64, axes=(2, 1, 0)), lambda t: turned(4, 4, 4, axes=(0, 1, 2))),
    ("shape", lambda t: gathered(16), lambda t: gathered(8)),
    ("shape", lambda t: gathered(128, table=(128, 16)), lambda t: gathered(24)),
    ("shape", lambda t: gathered(128, 2, table=(256, 16)), lambda t: gathered(64, 2, (128, 16))),
    ("shape", lambda t: gathered(32, table=(64, 128)), lambda t: gathered(32, table=(64, 129))),
    ("shape", lambda t: gathered(48, used=32), lambda t: gathered(48, used=40)),
    ("tile-position", lambda t: tiled((96, 96), (32, 32)), lambda t: tiled((128, 0), (32, 32))),
    ("tile-position", lambda t: tiled((0, 64), (64, 64)), lambda t: tiled((0, 128), (64, 64))),
    ("tile-position", lambda t: tiled((64, 0), (64, 128)), lambda t: tiled((32, 0), (64, 128))),
    ("tile-position", lambda t: tiled((64, 0), (64, 128), True),
     lambda t: tiled((0, 0), (128, 64), True)),
    ("dtype-match", lambda t: matmul(dtype=BF, other=F8),
     lambda t: matmul(dtype=BF, other=nl.float32)),
    ("dtype-match", lambda t: matmul(dtype=nl.float32, other=TF),
     lambda t: matmul(dtype=TF, other=BF)),
    ("tile-size", lambda t: matmul(n=512), lambda t: matmul(n=513)),
    ("tile-size", lambda t: matmul(k=128, m=128),
     lambda t: nisa.nc_matmul(ps(128, 16), sb(64, 129), sb(64, 16))),
    ("dtype-match", lambda t: nisa.nc_transpose(ps(16, 64, dtype=BF), sb(64, 16, dtype=F8)),
     lambda t: nisa.nc_transpose(ps(16, 64), sb(64, 16, dtype=F8))),
    ("tile-size", lambda t: nisa.nc_transpose(new(32, 32), sb(32, 32), engine=ENGINE.vector),
     lambda t: nisa.nc_transpose(new(33, 32), sb(32, 33), engine=ENGINE.vector)),
    ("tile-size", lambda t: nisa.nc_transpose(new(32, 32), sb(32, 32), engine=ENGINE.vector),
     lambda t: nisa.nc_transpose(new(32, 33), sb(33, 32), engine=ENGINE.vector)),
    ("value", lambda t: nisa.iota(new(4, 8, dtype=I32), [[1, 8]], offset=2**31 - 1),
     lambda t: nisa.iota(new(4, 8, dtype=I32), [[1, 8]], offset=2**31)),
    ("value", lambda t: nisa.iota(new(4, 8, dtype=I32), [[1, 8]], channel_multiplier=-(2**31)),
     lambda t: nisa.iota(new(4, 8, dtype=I32), [[1, 8]], channel_multiplier=-(2**31) - 1)),
    ("value", lambda t: nisa.iota(new(4, 8, dtype=I32), [[1, 2], [1, 2], [1, 2], [1, 1]]),
     lambda t: nisa.iota(new(4, 8, dtype=I32), [[1, 2], [1, 2], [1, 2], [1, 1], [1, 1]])),
    *(("element-count", lambda t: nisa.iota(new(4, 8, dtype=I32), [[1, 8]]),
       lambda t, n=n: nisa.iota(new(4, 8, dtype=I32), [[1, n]])) for n in (7, 9)),
    ("value", lambda t: looked_up(32, 1), lambda t: looked_up(33, 1)),
    ("tile-size", lambda t: looked_up(1, 256), lambda t: looked_up(1, 257)),
    ("tile-size", lambda t: looked_up(1, 1, 1), lambda t: looked_up(1, 1, 17)),
    ("value", lambda t: topk(8, 8), lambda t: topk(7, 7)),
    ("value", lambda t: topk(65535, 1), lambda t: topk(65536, 1)),
    ("shape", lambda t: topk(10, 10), lambda t: topk(10, 11)),
    ("partition-match", lambda t: nisa.tensor_partition_reduce(new(1, 16), nl.add, t),
     lambda t: nisa.tensor_partition_reduce(new(2, 16), nl.add, t)),
    ("register", lambda t: nisa.register_move(nisa.register_alloc(), 2**32 - 1),
     lambda t: nisa.register_move(nisa.register_alloc(), 2**32)),
    ("register", lambda t: nisa.register_move(nisa.register_alloc(), -(2**31)),
     lambda t: nisa.register_move(nisa.register_alloc(), -(2**31) - 1)),
    ("register", lambda t: nisa.register_load(nisa.register_alloc(), t[0:1, 0:1]),
     lambda t: nisa.register_load(nisa.register_alloc(), t[0:1, 0:2])),
    ("shape", lambda t: moved(new(16, 16), rows(hbm(32, 16), 16, counting(16))),
     lambda t: moved(new(16, 16), rows(hbm(32, 16), 16, counting(16, columns=2)))),
    ("oob", lambda t: moved(new(16, 16), rows(hbm(16, 16), 16, counting(16))),
     lambda t: moved(new(16, 16), rows(hbm(15, 16), 16, counting(16)))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "inside", "outside"), LIMITS, ids=[f"{i}-{r[0]}" for i, r in enumerate(LIMITS)]
)
def test_one_step_inside_runs_and_one_outside_breaks_the_rule(rule, inside, outside, request):
    def body(t):
        inside(t)
        return t

    np.testing.assert_array_equal(simulated(body, T), T)
    tells(refused(rule, outside, T), request)


@pytest.mark.parametrize("rows_", [16, 32, 112, 128])
def test_index_rows_of_a_gathering_transpose_come_by_sixteen(rows_):
    """More of them than are used, so that nothing else refuses one row more or less."""
    simulated(lambda t: (gathered(rows_, used=16), t)[1], T)
    for wrong in {rows_ - 8, rows_ + 1} - set(range(16)) - set(range(129, 200)):
        error = refused("shape", lambda t, w=wrong: gathered(w, used=16), T)
        assert error.operand == "index" and error.value == wrong


@pytest.mark.parametrize(("dtype", "widest"), [(nl.float32, 256), (BF, 256), (U8, 256)])
def test_a_message_of_gpsimd_holds_256_elements_of_a_partition(dtype, widest):
    """1024 bytes of 32 bits, 512 of 16, 256 of 8."""
    from nsa_neuron import simulator

    def kernel(x, width):
        me = nl.program_id(0)
        tile, got = nl.zeros((4, width), dtype), nl.ndarray((4, width), dtype)
        nisa.sendrecv(tile, got, 1 - me, 1 - me, 0, dma_engine=nisa.dma_engine.gpsimd_dma)
        nisa.tensor_copy(tile, got)  # what arrived was written
        return x

    run = simulator.simulate(simulator.Kernel(kernel, 2))
    run(T.copy(), widest)
    with pytest.raises(simulator.SimulationError) as caught:
        run(T.copy(), widest + 1)
    assert caught.value.rule == "tile-size"


@pytest.mark.parametrize("ranks", [(0, 0), (1, 1), (0, 1)])
def test_a_message_names_the_other_core_twice(ranks):
    from nsa_neuron import simulator

    def kernel(x):
        me = nl.program_id(0)
        to, of = (1 - me if r else me for r in ranks)
        tile, got = nl.zeros((4, 4), nl.float32), nl.ndarray((4, 4), nl.float32)
        nisa.sendrecv(tile, got, to, of, 0)
        return x

    run = simulator.simulate(simulator.Kernel(kernel, 2))
    if ranks == (1, 1):
        run(T.copy())
        return
    with pytest.raises(simulator.SimulationError) as caught:
        run(T.copy())
    assert caught.value.rule == "lnc-sync"
