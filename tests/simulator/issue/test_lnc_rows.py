"""Races of rows chosen at run time, and of views with elements of another size."""

from __future__ import annotations

import numpy as np
import pytest

from nsa_neuron import simulator
from nsa_neuron.simulator import RaceError, nki
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

APART = ((0, 1, 2, 3), (4, 5, 6, 7))
MEETING = ((0, 1, 2, 3), (4, 5, 3, 7))
CROSSED = (APART[1], APART[0])


def run(body, rows=APART, **options):
    """x after a body of both cores, which gets x, its rows and its number."""

    def kernel(x, index):
        me = nl.program_id(0)
        chosen = nl.load(index[me])
        body(x, x.ap([[8, 4], [1, 8]], vector_offset=chosen, indirect_dim=0), me, **options)

    x = np.zeros((8, 8), np.float32)
    index = np.array(rows, np.uint32).reshape(2, 4, 1)
    simulator.simulate(nki.jit(kernel)[2])(x, index)
    return x


def refused(*args, **options):
    with pytest.raises(RaceError) as caught:
        run(*args, **options)
    assert caught.value.rule == "lnc-race"


def scattered(x, chosen, me, same=False):
    tile = nl.full((4, 8), 1.0 if same else me + 1.0, nl.float32)
    nisa.dma_copy(chosen, tile, dge_mode=nisa.dge_mode.swdge)


def added(x, chosen, me):
    nisa.dma_compute(chosen, [nl.full((4, 8), me + 1.0, nl.float32), chosen], nl.add)


@pytest.mark.parametrize("body", [scattered, added])
def test_rows_that_both_cores_scatter_to_are_a_race(body):
    want = np.repeat([1.0, 2.0], 4)[:, None] * np.ones(8)
    np.testing.assert_array_equal(run(body), want)
    np.testing.assert_array_equal(run(body, CROSSED), want[::-1])
    refused(body, MEETING)


def test_the_same_rows_with_the_same_values_are_no_race():
    assert run(scattered, MEETING, same=True)[[0, 1, 2, 3, 4, 5, 7]].all()


def fetched(x, chosen, me, barrier, add):
    """Own rows are stored plainly, then chosen ones are read."""
    nl.store(x[4 * me : 4 * me + 4], nl.full((4, 8), me + 1.0, nl.float32))
    if barrier:
        nisa.core_barrier(x, (0, 1))
    tile = nl.zeros((4, 8), nl.float32)
    if add:
        nisa.dma_compute(tile, [chosen, tile], nl.add)
    else:
        nisa.dma_copy(tile, chosen, dge_mode=nisa.dge_mode.swdge)
    if barrier:
        nisa.core_barrier(x, (0, 1))
        nl.store(x[4 * me : 4 * me + 4], tile)


@pytest.mark.parametrize("add", [False, True])
def test_rows_of_the_other_core_are_gathered_after_both_have_met(add):
    run(fetched, APART, barrier=False, add=add)
    for rows in (CROSSED, MEETING):
        refused(fetched, rows, barrier=False, add=add)
    swapped = run(fetched, CROSSED, barrier=True, add=add)
    assert swapped[:, 0].tolist() == [2.0] * 4 + [1.0] * 4


@pytest.mark.parametrize("body", [scattered, added])
def test_rows_that_the_other_core_has_read_are_not_changed_without_meeting(body):
    def reads_or_changes(x, chosen, me):
        if me:
            body(x, chosen, me)
        else:
            nl.load(x[0:4])

    run(reads_or_changes)
    refused(reads_or_changes, MEETING)


def halves(x, chosen, me, first, last):
    """Core 0 stores the first three 16-bit pieces of row 2, core 1 those from `first` to `last`."""
    part = slice(first, last) if me else slice(0, 3)
    pieces = x.view(nl.uint16)[2:3, part]
    nisa.dma_copy(pieces, nl.full((1, part.stop - part.start), 7 + me, nl.uint16))


def test_views_of_smaller_elements_race_where_they_share_an_element():
    pieces = run(halves, first=4, last=8)[2].view(np.uint16)
    assert pieces[:9].tolist() == [7] * 3 + [0] + [8] * 4 + [0]
    for first in (2, 3):
        refused(halves, first=first, last=6)


def test_a_view_races_with_a_plain_store_of_the_same_element():
    def body(x, chosen, me, column):
        if me:
            nl.store(x[2:3, column : column + 1], nl.full((1, 1), 5.0, nl.float32))
        else:
            nisa.dma_copy(x.view(nl.uint16)[2:3, 2:4], nl.full((1, 2), 7, nl.uint16))

    for column in (0, 2):
        run(body, column=column)
    refused(body, column=1)
