"""Two versions of NKI: the names of each, and what a kernel of one is told as the other."""

from __future__ import annotations

import importlib
import re

import numpy as np
import pytest

from nsa_neuron import simulator
from nsa_neuron.simulator.nki import collectives as ncc
from nsa_neuron.simulator.nki import compiler
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl
from nsa_neuron.simulator.nki.launching import jit
from nsa_neuron.simulator.rules import versions

X = np.ones((8, 8), np.float32)
MODULES = (nl, nisa, ncc, compiler)


def has(name):
    return any(hasattr(module, name) for module in MODULES)


@pytest.mark.parametrize("version", versions.VERSIONS)
def test_each_version_has_its_names(version):
    with simulator.activate(nki=version):
        import nki

        assert nki.__version__ == f"{version}.0"
        for name in (*versions.ADDED, *versions.REMOVED):
            assert has(name) == versions.is_in(name, version), name
            assert any(name in dir(module) for module in MODULES) == has(name), name
        for _, instead in (*versions.ADDED.values(), *versions.REMOVED.values()):
            found = re.match(r"(nisa|nl|ncc)\.(\w+)", instead)
            home = {"nisa": nisa, "nl": nl, "ncc": ncc}
            assert not found or hasattr(home[found[1]], found[2]), instead


def test_the_version_is_the_runs_or_the_activations_or_the_newest():
    seen = []

    def kernel(x):
        seen.append(importlib.import_module("nsa_neuron.simulator.nki").__version__)
        nisa.dma_copy(x, x)

    simulator.simulate(kernel)(X.copy())
    with simulator.activate(nki="0.6"):
        simulator.simulate(kernel)(X.copy())
        jit(kernel)(X.copy())
        simulator.simulate(kernel, nki="0.7")(X.copy())
    simulator.simulate(kernel, nki="0.6")(X.copy())
    assert seen == ["0.7.0", "0.6.0", "0.6.0", "0.7.0", "0.6.0"]


@pytest.mark.parametrize(
    "call", [simulator.activate, lambda nki: simulator.simulate(X.sum, nki=nki)]
)
def test_an_unknown_version_is_refused_in_a_line(call):
    with pytest.raises(
        ValueError, match=r"^NKI '0\.5' is not simulated; versions: '0\.6', '0\.7'$"
    ):
        call(nki="0.5")


@pytest.mark.parametrize(
    ("kernel", "version", "text"),
    [
        (lambda x: nisa.scalar_load(x), "0.6", r"is of NKI 0\.7; NKI 0\.6 (.|\n)*register_load\("),
        (lambda x: nl.tiles(x, tile_shape=(8, 8)), "0.6", r"is of NKI 0\.7(.|\n)*slices"),
        (lambda x: ncc.all_to_all_v_prepare(), "0.6", r"write instead: ncc\.all_to_all_v\b"),
        (lambda x: x.data, "0.6", r"NkiTensor\.data: is of NKI 0\.7"),
        (lambda x: nl.dynamic_range(3), "0.7", r"removed in NKI 0\.7(.|\n)*nl\.fori_loop\("),
    ],
)
def test_a_name_of_the_other_version_says_which_and_what_to_write(kernel, version, text):
    with pytest.raises(simulator.SimulationError, match=text) as caught:
        simulator.simulate(kernel, nki=version)(X)
    assert caught.value.rule == "version" and caught.value.location.function == "<lambda>"


def test_a_profile_is_of_a_version():
    def kernel(x):
        for _ in nl.dynamic_range(2):
            nisa.dma_copy(x, x)

    with pytest.warns(simulator.SimulationWarning, match=r"deprecated in NKI 0\.6"):
        assert simulator.profile(kernel, nki="0.6")(X).time.central > 0
    with pytest.raises(simulator.SimulationError, match=r"removed in NKI 0\.7"):
        simulator.profile(kernel)(X)


@pytest.mark.parametrize("name", ["dynamic_range", "par_dim"])
def test_an_import_says_what_to_write_too(name):
    with simulator.activate(), pytest.raises(ImportError, match="write instead") as caught:
        exec(f"from nki.language import {name}")
    assert isinstance(caught.value, simulator.SimulationError)


def test_the_ranges_are_deprecated_in_0_7_once_per_line():
    def kernel(x):
        for _ in nl.affine_range(2):
            for _ in nl.static_range(2):
                nisa.dma_copy(x, x)

    run = simulator.simulate(kernel)
    with pytest.warns(simulator.SimulationWarning) as caught:
        run(X.copy())
    assert [str(w.message) for w in caught] == [
        f"nl.{name} is deprecated in NKI 0.7: write range"
        for name in ("affine_range", "static_range")
    ]
    assert {w.filename for w in caught} == {__file__}
    old = simulator.simulate(kernel, nki="0.6", strict=True)
    old(X.copy())
    assert old.run.cores[0].warnings == []
    simulator.simulate(kernel, strict=True)(X.copy())  # deprecated is not doubtful


def test_int64_is_of_0_7():
    wide = np.array([[2**40]], np.int64)

    def kernel(x):
        t = nl.ndarray(x.shape, x.dtype)
        nisa.dma_copy(t, x)
        out = nl.ndarray(x.shape, nl.int64, buffer=nl.shared_hbm)
        nisa.dma_copy(out, t)
        return out

    assert simulator.simulate(kernel)(wide)[0, 0] == 2**40
    with pytest.raises(simulator.SimulationError, match=r"NKI 0\.6 has no 64-bit types"):
        simulator.simulate(kernel, nki="0.6")(wide)

    def computes(x):
        t = nl.load(x)
        nisa.tensor_scalar(t, t, nl.add, 1)

    with pytest.raises(simulator.SimulationError, match="no engine computes with int64") as caught:
        simulator.simulate(computes)(wide)
    assert caught.value.rule == "dtype"

    def converts(x):
        nisa.dma_copy(nl.ndarray(x.shape, nl.int32), x)

    with pytest.raises(simulator.SimulationError, match="copied, not converted"):
        simulator.simulate(converts)(wide)
