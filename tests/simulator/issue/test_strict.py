"""Doubtful things are warned of with their line, and refused in a strict run."""

from __future__ import annotations

import numpy as np
import pytest

from nsa_neuron import simulator
from nsa_neuron.simulator import SimulationError
from nsa_neuron.simulator.command import simulate as cli
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl
from nsa_neuron.simulator.run import cores

X = np.arange(8 * 16, dtype=np.float32).reshape(8, 16)


def run_time_column(how):
    """Column 3, its index known at run time only, of a tile that `how` reads."""

    def kernel(x):
        t = nl.load(x)
        index = nl.full((1, 1), 3, dtype=nl.int32, buffer=nl.sbuf)
        column = t.ap([[16, 8], [1, 1]], 0, scalar_offset=index, indirect_dim=1)
        out = nl.ndarray((8, 1), nl.float32, buffer=nl.sbuf)
        how(out, column)
        result = nl.ndarray((8, 1), nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(result, out)
        return result

    return kernel


def doubled(out, column):
    nisa.tensor_scalar(out, column, nl.multiply, 2.0)


def test_a_run_time_offset_of_a_compute_operand_is_warned_of_with_its_evidence():
    run = simulator.simulate(run_time_column(doubled))
    np.testing.assert_array_equal(run(X), 2 * X[:, 3:4])
    (line,) = run.run.cores[0].warnings
    assert line.startswith("tensor_scalar: a run-time offset")
    assert "NCC_IBIR829" in line and line.endswith("in doubled")


def test_a_strict_run_refuses_it_at_its_line():
    with pytest.raises(SimulationError, match="NCC_IBIR829") as caught:
        simulator.simulate(run_time_column(doubled), strict=True)(X)
    assert caught.value.rule == "doubtful"
    assert caught.value.location.function == "doubled"


def test_a_copy_may_start_at_a_run_time_offset():
    run = simulator.simulate(run_time_column(nisa.tensor_copy), strict=True)
    np.testing.assert_array_equal(run(X), X[:, 3:4])
    assert run.run.cores[0].warnings == []


def test_a_dma_at_a_run_time_offset_into_sbuf_is_warned_of():
    run = simulator.simulate(run_time_column(nisa.dma_copy))
    with pytest.warns(simulator.SimulationWarning, match="issue 1373"):
        np.testing.assert_array_equal(run(X), X[:, 3:4])


@pytest.mark.parametrize("inside", [True, False])
def test_a_matmul_in_a_loop_writes_psum_of_its_body_or_is_warned_of(inside):
    def kernel(x):
        t = nl.load(x)
        before = nl.ndarray((16, 16), nl.float32, buffer=nl.psum)
        out = nl.ndarray((16, 16), nl.float32, buffer=nl.shared_hbm)

        def body(i):
            made = nl.ndarray((16, 16), nl.float32, buffer=nl.psum) if inside else before
            nisa.nc_matmul(made, t, t, accumulate=False)
            copy = nl.ndarray((16, 16), nl.float32, buffer=nl.sbuf)
            nisa.tensor_copy(copy, made)
            nisa.dma_copy(out, copy)

        nl.fori_loop(0, 2, body)
        return out

    run = simulator.simulate(kernel)
    run(X)
    lines = run.run.cores[0].warnings
    assert len(lines) == (not inside)
    assert all("NCC_IBIR092" in line and line.endswith("in body") for line in lines)


def test_a_program_too_long_for_the_compiler_is_warned_of(monkeypatch):
    def kernel(x, unrolled):
        def body(i):
            nisa.dma_copy(x, x)

        for i in range(12) if unrolled else ():
            body(i)
        nl.fori_loop(0, 12, body)

    monkeypatch.setattr(cores, "PROGRAM", 12)
    for unrolled in (False, True):
        run = simulator.simulate(kernel)
        run(X.copy(), unrolled)
        assert [
            ("NCC_EBVF030" in w, "13 instructions" in w) for w in run.run.cores[0].warnings
        ] == [(True, True)] * unrolled


def test_activation_and_command_line_can_be_strict(tmp_path, capsys):
    def kernel(x):
        assert nl.equal(nl.load(x), nl.load(x))
        return x

    with simulator.activate(strict=True), pytest.raises(SimulationError, match="always true"):
        simulator.simulate(kernel)(X)
    simulator.simulate(kernel)(X)
    (tmp_path / "k.py").write_text(
        "import nki\nimport nki.language as nl\n\n@nki.jit\ndef k(a):\n"
        "    x = nl.load(a)\n    if x:\n        nl.store(a, x)\n"
    )
    words = [f"{tmp_path / 'k.py'}::k", "--arg", "a=ones:8x8"]
    assert cli.simulate_main(words) == 0
    assert "  warning: the truth of tensor" in capsys.readouterr().out
    assert cli.simulate_main([*words, "--strict"]) == 1
    assert "rule doubtful" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("start", "offset", "warned"), [(0, 16, False), (16, None, False), (16, 16, True)]
)
def test_an_offset_given_for_a_view_that_has_one_is_warned_of(start, offset, warned):
    """nki-aps.rst: pattern and offset count the storage. NkiTensor.ap: the offset adds up."""

    def kernel(x):
        row = x[start // 16 : 8, :].ap([[16, 1], [1, 16]], offset=offset)
        out = nl.ndarray((1, 16), nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(out, row)
        return out

    run = simulator.simulate(kernel)
    np.testing.assert_array_equal(run(X), X[1:2])
    assert ["nki-aps.rst" in line for line in run.run.cores[0].warnings] == [True] * warned


def two_groups(order, bytes_apart=256, together=False, every=1):
    """Matmuls into two slices of one PSUM tensor; `order` names the slice of each.

    `together`: a matmul of zeros into all of it begins both. `every`: columns from one of a slice
    to its next.
    """

    def kernel(x):
        t = nl.load(x)
        width = bytes_apart // 4
        both = nl.ndarray((16, width + 16 * every), nl.float32, buffer=nl.psum)
        seen = set()
        if together:
            zeros = nl.zeros((8, width + 16), nl.float32)
            nisa.nc_matmul(both, zeros[:, 0:16], zeros, accumulate=False)
            seen = {0, 1}
        for which in order:
            part = both[:, which * width : which * width + 16 * every : every]
            nisa.nc_matmul(part, t, t, accumulate=which in seen)
            seen.add(which)
        sums = nl.ndarray((16, 32), nl.float32, buffer=nl.sbuf)
        for which in (0, 1):
            part = both[:, which * width : which * width + 16 * every : every]
            nisa.tensor_copy(sums[:, which * 16 : which * 16 + 16], part)
        out = nl.ndarray((16, 32), nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(out, sums)
        return out

    return kernel


def test_a_group_begun_in_the_whole_bank_is_one():
    run = simulator.simulate(two_groups([0, 1, 0, 1], together=True), strict=True)
    product = (X.astype(np.float64).T @ X).astype(np.float32)
    np.testing.assert_allclose(run(X), np.tile(2 * product, 2), rtol=1e-6)


@pytest.mark.parametrize(
    ("order", "bytes_apart", "every", "warned"),
    [
        ([0, 0, 1, 1], 256, 1, False),  # one after the other
        ([0, 1, 0, 1], 256, 1, True),
        ([0, 1, 1, 0], 256, 1, True),
        ([0, 1, 0, 1], 4, 2, True),  # each in the other's gaps
        ([0, 0, 1, 1], 4, 2, False),
        ([0, 1, 0, 1], 2048, 1, False),  # in two banks
    ],
)
def test_groups_that_interleave_in_one_psum_bank_are_warned_of(order, bytes_apart, every, warned):
    run = simulator.simulate(two_groups(order, bytes_apart, every=every))
    product = (X.astype(np.float64).T @ X).astype(np.float32)
    np.testing.assert_allclose(run(X), np.tile(2 * product, 2), rtol=1e-6)
    lines = run.run.cores[0].warnings
    assert len(lines) == warned
    assert all("another group began" in line and line.endswith("in kernel") for line in lines)
    if warned:
        with pytest.raises(SimulationError, match="another group") as caught:
            simulator.simulate(two_groups(order, bytes_apart, every=every), strict=True)(X)
        assert caught.value.rule == "doubtful"
