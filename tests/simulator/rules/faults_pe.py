"""Tensor Engine: tiles, banks, accumulation groups."""

import ml_dtypes
import numpy as np
from planted import X, fault, psum, result, sbuf, tile

from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

NARROW = X.astype(ml_dtypes.bfloat16)
FP8 = X.astype(ml_dtypes.float8_e4m3)
DOUBLE = nisa.matmul_perf_mode.double_row


@fault("tile-size", follows=("partition-match",))
def stationary_of_129_columns(x, wrong):
    t, u = sbuf(64, 129), psum(128, 64)
    nisa.nc_matmul(u, t if wrong else t[:, 0:128], tile(x)[0:64])
    return result(u)


@fault("tile-size", follows=("psum-bank",))
def moving_of_513_columns(x, wrong):
    t, u = sbuf(128, 513), psum(64, 513)
    n = 513 if wrong else 512
    nisa.nc_matmul(u[:, 0:n], tile(x), t[:, 0:n])
    return result(u[:, 0:n])


@fault("psum-bank")
def matmul_across_two_banks(x, wrong):
    u = psum(64, 1024, zero=True)
    start = 480 if wrong else 448
    nisa.nc_matmul(u[:, start : start + 64], tile(x), tile(x), accumulate=False)
    return result(u)


@fault("psum-accumulate")
def accumulation_without_a_start(x, wrong):
    t, u = tile(x), psum(64, 64)
    for i in range(2):
        nisa.nc_matmul(u, t, t, accumulate=True if wrong else i > 0)
    return result(u)


@fault("psum-foreign")
def accumulation_onto_a_memset(x, wrong):
    t, u = tile(x), psum(64, 64)
    nisa.nc_matmul(u, t, t)
    nisa.memset(u[:, 0:32], 0.0)
    nisa.nc_matmul(u, t, t, accumulate=None if wrong else False)
    return result(u)


@fault("dtype", NARROW)
def matmul_of_integers(x, wrong):
    t, u = tile(x), psum(64, 64)
    w = sbuf(128, 64, dtype=nl.int32 if wrong else nl.bfloat16)
    nisa.nc_matmul(u, w, t)
    return result(u)


@fault("dtype", NARROW)
def matmul_into_bfloat16(x, wrong):
    t = tile(x)
    u = psum(64, 64, dtype=nl.bfloat16 if wrong else nl.float32)
    nisa.nc_matmul(u, t, t)
    return result(u)


@fault("dtype-match", NARROW)
def matmul_of_bfloat16_and_float32(x, wrong):
    t, u = tile(x), psum(64, 64)
    nisa.nc_matmul(u, sbuf(128, 64, dtype=nl.float32 if wrong else nl.bfloat16), t)
    return result(u)


@fault("dtype-match", NARROW)
def transpose_into_another_dtype(x, wrong):
    t = tile(x)
    u = psum(64, 128, dtype=nl.float32 if wrong else nl.bfloat16)
    nisa.nc_transpose(u, t)
    return result(u)


@fault("shape", FP8)
def double_row_of_flat_operands(x, wrong):
    t, u = tile(x), psum(32, 32)
    st = t if wrong else t.reshape((128, 2, 32))
    nisa.nc_matmul(u, st, st if wrong else t.reshape((128, 2, 32)), perf_mode=DOUBLE)
    return result(u)


@fault("dtype", NARROW)
def double_row_of_bfloat16(x, wrong):
    t, u = tile(x).reshape((128, 2, 32)), psum(32, 32)
    if wrong:
        nisa.nc_matmul(u, t, t, perf_mode=DOUBLE)
    else:
        nisa.nc_matmul(u, t[:, 0, :], t[:, 1, :])
    return result(u)


@fault("tile-position")
def position_without_size(x, wrong):
    t, u = tile(x), psum(64, 64)
    size = () if wrong else (64, 64)
    nisa.nc_matmul(u, t[0:64], t[0:64], tile_position=(0, 0), tile_size=size)
    return result(u)


@fault("tile-position")
def position_between_tiles(x, wrong):
    t, u = tile(x), psum(32, 64)
    at = (48 if wrong else 64, 0)
    nisa.nc_matmul(u, t[64:96, 0:32], t[64:96], tile_position=at, tile_size=(32, 32))
    return result(u)


@fault("partition-match")
def contraction_of_unequal_lengths(x, wrong):
    t, u = tile(x), psum(64, 64)
    nisa.nc_matmul(u, t[0:64], t if wrong else t[0:64])
    return result(u)


@fault("shape")
def transpose_into_the_wrong_shape(x, wrong):
    t, u = tile(x), psum(64, 128, zero=True)
    nisa.nc_transpose(u[:, 0:64] if wrong else u, t)
    return result(u)


@fault("tile-size")
def vector_engine_transposes_64(x, wrong):
    n = 64 if wrong else 32
    t, u = tile(x), sbuf(64, 64)
    nisa.nc_transpose(u[0:n, 0:n], t[0:n, 0:n], engine=nisa.engine.vector)
    return result(u)


@fault("generation", np.zeros((128, 64), np.float32))
def operator_of_a_later_generation(x, wrong):
    t = tile(x)
    nisa.tensor_tensor(t, t, t, nl.abs_max if wrong else nl.maximum)
    return result(t)
