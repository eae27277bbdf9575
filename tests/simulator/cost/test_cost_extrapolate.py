"""Kernels too long or too dependent on data to run: trip counts given, time extrapolated."""

from __future__ import annotations

import numpy as np
import pytest
from cost_helpers import nisa, nl, psum, record, sbuf

from nsa_neuron import simulator
from nsa_neuron.simulator import cost
from nsa_neuron.simulator.cost import trips
from nsa_neuron.simulator.cost.extrapolate import extrapolate
from nsa_neuron.simulator.kernels import matmul


def looped(count):
    """Copies as many tiles as the tensor `count` says."""
    register = nisa.register_alloc()
    held = nl.ndarray((1, 1), nl.int32)
    nisa.dma_copy(held, count)
    nisa.register_load(register, held)

    def body(_):
        nisa.tensor_copy(sbuf((128, 512)), sbuf((128, 512)))

    nl.fori_loop(0, register, body)
    out = nl.ndarray((1, 1), nl.int32, buffer=nl.shared_hbm)
    nisa.dma_copy(out, held)
    return out


@pytest.mark.parametrize(
    ("given", "expected", "said"),
    [
        ("5", 5, "the constant 5"),
        ("3,9", 3, "a trace of 2"),
        ("draw:4", 4, "a distribution of 1 values"),
    ],
)
def test_trip_counts_replace_data(given, expected, said):
    counts = trips.parse(given)
    light = simulator.simulate(looped, data=False, unknown=counts)
    light(simulator.ShapeDtype((1, 1), np.int32))
    assert sum(i.opcode == "tensor_copy" for i in light.run.instructions) == expected
    assert said in counts.describe() and f"mean {expected}" in counts.describe()


def test_given_the_true_counts_the_timeline_is_that_of_the_data():
    full = simulator.simulate(looped, relax={"uninitialized-read"})
    full(np.array([[6]], np.int32))
    light = simulator.simulate(looped, data=False, unknown=trips.constant(6))
    light(simulator.ShapeDtype((1, 1), np.int32))
    assert np.array_equal(cost.central(full.run).end, cost.central(light.run).end)


def test_a_trace_that_is_too_short_is_refused():
    counts = trips.trace([])
    with pytest.raises(trips.TraceExhaustedError, match="holds 0 trip counts"):
        simulator.simulate(looped, data=False, unknown=counts)(
            simulator.ShapeDtype((1, 1), np.int32)
        )


@pytest.mark.parametrize("text", ["many", "draw:", "normal:3"])
def test_unreadable_trip_counts(text):
    with pytest.raises(ValueError, match="write 8, a trace"):
        trips.parse(text)


@pytest.mark.parametrize("text", ["-1", "3,-1", "draw:3,-1"])
def test_trip_counts_are_not_negative(text):
    with pytest.raises(ValueError, match="-1 is less than none"):
        trips.parse(text)


def run_matmul(rows):
    kernel = simulator.simulate(matmul.loads_hoisted, data=False)
    kernel(
        simulator.ShapeDtype((512, rows), np.float32), simulator.ShapeDtype((512, 1024), np.float32)
    )
    return kernel.run


def causal(tiles):
    """Two nested loops, as causal attention has over its tiles."""

    def body():
        for i in range(tiles):
            for _ in range(i + 1):
                acc = psum((128, 512))
                nisa.nc_matmul(acc, sbuf((128, 128)), sbuf((128, 512)))
                nisa.activation(sbuf((128, 512)), nl.exp, acc)

    return record(body)


@pytest.mark.parametrize(
    ("run_at", "sizes", "target", "degree"),
    [
        (run_matmul, (3072, 3584, 4096), 8192, 1),
        (causal, (16, 20, 24, 28), 48, 2),
    ],
)
def test_extrapolation_is_within_two_percent_of_the_full_schedule(run_at, sizes, target, degree):
    guess = extrapolate(run_at, sizes, target, degree)
    full = cost.estimate(run_at(target)).band
    for level in cost.LEVELS:
        assert getattr(guess.band, level) == pytest.approx(getattr(full, level), rel=0.02)
    assert f"extrapolated to {target}" in guess.describe()


def test_the_wrong_degree_is_refused():
    with pytest.raises(ValueError, match="another degree than 1"):
        extrapolate(causal, (20, 24, 32), 64, 1)
    with pytest.raises(ValueError, match="needs 3 increasing sizes"):
        extrapolate(causal, (8, 12), 64, 1)


def test_sizes_that_have_not_filled_sbuf_are_refused():
    with pytest.raises(ValueError, match="have not filled SBUF"):
        extrapolate(run_matmul, (512, 768, 1024), 8192, 1)


def cleared(tiles):
    """So many tiles of 2 KiB of each partition, of which SBUF has room for 104 (208 KiB)."""

    def body():
        for _ in range(tiles):
            nisa.memset(sbuf((128, 512)), 0.0)

    return record(body)


@pytest.mark.parametrize(
    ("sizes", "target", "filled"),
    [
        ((150, 208, 260), 400, True),
        ((150, 206, 260), 400, False),  # once is not enough: loads still run ahead
        ((50, 60, 70), 207, True),  # it is not filled twice at the target either
        ((50, 60, 70), 209, False),
    ],
)
def test_sbuf_must_be_filled_twice_if_it_will_be(sizes, target, filled):
    if filled:
        assert extrapolate(cleared, sizes, target).target == target
        return
    with pytest.raises(ValueError, match="have not filled SBUF twice"):
        extrapolate(cleared, sizes, target)
