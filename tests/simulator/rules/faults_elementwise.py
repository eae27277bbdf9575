"""Vector, Scalar and GpSimd Engines: operators, dtypes, engines, values."""

import numpy as np
from planted import X, fault, psum, result, sbuf, tile

from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

INTEGERS = np.arange(8192, dtype=np.int32).reshape(128, 64)


@fault("engine")
def copy_on_the_tensor_engine(x, wrong):
    t, u = tile(x), sbuf(128, 64)
    nisa.tensor_copy(u, t, engine=nisa.engine.tensor if wrong else nisa.engine.scalar)
    return result(u)


@fault("engine")
def memset_on_the_scalar_engine(x, wrong):
    t = tile(x)
    nisa.memset(t, 0.0, engine=nisa.engine.scalar if wrong else nisa.engine.gpsimd)
    return result(t)


@fault("dtype")
def bitwise_and_of_floats(x, wrong):
    t = tile(x)
    bits = t if wrong else t.view(nl.int32)
    nisa.tensor_scalar(bits, bits, nl.bitwise_and, 255)
    return result(t)


@fault("dtype")
def operand_column_of_bfloat16(x, wrong):
    t = tile(x)
    column = sbuf(128, 1, dtype=nl.bfloat16 if wrong else nl.float32)
    nisa.tensor_scalar(t, t, nl.multiply, column)
    return result(t)


@fault("shape")
def operand_of_two_columns(x, wrong):
    t, u = tile(x), sbuf(128, 64)
    nisa.tensor_scalar(u, t, nl.multiply, t[:, 0 : 2 if wrong else 1])
    return result(u)


@fault("operator", INTEGERS)
def bitwise_and_then_add(x, wrong):
    t = tile(x)
    second = nl.add if wrong else nl.left_shift
    nisa.tensor_scalar(t, t, nl.bitwise_and, 255, op1=second, operand1=1)
    return result(t)


@fault("operator")
def activation_of_a_binary_operator(x, wrong):
    t = tile(x)
    nisa.activation(t, nl.add if wrong else nl.exp, t)
    return result(t)


@fault("operator")
def python_function_as_operator(x, wrong):
    t = tile(x)
    nisa.tensor_tensor(t, t, t, max if wrong else nl.maximum)
    return result(t)


@fault("value")
def integer_tensor_set_to_a_fraction(x, wrong):
    t = nl.ndarray((128, 4), nl.int32)
    nisa.memset(t, 1.5 if wrong else 1)
    return result(t)


@fault("axis")
def reduction_over_partitions(x, wrong):
    t, u = tile(x), sbuf(128, 1)
    nisa.tensor_reduce(u, nl.add, t, axis=0 if wrong else 1)
    return result(u)


@fault("axis")
def reduction_over_a_middle_axis(x, wrong):
    t, u = tile(x).reshape((128, 8, 8)), sbuf(128, 8)
    nisa.tensor_reduce(u, nl.add, t if wrong else t.permute((0, 2, 1)), axis=1 if wrong else 2)
    return result(u)


@fault("tile-size")
def max8_of_seven(x, wrong):
    t, u = tile(x), sbuf(128, 8)
    nisa.max8(u, t[:, 0 : 7 if wrong else 8])
    return result(u)


@fault("tile-size")
def bn_stats_of_513(x, wrong):
    t, u = sbuf(128, 513), sbuf(128, 6)
    nisa.bn_stats(u, t if wrong else t[:, 0:512])
    return result(u)


@fault("dtype")
def indices_into_floats(x, wrong):
    t, best = tile(x), sbuf(128, 8)
    index = sbuf(128, 8, dtype=nl.float32 if wrong else nl.uint32)
    nisa.max8(best, t)
    nisa.nc_find_index8(index, t, best)
    return result(index)


@fault("value")
def shuffle_mask_of_31(x, wrong):
    t, u = tile(x), sbuf(128, 64)
    nisa.nc_stream_shuffle(u[0:32], t[0:32], list(range(31 if wrong else 32)))
    return result(u)


@fault("buffer")
def iota_into_psum(x, wrong):
    u = psum(128, 64, dtype=nl.int32) if wrong else nl.ndarray((128, 64), nl.int32)
    nisa.iota(u, [[1, 64]])
    return result(u)


@fault("undefined-accumulator")
def reduce_register_never_reset(x, wrong):
    t, u, total = tile(x), sbuf(128, 64), sbuf(128, 1)
    command = nisa.reduce_cmd.reduce if wrong else nisa.reduce_cmd.reset_reduce
    nisa.activation(u, nl.exp, t, reduce_op=nl.add, reduce_res=total, reduce_cmd=command)
    return result(total)


@fault("generation")
def instruction_of_a_later_generation(x, wrong):
    t, u = tile(x), sbuf(128, 64)
    if wrong:
        nisa.exponential(u, t)
    else:
        nisa.activation(u, nl.exp, t)
    return result(u)


@fault("uninitialized-read")
def last_column_never_loaded(x, wrong):
    t, u = nl.ndarray((128, 64), nl.float32), sbuf(128, 64)
    n = 63 if wrong else 64
    nisa.dma_copy(t[:, 0:n], x[:, 0:n])
    nisa.tensor_copy(u, t)
    return result(u)


@fault("uninitialized-read", X[0:64])
def one_element_of_a_strided_write(x, wrong):
    t, u = nl.ndarray((64, 64), nl.float32), sbuf(64, 64)
    nisa.dma_copy(t[:, 0:64:2], x[:, 0:32])
    nisa.dma_copy(t[0 : 63 if wrong else 64, 1:64:2], x[0 : 63 if wrong else 64, 32:64])
    nisa.tensor_tensor(u, t, t, nl.add)
    return result(u)


@fault("usage")
def array_as_operand(x, wrong):
    t, u = tile(x), sbuf(128, 64)
    nisa.tensor_copy(u, X if wrong else t)
    return result(u)


@fault("usage")
def keyword_nobody_knows(x, wrong):
    t, u = tile(x), sbuf(128, 64)
    nisa.tensor_copy(u, t, **({"axis": 1} if wrong else {}))
    return result(u)


@fault("legacy-api")
def mask_of_nki_0_1(x, wrong):
    t, u = tile(x), sbuf(128, 64)
    nisa.tensor_copy(u, t, **({"mask": True} if wrong else {}))
    return result(u)


@fault("legacy-api")
def addition_in_python(x, wrong):
    t = tile(x)
    return result(t + t if wrong else nl.add(t, t))
