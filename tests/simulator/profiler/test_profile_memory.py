"""What a tile holds of its memory, when, and what is drawn of it."""

from __future__ import annotations

import numpy as np
import pytest
from profile_helpers import hbm, nisa, nl, profile_of, psum, sbuf

from nsa_neuron.simulator.machine.trn2 import TRN2
from nsa_neuron.simulator.profiler import memory


def used(body, lnc=1, core=0, **options):
    t = profile_of(body, lnc=lnc, **options).timeline
    return t, memory.usage(t, core, TRN2)


def test_a_tile_of_32_partitions_takes_a_quarter_of_its_bytes():
    def body():
        nisa.memset(sbuf((32, 512)), 0.0)
        nisa.memset(psum((64, 16)), 0.0)  # a bank is one of all partitions

    t, found = used(body)
    assert found["sbuf"][1].max() == 2048 / 4 and found["psum"][1].max() == 2048
    at, steps = found["sbuf"]
    assert list(steps) == [512, 0] and list(at) == [0.0, t.free[0]]


def test_a_transfer_holds_its_tile_until_its_end_an_engine_until_its_next_instruction():
    def body():
        one, other = sbuf((128, 512)), sbuf((128, 256))
        nisa.dma_copy(one, hbm((128, 512)))
        nisa.memset(other, 0.0)

    t, found = used(body)
    at, steps = found["sbuf"]
    assert list(at) == sorted({0.0, t.end[0], t.free[1]})
    assert list(steps) == [3072, 2048, 0]


def test_a_tile_is_held_until_its_last_user_ends_not_the_last_that_was_issued():
    """A transfer of 1 MB is longer than the copy of a column that is issued behind it."""

    def body():
        tile, column = sbuf((128, 2048)), sbuf((128, 1))
        nisa.memset(tile, 0.0)
        nisa.dma_copy(hbm((128, 2048)), tile)
        nisa.tensor_copy(column, tile[:, :1], engine=nisa.engine.vector)

    t, found = used(body)
    assert t.free[2] < t.end[1]
    at, steps = found["sbuf"]
    assert at.max() == t.end[1] and list(steps) == [8192, 8196, 8192, 0]


def test_a_register_s_load_holds_nothing():
    def body():
        held, tile = sbuf((1, 1), nl.int32), sbuf((128, 512))
        nisa.memset(held, 1)
        nisa.memset(tile, 0.0)
        nisa.register_load(nisa.register_alloc(), held)

    t, found = used(body)
    at, _ = found["sbuf"]
    assert at.max() == pytest.approx(t.free[1])


def test_each_core_has_a_memory_of_its_own():
    def body():
        if nl.program_id(0) == 0:
            nisa.memset(sbuf((128, 64)), 0.0)
        nisa.memset(sbuf((128, 512)), 0.0)

    peaks = [used(body, 2, core)[1]["sbuf"][1].max() for core in (0, 1)]
    assert peaks == [2048, 2048]
    t, found = used(body, 2, 1)
    assert found["sbuf"][0].max() == t.free[2]


def test_addressed_tiles_of_psum_count_in_banks_and_each_byte_once():
    def body():
        one, two, low = (
            psum((rows, width), address=(first, byte))
            for rows, width, first, byte in ((128, 16, 0, 0), (128, 16, 0, 64), (32, 16, 0, 4096))
        )
        for tile in (one, two, low):
            nisa.memset(tile, 0.0, engine=nisa.engine.vector)
        nisa.tensor_tensor(sbuf((128, 16)), one, sbuf((128, 16)), nl.add)
        nisa.tensor_tensor(sbuf((128, 16)), two, sbuf((128, 16)), nl.add)
        nisa.tensor_copy(sbuf((32, 16)), low, engine=nisa.engine.vector)

    _, found = used(body)
    # The two tiles of bank 0 reach into bank 1 by the 64 bytes that the second is shifted.
    assert found["psum"][1].max() == 2048 + 64 + 2048


@pytest.mark.parametrize("bins", [1, 2, 3, 10])
def test_an_envelope_never_ends_below_what_is_used(bins):
    at, steps = np.arange(20.0), np.arange(20) % 7 + 1
    times, most = memory.envelope(at, steps, 20.0, bins)
    assert times[0] == 0 and times[-1] == 20
    for k in range(20):
        assert most[np.searchsorted(times, k, side="right") - 1] >= steps[k]
