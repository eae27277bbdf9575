"""DMA: modes, sizes, run-time indices, bounds."""

import numpy as np
from planted import X, fault, result, sbuf, tile

from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

ROWS = np.arange(64, dtype=np.int32).reshape(64, 1)


@fault("dge")
def hwdge_between_dtypes(x, wrong):
    t = nl.ndarray((128, 64), nl.bfloat16 if wrong else nl.float32)
    nisa.dma_copy(t, x, dge_mode=nisa.dge_mode.hwdge)
    return result(t)


@fault("generation")
def dma_with_priority(x, wrong):
    t = nl.ndarray((128, 64), nl.float32)
    nisa.dma_copy(t, x, priority=1 if wrong else None)
    return result(t)


@fault("element-count")
def dma_of_unequal_sizes(x, wrong):
    t = nl.ndarray((128, 32), nl.float32)
    nisa.dma_copy(t, x if wrong else x[:, 0:32])
    return result(t)


@fault("bounds")
def pattern_past_the_end(x, wrong):
    t = nl.ndarray((64, 64), nl.float32)
    nisa.dma_copy(t, x.ap([[64, 64], [1, 64]], offset=64 * 64 + (1 if wrong else 0)))
    return result(t)


@fault("bounds")
def tile_pattern_past_the_end(x, wrong):
    t, u = tile(x), sbuf(128, 64)
    nisa.tensor_copy(u[:, 0:32], t.ap([[64, 128], [1, 32]], offset=33 if wrong else 32))
    return result(u)


@fault("oob", X, ROWS, follows=("uninitialized-read",))
def gather_past_the_last_row(x, rows, wrong):
    index, t = tile(rows), nl.ndarray((64, 64), nl.float32)
    nisa.tensor_scalar(index, index, nl.add, 65 if wrong else 64)
    nisa.dma_copy(t, x.vector_select(0, index))
    return result(t)


@fault("oob", X, ROWS, follows=("bounds",))
def register_past_the_last_row(x, rows, wrong):
    register = nisa.register_alloc(128 if wrong else 127)
    t = nl.ndarray((1, 64), nl.float32)
    nisa.dma_copy(t, x.select(0, register).reshape((1, 64)))
    return result(t)


@fault("view", X, ROWS)
def vector_engine_gathers(x, rows, wrong):
    index, t = tile(rows), nl.ndarray((64, 64), nl.float32)
    if wrong:
        gathered = x.vector_select(0, index)
        nisa.tensor_copy(t, gathered)
    else:
        nisa.dma_copy(t, x.vector_select(0, index))
    return result(t)


@fault("tile-size")
def seventeen_sources(x, wrong):
    t = sbuf(128, 64)
    nisa.dma_compute(t, [x] * (17 if wrong else 16), nl.add)
    return result(t)


@fault("enum")
def integer_for_an_enum(x, wrong):
    t = nl.ndarray((128, 64), nl.float32)
    nisa.dma_copy(t, x, dge_mode=2 if wrong else nisa.dge_mode.hwdge)
    return result(t)


@fault("legacy-api")
def read_modify_write_by_copy(x, wrong):
    t = tile(x)
    if wrong:
        nisa.dma_copy(t, x, dst_rmw_op=nl.add)
    else:
        nisa.dma_compute(t, [x, t], nl.add)
    return result(t)


@fault("shape")
def dma_transpose_into_the_wrong_rank(x, wrong):
    t = nl.ndarray((64, 1, 128) if wrong else (64, 128), nl.float32)
    nisa.dma_transpose(t, x)
    return result(t)
