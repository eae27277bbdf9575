"""Kernels as objects: the bracket, edges between named instructions, what each rank is given."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest

from nsa_neuron import simulator
from nsa_neuron.simulator import PerRank, SimulationError
from nsa_neuron.simulator.issue.ranks import World, of_rank
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

T = np.ones((4, 8), np.float32)


def three(x):
    """Two loads that nothing orders, and a store of the first."""
    a, b = nl.ndarray((4, 8), x.dtype), nl.ndarray((4, 8), x.dtype)
    out = nl.ndarray((4, 8), x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(a, x, name="first")
    nisa.dma_copy(b, x, name="second")
    nisa.dma_copy(out, a, name="third")
    return out


def edges(kernel):
    run = simulator.simulate(kernel)
    run(T)
    return [
        {(i.name, j.name) for i in record.instructions for j in i.after} for record in run.run.cores
    ]


def test_edges_are_between_instructions_of_their_names_on_every_core():
    assert edges(simulator.Kernel(three)) == [set()]
    kernel = simulator.Kernel(three).with_schedule([("third", "second")])
    assert edges(kernel) == [{("third", "second")}]
    kernel = kernel.with_schedule([("third", ["first", "second"]), ("second", "first")])
    assert len(kernel.schedule) == 3
    both = {("third", "second"), ("third", "first"), ("second", "first")}
    assert edges(kernel) == [both]
    assert edges(kernel[2]) == [both, both]


@pytest.mark.parametrize("edge", [("third", "absent"), ("absent", "first"), ("third", ["absent"])])
def test_an_edge_of_no_instruction_names_those_there_are(edge):
    with pytest.raises(SimulationError) as caught:
        simulator.simulate(simulator.Kernel(three).with_schedule([edge]))(T)
    error = caught.value
    assert (error.rule, error.value) == ("usage", "absent")
    assert error.limit == ["first", "second", "third"]


def test_the_bracket_takes_one_or_two_cores():
    kernel = simulator.Kernel(three)
    assert repr(kernel) == "<nki kernel three>" and kernel.bracket is None
    for given, cores in ((1, 1), (2, 2), ((2,), 2), (np.int64(2), 2)):
        made = kernel[given]
        assert made.bracket == cores and type(made.bracket) is int
        assert made.fn is three and repr(made) == f"<nki kernel three[{cores}]>"
        assert made.degree(simulator.simulate(made).options) == made.lnc == cores
    for wrong in (0, 3, -1, True, 1.0, (1, 1), (), "2", None):
        with pytest.raises(SimulationError) as caught:
            kernel[wrong]
        assert caught.value.rule == "lnc" and caught.value.limit == (1, 2)
    kept = kernel.with_schedule([("third", "second")])[2]
    assert kept.schedule == (("third", "second"),)


def test_a_kernel_knows_its_launch():
    seen = []

    def kernel(x):
        seen.append((nl.num_programs(), nl.program_ndim(), nl.program_id(0)))
        return three(x)

    simulator.simulate(kernel)(T)
    simulator.simulate(simulator.Kernel(kernel, 2))(T)
    assert seen[0] == (1, 0, 0) and sorted(seen[1:]) == [(2, 1, 0), (2, 1, 1)]
    for function in (nl.num_programs, nl.program_ndim, nl.program_id):
        with pytest.raises(SimulationError):
            function()


def test_memories_know_what_they_are():
    buffers = (nl.sbuf, nl.psum, nl.private_hbm, nl.shared_hbm, nl.hbm)
    asked = (nl.is_sbuf, nl.is_psum, nl.is_hbm, nl.is_on_chip)
    told = [tuple(function(buffer) for function in asked) for buffer in buffers]
    hbm = (False, False, True, False)
    assert told == [(True, False, False, True), (False, True, False, True), hbm, hbm, hbm]


def test_printing_shows_elements_where_there_are_some(capsys):
    def kernel(x):
        nl.device_print("tile:", nl.load(x))
        return x

    simulator.simulate(kernel)(np.full((1, 2), 3.0, np.float32))
    assert capsys.readouterr().out == "tile: [[3. 3.]]\n"
    simulator.simulate(kernel, data=False)(np.full((1, 2), 3.0, np.float32))
    assert capsys.readouterr().out == "tile: NkiTensor((1, 2), float32, sbuf, offset=0)\n"


def test_generations_are_in_order():
    two, three_, four = nisa.nc_version.gen2, nisa.nc_version.gen3, nisa.nc_version.gen4
    assert two < three_ < four and four > three_ > two
    assert two <= two <= three_ and four >= four >= three_
    assert not (two < two or two > two or three_ <= two or two >= three_)


Pair = namedtuple("Pair", "left right")


def test_ranks_get_their_own_values_and_copies_of_shared_ones():
    array = np.arange(3)
    given = (PerRank([1, 2]), {"k": PerRank("ab"), "a": array}, array)
    for rank, (number, letter) in enumerate([(1, "a"), (2, "b")]):
        got = of_rank(given, rank, 2)
        assert got[0] == number and got[1]["k"] == letter
        for copy in (got[1]["a"], got[2]):
            assert copy is not array and (copy == array).all()
    pair, config = Pair(PerRank([1, 2]), array), SimpleNamespace(a=1)
    assert type(of_rank(pair, 0, 2)) is Pair
    copied = of_rank(config, 0, 2)
    assert copied == config and copied is not config
    assert of_rank(three, 0, 2) is three and of_rank("text", 1, 2) == "text"
    for count in (1, 3):
        with pytest.raises(SimulationError) as caught:
            of_rank(given, 0, count)
        assert (caught.value.rule, caught.value.value, caught.value.limit) == ("usage", 2, count)


@pytest.mark.parametrize(
    ("ranks", "lnc", "thread", "name"),
    [(1, 2, 1, "core 1"), (3, 1, 2, "rank 2"), (3, 2, 0, "rank 0 core 0"),
     (3, 2, 5, "rank 2 core 1"), (3, 2, 2, "rank 1 core 0")],
)  # fmt: skip
def test_threads_are_named_by_rank_and_core(ranks, lnc, thread, name):
    world = World(ranks, lnc)
    assert world._describe(thread) == name
    rule = "lnc-deadlock" if ranks == 1 else "collective-deadlock"
    assert world.scheduler._rule == rule and world.scheduler._count == ranks * lnc
