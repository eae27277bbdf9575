"""Truth and equality of tensors: what published kernels ask is answered, all else is refused."""

from __future__ import annotations

import numpy as np
import pytest

from nsa_neuron import simulator
from nsa_neuron.simulator import SimulationError
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

X = np.arange(8 * 16, dtype=np.float32).reshape(8, 16)


def stored(tile):
    out = nl.ndarray(tile.shape, dtype=tile.dtype, buffer=nl.shared_hbm)
    nl.store(out, tile)
    return out


def optional_bias(a, bias=None):
    x = nl.load(a)
    if bias:
        nisa.tensor_tensor(x, x, nl.load(bias), op=nl.add)
    return stored(x)


def test_an_optional_tensor_is_true_whatever_its_elements():
    run = simulator.simulate(optional_bias)
    np.testing.assert_array_equal(run(X, X), 2 * X)
    (line,) = run.run.cores[0].warnings
    assert "'bias'" in line and "!= None" in line
    assert line.endswith("in optional_bias") and f"{__file__}:" in line
    np.testing.assert_array_equal(run(X, np.zeros_like(X)), X)
    np.testing.assert_array_equal(run(X), X)
    assert run.run.cores[0].warnings == []


def asserting(compare, **options):
    def kernel(a):
        x = nl.load(a)
        assert compare(x)
        return stored(x)

    return simulator.simulate(kernel, **options)


def test_an_assert_that_holds_for_every_element_runs():
    run = asserting(lambda x: nl.equal(nl.add(x, x), nl.multiply(x, 2.0)))
    np.testing.assert_array_equal(run(X), X)
    assert "always true in NKI" in run.run.cores[0].warnings[0]


FALSE = {
    "one element": (lambda x: nl.not_equal(x, 5.0), "1 of 128 elements"),
    "a slice": (lambda x: nl.less(x, 100.0)[0:8, 12:16], "8 of 32 elements"),
    "every row": (lambda x: nl.all(nl.greater_equal(x, 16.0), axis=1), "1 of 8 elements"),
    "not": (lambda x: nl.logical_not(nl.less(x, 1000.0)), "128 of 128 elements"),
    "bool": (lambda x: nl.greater(x, 3.0, dtype=nl.bool), "4 of 128 elements"),
    "scalar first": (lambda x: nl.less(3.0, x), "4 of 128 elements"),
}


@pytest.mark.parametrize("what", FALSE)
def test_an_assert_that_is_false_somewhere_is_refused_not_passed_over(what):
    compare, count = FALSE[what]
    with pytest.raises(SimulationError, match=count) as caught:
        asserting(compare)(X)
    assert caught.value.rule == "tensor-truth"
    np.testing.assert_array_equal(asserting(compare, relax=["tensor-truth"])(X), X)


def test_without_data_a_comparison_is_true_as_on_the_device():
    run = asserting(lambda x: nl.less(x, -1.0), data=False)
    assert run(X).shape == X.shape
    assert len(run.run.cores[0].warnings) == 1


def test_what_can_only_mean_the_object_is_answered():
    def kernel(a, mode="auto"):
        x = nl.load(a)
        y = nl.copy(x)
        known = {x: "x", y: "y"}
        assert x != None and not x == None  # noqa: E711  as in nki-library
        assert known[x] == "x" and known[y] == "y"
        assert x in (None, x) and x not in (None, "auto") and x != "auto"
        return stored(x)

    np.testing.assert_array_equal(simulator.simulate(kernel)(X), X)


@pytest.mark.parametrize("other", [1, 1.0, True, np.float32(1), np.bool_(True), np.ones((8, 16))])
def test_what_could_mean_the_elements_is_refused(other):
    def kernel(a):
        x = nl.load(a)
        return stored(x) if x == other else None

    with pytest.raises(SimulationError, match=r"nl\.equal") as caught:
        simulator.simulate(kernel)(X)
    assert caught.value.rule == "legacy-api"
    assert caught.value.location.filename == __file__


@pytest.mark.parametrize(("other", "rule"), [(1, "legacy-api"), (np.float32(1), "view")])
def test_so_it_is_with_the_tensor_on_the_right(other, rule):
    def kernel(a):
        x = nl.load(a)
        return stored(x) if other == x else None

    with pytest.raises(SimulationError) as caught:
        simulator.simulate(kernel)(X)
    assert caught.value.rule == rule  # NumPy first tries to iterate over the tensor
