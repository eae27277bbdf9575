"""Two cores: shared tensors, meeting points, deadlocks, races."""

from __future__ import annotations

import numpy as np
import pytest

from nsa_neuron import simulator
from nsa_neuron.simulator import DeadlockError, RaceError, SimulationError, nki
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

X = np.arange(128 * 8, dtype=np.float32).reshape(128, 8)


@nki.jit
def halves(x):
    """Each core doubles its half of the columns."""
    n = x.shape[1] // nl.num_programs()
    mine = nl.ds(nl.program_id(0) * n, n)
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    tile = nl.load(x[:, mine])
    nisa.tensor_scalar(tile, tile, nl.multiply, 2.0)
    nl.store(out[:, mine], tile)
    return out


def exchange(x, first=0):
    """Each core receives the other's number, meets it, and reads what it stored."""
    me = nl.program_id(0)
    mine, theirs = nl.full((4, 1), me, nl.float32), nl.ndarray((4, 1), nl.float32)
    nisa.sendrecv(mine, theirs, 1 - me, 1 - me, pipe_id=0)
    out = nl.ndarray((2, 4, 1), nl.float32, buffer=nl.shared_hbm)
    nl.store(out[me], theirs)
    nisa.core_barrier(out, (0, 1))
    again = nl.load(out[1 - me])
    nisa.core_barrier(out, (0, 1))
    nl.store(out[me], again)
    return out


def test_both_cores_write_one_result():
    for kernel in (halves, halves[1], halves[2]):
        np.testing.assert_array_equal(kernel(X), 2 * X)
    run = simulator.simulate(halves[2])
    run(X)
    assert [len(c.instructions) for c in run.run.cores] == [3, 3]


def test_exchange_and_barrier():
    result = nki.simulate(nki.jit(exchange)[2])(X)
    assert result[0, 0, 0] == 0 and result[1, 0, 0] == 1


def test_a_missing_partner_is_a_deadlock():
    def alone(x):
        if nl.program_id(0) == 0:
            nisa.core_barrier(x, (0, 1))
        nl.store(x[0:1], nl.load(x[0:1])) if nl.program_id(0) else None

    with pytest.raises(DeadlockError, match="core 0 waits in core_barrier") as caught:
        simulator.simulate(nki.jit(alone)[2])(X.copy())
    assert "core 1 has ended" in str(caught.value)


def test_waiting_for_different_things_is_a_deadlock():
    def crossed(x):
        me = nl.program_id(0)
        tile = nl.zeros((4, 1), nl.float32)
        if me:
            nisa.core_barrier(x, (0, 1))
        nisa.sendrecv(tile, tile, 1 - me, 1 - me, pipe_id=0)

    with pytest.raises(DeadlockError, match="sendrecv"):
        simulator.simulate(nki.jit(crossed)[2])(X.copy())


@pytest.mark.parametrize("barrier", [False, True])
def test_unsynchronised_reads_of_the_other_cores_data_are_races(barrier):
    def kernel(x):
        me = nl.program_id(0)
        scratch = nl.ndarray((2, 4), nl.float32, buffer=nl.shared_hbm)
        nl.store(scratch[me : me + 1], nl.full((1, 4), me, nl.float32))
        if barrier:
            nisa.core_barrier(scratch, (0, 1))
        out = nl.ndarray((2, 4), nl.float32, buffer=nl.shared_hbm)
        nl.store(out[me : me + 1], nl.load(scratch[1 - me : 2 - me]))
        return out

    run = simulator.simulate(nki.jit(kernel)[2])
    if barrier:
        np.testing.assert_array_equal(run(X)[:, 0], [1, 0])
        return
    with pytest.raises((RaceError, simulator.UninitializedReadError)):
        run(X)


def test_both_writing_one_element_is_a_race():
    def kernel(x):
        nl.store(x[0:1], nl.full((1, 8), nl.program_id(0), nl.float32))

    with pytest.raises(RaceError) as caught:
        simulator.simulate(nki.jit(kernel)[2])(X.copy())
    assert caught.value.rule == "lnc-race" and caught.value.location.function == "kernel"


def test_a_failing_core_ends_the_other():
    def kernel(x):
        if nl.program_id(0):
            raise KeyError("core 1")
        nisa.core_barrier(x, (0, 1))

    with pytest.raises(KeyError, match="core 1"):
        simulator.simulate(nki.jit(kernel)[2])(X.copy())


@pytest.mark.parametrize("bracket", [3, 0, True, (2, 2), "2"])
def test_bad_brackets(bracket):
    with pytest.raises(SimulationError) as caught:
        halves[bracket]
    assert caught.value.rule == "lnc"


def test_pair_instructions_need_a_pair():
    with pytest.raises(SimulationError, match=r"kernel\[2\]"):
        simulator.simulate(exchange)(X)


def test_both_cores_doing_the_same_work_is_no_race():
    def kernel(x):
        out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        nl.store(out, nl.load(x))
        nl.store(out, nl.load(out))
        return out

    np.testing.assert_array_equal(simulator.simulate(nki.jit(kernel)[2])(X), X)


