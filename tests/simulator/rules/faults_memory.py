"""Tensors and views: shapes, addresses, capacity, results."""

from planted import X, fault, launch_fault, psum, result, sbuf, tile

from nsa_neuron import simulator
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl


@fault("on-chip-rank")
def vector_in_sbuf(x, wrong):
    t = nl.ndarray((128,) if wrong else (128, 1), nl.float32)
    nisa.memset(t, 0.0)
    return result(t)


@fault("shape")
def empty_dim(x, wrong):
    t = nl.ndarray((128, 0 if wrong else 1), nl.float32)
    nisa.memset(t, 0.0)
    return result(t)


@fault("dtype")
def tensor_of_float64(x, wrong):
    t = nl.ndarray((128, 4), "float64" if wrong else "float32")
    nisa.memset(t, 0.0)
    return result(t)


@fault("usage")
def buffer_by_name(x, wrong):
    t = nl.ndarray((128, 4), nl.float32, buffer="sbuf" if wrong else nl.sbuf)
    nisa.memset(t, 0.0)
    return result(t)


@fault("index")
def column_past_the_last(x, wrong):
    return result(tile(x)[:, 64 if wrong else 63])


@fault("index")
def register_in_brackets(x, wrong):
    register, t = nisa.register_alloc(3), tile(x)
    u = sbuf(128, 1)
    nisa.tensor_copy(u, t[:, register] if wrong else t.select(1, register).expand_dim(1))
    return result(u)


@fault("view")
def partitions_moved_by_a_view(x, wrong):
    t = tile(x)
    return result(t.permute((1, 0)) if wrong else t.reshape((128, 8, 8)).permute((0, 2, 1)))


@fault("view")
def reshape_across_partitions(x, wrong):
    t = tile(x)
    return result(t.reshape((64, 128) if wrong else (128, 2, 32)))


@fault("tensor-truth")
def branch_on_a_comparison(x, wrong):
    t = tile(x)
    if nl.equal(t, nl.copy(t) if not wrong else 1e30):
        return result(t)
    return result(t)


@fault("address")
def address_past_the_last_byte(x, wrong):
    t = nl.ndarray((128, 64), nl.float32, address=(0, 212_984 - (252 if wrong else 256)))
    nisa.dma_copy(t, x)
    return result(t)


@fault("address")
def address_in_hbm(x, wrong):
    address = (0, 0) if wrong else None
    t = nl.ndarray((128, 64), nl.float32, buffer=nl.shared_hbm, address=address)
    nisa.dma_copy(t, tile(x))
    return t


@fault("address-overlap")
def addresses_that_overlap(x, wrong):
    a = nl.ndarray((128, 64), nl.float32, address=(0, 0))
    nisa.dma_copy(a, x)
    b = nl.ndarray((128, 64), nl.float32, address=(0, 128 if wrong else 256))
    nisa.dma_copy(b, x)
    return result(a), result(b)


@fault("sbuf-capacity")
def three_tiles_of_96_kib(x, wrong):
    tiles = [sbuf(128, 24 * 1024) for _ in range(3 if wrong else 2)]
    return tuple(result(t[:, 0:1]) for t in tiles)


@fault("psum-capacity")
def nine_banks(x, wrong):
    tiles = [psum(128, 512, zero=True) for _ in range(9 if wrong else 8)]
    return tuple(result(t) for t in tiles)


@fault("hbm-capacity", simulator.ShapeDtype((128, 64), "float32"), data=False)
def twenty_five_gib_of_hbm(x, wrong):
    rows = 25 if wrong else 23
    t = nl.ndarray((rows, 2**18, 2**10), nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(t[0, 0:128, 0:64], tile(x))
    return t


@fault("output-unwritten")
def result_without_its_last_row(x, wrong):
    t, u = tile(x), nl.ndarray((128, 64), nl.float32, buffer=nl.shared_hbm)
    n = 127 if wrong else 128
    nisa.dma_copy(u[0:n], t[0:n])
    return u


@fault("output-buffer")
def result_in_sbuf(x, wrong):
    t = tile(x)
    return t if wrong else result(t)


@fault("output-kind")
def result_that_is_a_number(x, wrong):
    t = result(tile(x))
    return (t, t.size) if wrong else (t, t)


@fault("output-kind")
def nothing_returned_or_written(x, wrong):
    t = tile(x)
    if not wrong:
        nisa.dma_copy(x, t)


@launch_fault("argument-kind")
def list_as_argument(wrong, **options):
    def kernel(x, sizes):
        return result(tile(x)[0 : sizes[0]])

    simulated = simulator.simulate(kernel, **options)
    simulated(X, [64] if wrong else (64,))
    return simulated


@launch_fault("argument-kind")
def array_of_float64(wrong, **options):
    def kernel(x):
        return result(tile(x))

    simulated = simulator.simulate(kernel, **options)
    simulated(X.astype("float64" if wrong else "float32"))
    return simulated


@launch_fault("usage")
def missing_argument(wrong, **options):
    def kernel(x, scale):
        return result(tile(x))

    simulated = simulator.simulate(kernel, **options)
    simulated(*((X,) if wrong else (X, 1.0)))
    return simulated
