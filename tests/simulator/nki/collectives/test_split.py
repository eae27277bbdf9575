"""Collectives of run-time sizes in two parts: prepare, then trigger."""

from __future__ import annotations

import numpy as np
import pytest

from nsa_neuron import simulator
from nsa_neuron.simulator import PerRank, nki
from nsa_neuron.simulator.nki import collectives as ncc
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

ALL = ncc.ReplicaGroup([[0, 1, 2, 3]])
DATA = [np.arange(20, dtype=np.float32) + 100 * r for r in range(4)]
META = [
    np.array([[(r + k) % 4 for k in range(4)], [2 * k for k in range(4)], [77] * 4], np.uint32)
    for r in range(4)
]
BLANK = np.full(16, -1, np.float32)


def run(function, data=True):
    """`function(src, dst, table, fill)` on four ranks of two cores; `fill()` fills the sources."""

    @nki.jit
    def kernel(x, meta, blank):
        src, dst = (nl.ndarray(t.shape, t.dtype, buffer=nl.shared_hbm) for t in (x, blank))
        table = nl.ndarray(meta.shape, meta.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst, blank)
        nisa.dma_copy(table, meta)
        function(src, dst, table, lambda: nisa.dma_copy(src, x))
        return dst, table

    made = simulator.simulate(kernel[2], ranks=4, data=data)
    return made, made(PerRank(DATA), PerRank(META), BLANK)


@pytest.mark.parametrize("name", ["all_to_all_v", "all_gather_v"])
def test_both_parts_do_what_the_whole_does(name):
    def whole(src, dst, table, fill):
        fill()
        getattr(ncc, name)([src], [dst], ALL, table)

    def parts(src, dst, table, fill):
        prepared = getattr(ncc, f"{name}_prepare")([src], [dst], ALL, table)
        fill()  # the sizes are known before the data is
        done = getattr(ncc, f"{name}_trigger")(prepared)
        assert prepared in done.after

    made, got = run(parts)
    _, want = run(whole)
    for ours, theirs in zip(got, want, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    opcodes = [i.opcode for i in made.run.cores[0].instructions]
    assert opcodes[-3:] == [f"{name}_prepare", "dma_copy", name]
    shapes, _ = run(parts, data=False)
    assert [i.opcode for i in shapes.run.cores[0].instructions] == opcodes


def _twice(src, dst, table, fill):
    for _ in range(2):
        ncc.all_to_all_v_prepare([src], [dst], ALL, table)


def _never(src, dst, table, fill):
    fill()
    ncc.all_to_all_v_prepare([src], [dst], ALL, table)


def _of_another(src, dst, table, fill):
    ncc.all_gather_v_trigger(ncc.all_to_all_v_prepare([src], [dst], ALL, table))


def _again(src, dst, table, fill):
    fill()
    prepared = ncc.all_to_all_v_prepare([src], [dst], ALL, table)
    for _ in range(2):
        ncc.all_to_all_v_trigger(prepared)


def _sizes_changed(src, dst, table, fill):
    fill()
    prepared = ncc.all_to_all_v_prepare([src], [dst], ALL, table)
    nisa.dma_copy(table[0:1, 0:4], table[1:2, 0:4])
    ncc.all_to_all_v_trigger(prepared)


def _sizes_unwritten(src, dst, table, fill):
    empty = nl.ndarray(table.shape, table.dtype, buffer=nl.shared_hbm)
    ncc.all_to_all_v_prepare([src], [dst], ALL, empty)


@pytest.mark.parametrize(
    ("body", "rule", "text"),
    [
        (_twice, "collective", "there is one slot"),
        (_never, "collective", "is never triggered"),
        (_of_another, "collective", "another all_to_all_v_prepare does"),
        (_again, "collective", "nothing does"),
        (_sizes_changed, "collective", "leave open"),
        (_sizes_unwritten, "uninitialized-read", "metadata_tensor"),
    ],
)
def test_misuse(body, rule, text):
    with pytest.raises(simulator.SimulationError, match=text) as caught:
        run(body)
    assert caught.value.rule == rule
