"""Registers, hardware loops, two cores, ranks, shape-only runs."""

import numpy as np
from planted import X, fault, launch_fault, result, sbuf, tile

from nsa_neuron import simulator
from nsa_neuron.simulator.nki import collectives as ncc
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

COUNT = np.full((1, 1), 3, np.int32)


@fault("register")
def register_never_set(x, wrong):
    register = nisa.register_alloc(None if wrong else 3)
    t = tile(x)
    for _ in nl.dynamic_range(register):
        nisa.memset(t, 0.0)
    return result(t)


@fault("register")
def arithmetic_on_a_loop_register(x, wrong):
    t, u = tile(x), sbuf(128, 64)

    def body(i):
        nisa.tensor_copy(u[:, 0:1], t.select(1, i + 1 if wrong else i).expand_dim(1))

    nl.fori_loop(0, 4, body)
    return result(u)


@fault("register")
def loop_register_written(x, wrong):
    t = tile(x)
    other = nisa.register_alloc(0)
    for i in nl.dynamic_range(3):
        nisa.register_move(i if wrong else other, nisa.register_alloc(1))
        nisa.memset(t, 0.0)
    return result(t)


@fault("loop")
def step_of_zero(x, wrong):
    t = tile(x)
    for _ in nl.dynamic_range(0, 4, 0 if wrong else 1):
        nisa.memset(t, 0.0)
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
        for _ in nl.dynamic_range(2) if wrong else nl.static_range(2):
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
    for _ in nl.dynamic_range(register):
        nisa.memset(t, 0.0)
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
