"""The bytes that a kernel needs to move, and what it need not."""

from __future__ import annotations

import numpy as np
import pytest
from profile_helpers import hbm, nisa, nl, profile_of, sbuf, shapes

from nsa_neuron.simulator import cost
from nsa_neuron.simulator.profiler.needed import needed_bytes
from nsa_neuron.simulator.profiler.roofline import roofline_of


def needed(body, *sizes, dtype="float32"):
    return needed_bytes(profile_of(body, *shapes(*sizes, dtype=dtype)).run)


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2), ("uint8", 1)])
def test_elements_that_patterns_with_holes_touch_count_by_their_size(dtype, item):
    def body(a):
        nisa.dma_copy(sbuf((64, 16), a.dtype), a[0:128:2, 0:16])
        nisa.dma_copy(sbuf((64, 16), a.dtype), a[0:64, 8:24])

    touched = np.zeros((128, 64), bool)
    touched[0:128:2, 0:16] = touched[0:64, 8:24] = True
    assert needed(body, (128, 64), dtype=dtype) == touched.sum() * item


def test_rows_read_backwards_are_read():
    def body(a):
        nisa.dma_copy(sbuf((64, 32)), a.ap([[64, 64], [-1, 32]], offset=31))

    assert needed(body, (128, 64)) <= 64 * 64 * 4 and needed(body, (128, 64)) >= 64 * 32 * 4


def test_what_a_kernel_keeps_for_itself_is_not_needed_and_results_that_are_read_count_once():
    def body(a):
        kept = nl.ndarray((128, 64), nl.float32, buffer=nl.private_hbm)
        out, tile = hbm((128, 64)), sbuf((128, 64))
        nisa.dma_copy(tile, a)
        nisa.dma_copy(kept, tile)
        nisa.dma_copy(tile, kept)
        nisa.dma_copy(out, tile)
        nisa.dma_copy(tile, out)
        return out

    assert needed(body, (128, 64)) == 2 * 128 * 64 * 4


def test_run_time_rows_need_as_much_as_they_move_and_no_more_than_there_is():
    def body(times):
        def kernel(a):
            index = sbuf((1, 1), nl.int32)
            nisa.memset(index, 0)
            for _ in range(times):
                view = a.select(0, index)
                nisa.dma_copy(sbuf((128, 64)), view, dge_mode=nisa.dge_mode.hwdge)

        return kernel

    one = 128 * 64 * 4
    assert needed(body(1), (4, 128, 64)) == one
    assert needed(body(9), (4, 128, 64)) <= 4 * one


def test_spans_that_nest_and_touch_count_once():
    from nsa_neuron.simulator.profiler.needed import _union

    assert _union([(0, 100), (10, 20), (100, 110), (150, 160), (155, 158)]) == 120
    assert _union([]) == 0


def test_copies_between_tiles_carry_no_bytes_of_hbm():
    """So they do not lower the roof of the DMA engines; a copy within HBM moves two for one."""

    def body(a):
        tile = sbuf((128, 512))
        nisa.dma_copy(tile, a)
        nisa.dma_copy(sbuf((128, 512)), tile)
        nisa.dma_copy(sbuf((128, 512)), tile)

    p = cost.load()
    t = profile_of(body, *shapes((128, 512))).timeline
    assert roofline_of(t).dma == pytest.approx(16 * p.dma_rate)
    copy = profile_of(lambda a: nisa.dma_copy(hbm((128, 512)), a), *shapes((128, 512))).timeline
    assert roofline_of(copy).dma == pytest.approx(2 * 16 * p.dma_rate)
    assert roofline_of(copy).bound == ("HBM" if p.hbm_stack <= 32 * p.dma_rate else "DMA engines")