@pytest.mark.parametrize("touch_early", [False, True])
def test_pipes_are_independent(touch_early):
    """Core 1 uses the pipes in the other order; both must come through, whoever reads first."""

    def kernel(x):
        me = nl.program_id(0)
        out = nl.ndarray((2, 2, 4, 1), nl.float32, buffer=nl.shared_hbm)
        sent = [nl.full((4, 1), 10 * me + i, nl.float32) for i in range(2)]
        got = [nl.ndarray((4, 1), nl.float32) for _ in range(2)]
        for i in (0, 1) if me == 0 else (1, 0):
            nisa.sendrecv(sent[i], got[i], 1 - me, 1 - me, pipe_id=i)
            if touch_early and me == 1:
                nisa.tensor_scalar(got[i], got[i], nl.add, 0.0)
        for i in (0, 1):
            nl.store(out[me, i], got[i])
        nisa.core_barrier(out, (0, 1))
        return out

    result = simulator.simulate(nki.jit(kernel)[2])(X)
    np.testing.assert_array_equal(result[..., 0, 0], [[10, 11], [0, 1]])


def test_messages_of_a_pipe_arrive_in_the_order_in_which_they_were_sent():
    """Core 0 sends two on pipe 0 while core 1 waits for one on pipe 1."""

    def kernel(x):
        me = nl.program_id(0)
        out = nl.ndarray((2, 2, 4, 1), nl.float32, buffer=nl.shared_hbm)
        sent = [nl.full((4, 1), 10 * me + i, nl.float32) for i in range(3)]
        got = [nl.ndarray((4, 1), nl.float32) for _ in range(3)]
        for i in (0, 1, 2) if me == 0 else (2, 0, 1):
            nisa.sendrecv(sent[i], got[i], 1 - me, 1 - me, pipe_id=int(i == 2))
        for i in (0, 1):
            nl.store(out[me, i], got[i])
        nisa.core_barrier(out, (0, 1))
        return out

    result = simulator.simulate(nki.jit(kernel)[2])(X)
    np.testing.assert_array_equal(result[..., 0, 0], [[10, 11], [0, 1]])


def test_a_message_nobody_sends_is_a_deadlock():
    def kernel(x):
        me = nl.program_id(0)
        tile, got = nl.zeros((4, 1), nl.float32), nl.ndarray((4, 1), nl.float32)
        nisa.sendrecv(tile, got, 1 - me, 1 - me, pipe_id=me)
        nl.store(x[me : me + 1, 0:1], got[0:1])

    with pytest.raises(DeadlockError, match=r"sendrecv\(pipe_id=0\)"):
        simulator.simulate(nki.jit(kernel)[2])(X.copy())


def test_a_relaxed_race_lets_the_cores_keep_pace():
    """Core 1 clears the row that core 0 stores one instruction later."""

    def kernel(x):
        out = nl.ndarray((1, 8), x.dtype, buffer=nl.shared_hbm)
        tile, zero = nl.load(x[0:1]), nl.zeros((1, 8), x.dtype)
        if nl.program_id(0) == 1:
            nisa.dma_copy(out, zero)
        else:
            nisa.tensor_copy(zero, tile)
            nisa.dma_copy(out, zero)
        return out

    racing = nki.jit(kernel)[2]
    with pytest.raises(RaceError):
        simulator.simulate(racing)(X + 1)
    np.testing.assert_array_equal(simulator.simulate(racing, relax={"lnc-race"})(X + 1), X[:1] + 1)


def looping(trips):
    """Core i runs its hardware loops `trips[i]` times and adds up 1s."""

    def kernel(x):
        me = nl.program_id(0)
        total = nl.full((4, 1), 0.0, nl.float32)

        def add(_):
            nisa.tensor_scalar(total, total, nl.add, 1.0)

        for n in trips[me]:
            nl.fori_loop(0, n, add)
        out = nl.ndarray((2, 4, 1), nl.float32, buffer=nl.shared_hbm)
        nl.store(out[me], total)
        return out

    return nki.jit(kernel)[2]


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize(
    ("trips", "text"),
    [
        ([(3,), (4,)], "hardware loop 1 runs 3 times on core 0 and 4 times on core 1"),
        ([(2, 5), (2, 1)], "hardware loop 2 runs 5 times on core 0 and 1 times on core 1"),
        ([(2,), (2, 1)], "hardware loop 2 runs 0 times on core 0 and 1 times on core 1"),
        ([(0,), (1,)], "hardware loop 1 runs 0 times on core 0 and 1 times on core 1"),
    ],
)
def test_unequal_trip_counts_of_two_cores_are_warned_of(trips, text, data):
    run = simulator.simulate(looping(trips), data=data)
    result = run(X)
    if data:
        np.testing.assert_array_equal(result[:, 0, 0], [sum(t) for t in trips])
    (line,) = run.run.cores[0].warnings
    assert line.startswith(text) and "NCC_IXGM002" in line and line.endswith("in add")
    with pytest.raises(SimulationError, match=text) as caught:
        simulator.simulate(looping(trips), data=data, strict=True)(X)
    assert caught.value.rule == "doubtful" and caught.value.location.function == "add"


def test_equal_trip_counts_and_one_core_are_not_warned_of():
    run = simulator.simulate(looping([(3, 2), (3, 2)]), strict=True)
    np.testing.assert_array_equal(run(X)[:, 0, 0], [5, 5])
    assert run.run.cores[0].warnings == []


def test_iterations_that_a_run_leaves_out_count_as_trips():
    run = simulator.simulate(looping([(9,), (9,)]), data=False, iterations=3)
    run(X)
    assert run.run.cores[0].warnings == []
    run = simulator.simulate(looping([(9,), (8,)]), data=False, iterations=3)
    run(X)
    assert "runs 9 times on core 0 and 8 times" in run.run.cores[0].warnings[0]
