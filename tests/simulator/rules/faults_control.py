"""Registers, hardware loops, two cores, ranks, shape-only runs."""

import numpy as np
from planted import X, fault, launch_fault, result, sbuf, tile

from nsa_neuron import simulator
from nsa_neuron.simulator.issue.control import dynamic_range
from nsa_neuron.simulator.nki import collectives as ncc
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl
from nsa_neuron.simulator.nki.configuration import CompileConfig
from nsa_neuron.simulator.nki.launching import jit

COUNT = np.full((1, 1), 3, np.int32)


def loop(times, t, step=1):
    """Clear a tile so many times."""

    def body(_):
        nisa.memset(t, 0.0)

    nl.fori_loop(0, times, body, step)


@fault("register")
def register_never_set(x, wrong):
    register = nisa.register_alloc(None if wrong else 3)
    t = tile(x)
    loop(register, t)
    return result(t)


@fault("register")
def arithmetic_on_a_loop_register(x, wrong):
    t, u = tile(x), sbuf(128, 64)
    bound = nisa.register_alloc(4)

    def body(i):
        nisa.tensor_copy(u[:, 0:1], t.select(1, i + 1 if wrong else i).expand_dim(1))

    nl.fori_loop(0, bound, body)
    return result(u)


@fault("register", nki="0.6")
def loop_register_written(x, wrong):
    t = tile(x)
    other = nisa.register_alloc(0)
    for i in nl.dynamic_range(3):
        nisa.register_move(i if wrong else other, nisa.register_alloc(1))
        nisa.memset(t, 0.0)
    return result(t)


@fault("register-value")
def python_loop_over_a_register(x, wrong):
    t, register = tile(x), nisa.register_alloc(2)
    for _ in range(register if wrong else 2):
        nisa.memset(t, 0.0)
    return result(t)


@fault("scalar", X, COUNT)
def half_of_a_scalar(x, count, wrong):
    number = nisa.scalar_load(count)
    nl.fori_loop(0, number // 2 if wrong else number - 1, lambda i: None)
    return result(tile(x))


@fault("version")
def a_name_of_the_version_before(x, wrong):
    t = tile(x)
    for _ in dynamic_range(2) if wrong else range(2):
        nisa.memset(t, 0.0)
    return result(t)


@launch_fault("configuration")
def nested_with_another_configuration(wrong, **options):
    own = CompileConfig(barrier_check=True)
    inner = jit(lambda x: tile(x), compile_config=own)
    outer = jit(lambda x: result(inner(x)), compile_config=None if wrong else own)
    simulated = simulator.simulate(outer, **options)
    simulated(X)
    return simulated


@fault("grid")
def data_of_separate_tiles(x, wrong):
    return result(tile(nl.tiles(x, tile_shape=(32, 64))[:: 2 if wrong else 1].data))


@fault("loop")
def step_of_zero(x, wrong):
    t = tile(x)
    loop(4, t, 0 if wrong else 1)
    return result(t)


@fault("loop")
def body_that_returns(x, wrong):
    t = tile(x)

    def body(i):
        nisa.memset(t, 0.0)
        return i if wrong else None

    nl.fori_loop(0, 2, body)
    return result(t)


@fault("loop")
def hardware_loop_in_no_reorder(x, wrong):
    t = tile(x)
    with nl.no_reorder():
        if wrong:
            loop(2, t)
        nisa.memset(t, 0.0)
    return result(t)


@fault("loop-scope")
def tile_of_the_body_used_after_the_loop(x, wrong):
    before, made = sbuf(128, 64), []

    def body(i):
        inside = tile(x)
        made.append(inside)
        nisa.tensor_copy(before, inside)

    nl.fori_loop(0, 2, body)
    return result(made[-1] if wrong else before)


@fault("no-data", *(simulator.ShapeDtype(a.shape, a.dtype) for a in (X, COUNT)), data=False)
def bound_that_data_would_set(x, count, wrong):
    register, t = nisa.register_alloc(3), tile(x)
    if wrong:
        nisa.register_load(register, tile(count))
    loop(register, t)
    return result(t)


@launch_fault("lnc")
def three_cores(wrong, **options):
    def kernel(x):
        return result(tile(x))

    simulated = simulator.simulate(simulator.Kernel(kernel)[3 if wrong else 2], **options)
    simulated(X)
    return simulated


@fault("lnc-race", lnc=2)
def halves_exchanged_without_a_barrier(x, wrong):
    me = nl.program_id(0)
    mine, other = (x[64 * i : 64 * i + 64] for i in (me, 1 - me))
    t, u = tile(mine), sbuf(64, 64)
    nisa.tensor_scalar(t, t, nl.add, 1.0)
    nisa.dma_copy(mine, t)
    if not wrong:
        nisa.core_barrier(x, (0, 1))
    nisa.dma_copy(u, other)
    return result(u)


@fault("lnc-deadlock", lnc=2)
def only_one_core_at_the_barrier(x, wrong):
    shared = nl.ndarray((128, 64), nl.float32, buffer=nl.shared_hbm)
    t = tile(x)
    if nl.program_id(0) == 0 or not wrong:
        nisa.core_barrier(shared, (0, 1))
    nisa.dma_copy(shared, t)
    return shared


@fault("lnc-sync", lnc=2)
def message_to_oneself(x, wrong):
    me = nl.program_id(0)
    t, u = tile(x), nl.ndarray((128, 64), nl.float32)
    other = me if wrong else 1 - me
    nisa.sendrecv(src=t, dst=u, send_to_rank=other, recv_from_rank=other, pipe_id=0)
    return result(u)


@fault("collective", ranks=2)
def gather_into_the_wrong_shape(x, wrong):
    both = nl.ndarray((257 if wrong else 256, 64), nl.float32, buffer=nl.hbm)
    ncc.all_gather([x], [both], ncc.ReplicaGroup([[0, 1]]), collective_dim=0)
    return result(tile(both[0:128]))


@fault("collective-deadlock", simulator.PerRank([0, 1]), ranks=2)
def only_one_rank_gathers(rank, wrong):
    x, both = sbuf(128, 64), nl.ndarray((256, 64), nl.float32, buffer=nl.hbm)
    if rank == 0 or not wrong:
        ncc.all_gather([result(x)], [both], ncc.ReplicaGroup([[0, 1]]), collective_dim=0)
    return result(x)


@fault("doubtful", strict=True)
def an_operator_that_no_engine_has(x, wrong):
    t = tile(x)
    return result(nl.divide(t, 2.0) if wrong else nl.multiply(t, 0.5))
