"""Partitions, start partitions, access patterns, memories."""

from planted import fault, psum, result, sbuf, tile

from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl


@fault("start-partition")
def few_partitions_between_quadrants(x, wrong):
    t = tile(x)
    nisa.memset(t[5:10] if wrong else t[32:37], 0.0)
    return result(t)


@fault("start-partition")
def forty_partitions_at_thirty_two(x, wrong):
    t = tile(x)
    start = 32 if wrong else 64
    nisa.memset(t[start : start + 40], 0.0)
    return result(t)


@fault("start-partition")
def sixty_five_partitions_at_sixty_four(x, wrong):
    t, u = tile(x), sbuf(128, 64)
    n = 63 if wrong else 64
    nisa.tensor_copy(u[n : n + 63], t[n : n + 63])
    return result(u)


@fault("partition-step")
def every_other_partition(x, wrong):
    t, u = tile(x), sbuf(64, 64)
    nisa.tensor_copy(u, t[0:128:2] if wrong else t[0:64])
    return result(u)


@fault("partition-limit")
def tile_of_129_partitions(x, wrong):
    t = nl.ndarray((129 if wrong else 128, 4), nl.float32)
    nisa.memset(t[0:128], 1.0)
    return result(t[0:128])


@fault("partition-match")
def copy_of_half_into_a_quarter(x, wrong):
    t, u = tile(x), sbuf(64, 64)
    nisa.tensor_copy(u[0:32], t[0:64] if wrong else t[0:32])
    return result(u)


@fault("partition-match")
def tensor_tensor_of_unequal_partitions(x, wrong):
    t, u = tile(x), sbuf(64, 64)
    nisa.tensor_tensor(u, t[0:64], t[0:32] if wrong else t[64:128], nl.add)
    return result(u)


@fault("element-count")
def copy_of_a_longer_row(x, wrong):
    t, u = tile(x), sbuf(128, 32)
    nisa.tensor_copy(u, t if wrong else t[:, 0:32])
    return result(u)


@fault("element-count")
def reduction_into_two_columns(x, wrong):
    t, u = tile(x), sbuf(128, 2)
    nisa.tensor_reduce(u if wrong else u[:, 0:1], nl.add, t, 1)
    return result(u)


@fault("free-dims")
def five_free_dims(x, wrong):
    t, u = sbuf(128, 3, 3, 3, 3, 3), sbuf(128, 32)
    part = t[:, 0:2, 0:2, 0:2, 0:2, 0:2] if wrong else t[:, 0:2, 0:2, 0:2, 0:2, 0]
    nisa.tensor_copy(u[:, 0 : 32 if wrong else 16], part)
    return result(u)


@fault("free-dim-range")
def seventy_thousand_in_one_dim(x, wrong):
    n = 70_000 if wrong else 65_535
    t = nl.ndarray((1, n), nl.uint8)
    nisa.memset(t, 1)
    return result(t)


@fault("buffer")
def vector_engine_reads_hbm(x, wrong):
    t, u = tile(x), sbuf(128, 64)
    nisa.tensor_copy(u[0:1], x[0:1] if wrong else t[0:1])
    return result(u)


@fault("buffer")
def dma_reads_psum(x, wrong):
    t, u = psum(128, 64, zero=True), sbuf(128, 64)
    if wrong:
        nisa.dma_copy(u, t)
    else:
        nisa.tensor_copy(u, t)
    return result(u)


@fault("buffer")
def gpsimd_writes_psum(x, wrong):
    t, u = tile(x), psum(128, 64)
    nisa.tensor_copy(u, t, engine=nisa.engine.gpsimd if wrong else nisa.engine.vector)
    return result(u)


@fault("buffer")
def matmul_into_sbuf(x, wrong):
    t = tile(x)
    u = sbuf(64, 64) if wrong else psum(64, 64)
    nisa.nc_matmul(u, t, t)
    return result(u)


@fault("buffer")
def matmul_from_psum(x, wrong):
    t, u, p = tile(x), psum(64, 64), psum(128, 64, zero=True)
    nisa.nc_matmul(u, t, p if wrong else t)
    return result(u)


@fault("psum-inputs")
def two_inputs_in_psum(x, wrong):
    a, b, u = psum(128, 64, zero=True), psum(128, 64, zero=True), sbuf(128, 64)
    nisa.tensor_tensor(u, a, b if wrong else tile(x), nl.add)
    return result(u)
