"""Cores by bracket or environment; configurations of kernels, nested ones among them."""

from __future__ import annotations

import numpy as np
import pytest

from nsa_neuron import simulator
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl
from nsa_neuron.simulator.nki.compiler import AddressRotation, CompileConfig, SpecializationConfig
from nsa_neuron.simulator.nki.launching import jit

X = np.ones((8, 8), np.float32)
CHECKED = CompileConfig(barrier_check=True)


@jit
def cores(x):
    row = x[nl.program_id(0) : nl.program_id(0) + 1]
    nisa.dma_copy(row, row)
    return x


def number(kernel, **options):
    run = simulator.simulate(kernel, **options)
    run(X.copy())
    return run.run.lnc


@pytest.mark.parametrize(
    ("bracket", "environment", "version", "found"),
    [
        (None, None, "0.7", 1),
        (2, None, "0.7", 2),
        (None, "2", "0.7", 2),
        (2, "2", "0.7", 2),
        (None, "1", "0.6", 1),
        (2, "2", "0.6", 2),
        (2, "1", "0.7", "NCC_EVRF066"),
        (1, "2", "0.7", "NCC_EVRF066"),
        (2, "1", "0.6", "the runtime fails"),
        (None, "2", "0.6", r"kernel\[2\]"),
        (None, "3", "0.7", "is 1 or 2"),
    ],
)
def test_degree(monkeypatch, bracket, environment, version, found):
    if environment is not None:
        monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", environment)
    kernel = cores if bracket is None else cores[bracket]
    if isinstance(found, int):
        assert number(kernel, nki=version) == found
        return
    with pytest.raises(simulator.UsageError, match=found) as caught:
        number(kernel, nki=version)
    assert caught.value.rule == "lnc"


def nested(top, inner):
    @jit(**inner)
    def part(x):
        nisa.dma_copy(x, x)

    @jit(**top)
    def whole(x):
        part(x)

    return whole


ALLOWED = SpecializationConfig(allow_nested_config_override=True)


@pytest.mark.parametrize(
    ("top", "inner"),
    [
        ({}, {}),
        ({"compile_config": CHECKED}, {}),
        ({"compile_config": CHECKED}, {"compile_config": CompileConfig(barrier_check=True)}),
    ],
)
def test_a_nested_kernel_is_inlined(top, inner):
    run = simulator.simulate(nested(top, inner), strict=True)
    run(X.copy())
    assert run.run.cores[0].warnings == []


def test_a_nested_kernel_of_another_configuration_is_refused_or_warned_of():
    inner = {"compile_config": CHECKED}
    with pytest.raises(simulator.UsageError, match="allow_nested_config_override") as caught:
        simulator.simulate(nested({}, inner))(X.copy())
    assert caught.value.rule == "configuration"
    run = simulator.simulate(nested({"specialization_config": ALLOWED}, inner))
    with pytest.warns(simulator.SimulationWarning, match="not its own"):
        run(X.copy())


def test_in_0_6_nested_kernels_are_warned_of_and_configurations_refused():
    with pytest.warns(simulator.SimulationWarning, match=r"from NKI 0\.7 on"):
        simulator.simulate(nested({}, {}), nki="0.6")(X.copy())
    with pytest.raises(simulator.UsageError, match=r"of NKI 0\.7; NKI 0\.6") as caught:
        simulator.simulate(nested({"compile_config": CHECKED}, {}), nki="0.6")(X.copy())
    assert caught.value.rule == "version"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: CompileConfig(dead_code_elim=1), "is a bool"),
        (lambda: CompileConfig(address_rotation="AUTO"), "is a AddressRotation"),
        (lambda: SpecializationConfig(allow_nested_config_override="yes"), "is a bool"),
        (lambda: jit(lambda x: x, compile_config={}), "takes a nki.compiler.CompileConfig"),
        (lambda: jit(lambda x: x, specialization_config=CHECKED), "SpecializationConfig"),
    ],
)
def test_values_of_another_kind(make, text):
    with pytest.raises(simulator.UsageError, match=text) as caught:
        make()
    assert caught.value.rule == "configuration"


def test_a_misspelt_configuration_is_not_lost():
    with pytest.raises(simulator.UsageError, match=r"has no compile_confg=(.|\n)*compile_config="):
        jit(lambda x: x, compile_confg=CHECKED)


def test_prefetch_excludes_a_ring_of_the_environment(monkeypatch):
    assert CompileConfig(address_rotation=AddressRotation.ENABLE, prefetch_auto=True)
    monkeypatch.setenv("NKI_PREFETCH_RING_SIZE", "4")
    with pytest.raises(simulator.UsageError, match="NKI_PREFETCH_RING_SIZE"):
        CompileConfig(prefetch_auto=True)
