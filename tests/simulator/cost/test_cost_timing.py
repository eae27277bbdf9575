"""Timing is part of an instruction: none is priced by default, guesses are listed."""

from __future__ import annotations

import gc
from enum import Enum

import pytest
from cost_helpers import P, nisa, nl, of, only, psum, record, sbuf

from nsa_neuron import simulator
from nsa_neuron.simulator import cost
from nsa_neuron.simulator.cost.instructions import _FORMULAS
from nsa_neuron.simulator.cost.parameters import CONSTANTS
from nsa_neuron.simulator.issue import timing as kinds
from nsa_neuron.simulator.issue.spec import Spec

ENUMS = [k for k in vars(kinds).values() if isinstance(k, type) and issubclass(k, Enum)]
FORMULAS = [member for kind in ENUMS for member in kind]


def test_every_formula_is_priced():
    assert {*FORMULAS} == {*_FORMULAS} and len(FORMULAS) > 20


def test_every_spec_has_a_timing_and_none_has_a_default():
    gc.unfreeze()  # conftest.py froze what was made at import
    specs = [x for x in gc.get_objects() if type(x) is Spec]
    gc.freeze()
    assert len(specs) >= 46
    for spec in specs:
        assert isinstance(spec.timing, kinds.Timing) and spec.timing.formulas, spec.opcode
    with pytest.raises(TypeError, match="timing"):
        Spec("new", ("dst",), (), lambda c: "vector", lambda *_: None)


def test_a_timing_that_says_nothing_of_an_engine_refuses_it():
    made = kinds.timing(kinds.Vector.STREAM, kinds.Scalar.STREAM)
    assert made.on("scalar") is kinds.Scalar.STREAM
    with pytest.raises(LookupError, match=r"no timing on gpsimd, only Vector.STREAM, Scalar"):
        made.on("gpsimd")


def test_what_no_engine_has_is_a_guess():
    def divide():
        a, b = sbuf((128, 512)), sbuf((128, 512))
        nl.divide(a, b)
        nisa.tensor_tensor(a, a, b, nl.divide)
        nisa.tensor_scalar(a, a, nl.mod, 3.0)
        nisa.scalar_tensor_tensor(a, a, nl.divide, 2.0, nl.add, b)
        nisa.scalar_tensor_tensor(a, a, nl.add, 2.0, nl.divide, b)
        nisa.tensor_scalar_reduce(a, a, nl.divide, 2.0, nl.add, sbuf((128, 1)))
        nisa.tensor_scalar_cumulative(a, a, nl.divide, nl.add, 2.0)
        nisa.tensor_tensor_scan(a, a, b, 0.0, nl.divide, nl.add)
        nisa.tensor_tensor_scan(a, a, b, 0.0, nl.multiply, nl.divide)

    t = of(record(divide))
    assert [c.guesses for c in t.costs] == [("vector_composed",)] * 9
    least = (512 * P.vector_composed + P.vector_overhead) / P.vector_clock
    read_out = P.accumulator_read / P.vector_clock
    assert [c.interval for c in t.costs] == pytest.approx(
        [least] * 5 + [least + read_out] + [least] * 3
    )


def kernel(table, index):
    tile, out = nl.load(table[0]), nl.ndarray((128, 64), nl.float32, buffer=nl.shared_hbm)
    where = nl.load(index)
    nisa.tensor_copy(tile, tile, engine=nisa.engine.gpsimd)
    nisa.tensor_copy(tile, tile, engine=nisa.engine.gpsimd)
    view = table.ap([[64, 128], [1, 64]], scalar_offset=where, indirect_dim=0)
    nisa.dma_copy(tile, view, dge_mode=nisa.dge_mode.hwdge)
    nl.store(out, tile)
    return out


def test_a_report_lists_every_guess_with_source_and_band():
    shapes = simulator.ShapeDtype((4, 128, 64), "float32"), simulator.ShapeDtype((1, 1), "int32")
    found = simulator.profile(kernel)(*shapes)
    lines = found.to_dict()["assumptions"]
    assert [line.split()[1] for line in lines] == ["dma_run_time", "gpsimd_other"]
    transfer, arithmetic = lines
    assert "1600 (1000 to 2200) ns" in transfer and "1 dma_copy" in transfer
    assert CONSTANTS["dma_run_time"].source in transfer
    assert "2 tensor_copy" in arithmetic and "source: none" in arithmetic
    times = [2 * (150 + n * 64) / 1.2e3 for n in (2, 1, 4)]
    assert "{:.2f} us of their lanes ({:.2f} to {:.2f})".format(*times) in arithmetic
    for line in lines:
        assert f"assumed: {line}" in str(found)


def test_a_run_without_guesses_lists_none():
    def plain():
        nisa.activation(sbuf((128, 64)), nl.exp, psum((128, 64)))

    t = of(record(plain))
    assert cost.guesses(cost.Estimate(t, t, t)) == []
    assert not t.costs[only(t, "activation")].guesses
