"""`nsa profile --validate` and the plain profile: bounds held, nothing presented as measured."""

from __future__ import annotations

import json

import pytest

from nsa_neuron.simulator.command import profile as profile_cli
from nsa_neuron.simulator.cost import validate as v
from nsa_neuron.simulator.cost.figures import CALIBRATES, CASES, HELD_OUT, SHOWN
from nsa_neuron.simulator.cost.parameters import CONSTANTS

QUICK = [c for c in CASES if "matmul" not in c.name and "224" not in c.name and "the" not in c.name]
SLOW = [c for c in CASES if c not in QUICK]

KERNEL = """
import nki, nki.language as nl, nki.isa as nisa

@nki.jit
def square(x):
    tile = nl.load(x)
    out = nl.ndarray(x.shape, x.dtype)
    nisa.activation(out, nl.square, tile)
    result = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(result, out)
    return result
"""


@pytest.mark.parametrize("case", QUICK, ids=lambda c: c.name)
def test_held_out_figures_are_within_the_bound(case):
    for c in v.compare(case):
        low, high = c.modelled.low, c.modelled.high
        assert low <= c.modelled.central <= high
        if c.figure.role == HELD_OUT:
            assert abs(c.ratio - 1) <= v.BOUND, f"{c.figure.name}: {c.ratio:.3f}"


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=lambda c: c.name)
def test_held_out_figures_of_long_kernels_are_within_the_bound(case):
    for c in v.compare(case):
        if c.figure.role == HELD_OUT:
            assert abs(c.ratio - 1) <= v.BOUND, f"{c.figure.name}: {c.ratio:.3f}"


def test_what_calibrates_is_never_judged():
    roles = {f.role for c in CASES for f in c.figures}
    assert roles == {CALIBRATES, HELD_OUT, SHOWN}
    (comparison, *_) = [c for c in v.compare(QUICK[1]) if c.figure.role == CALIBRATES]
    assert comparison.verdict == "-"
    assert all(f.note for c in CASES for f in c.figures if f.role == SHOWN)
    assert CONSTANTS["dma_completion"].calibrated == "matmul v3 DMA active"
    for c in CASES:
        if c.name == "matmul, loads hoisted":
            assert {f.name: f.role for f in c.figures}["DMA active"] == CALIBRATES


def test_the_table_says_what_it_is():
    text = v.table(list(v.validate(cases=QUICK[:2])))
    assert "Modelled, not measured" in text
    assert "held out" in text and "calibrates" in text


def test_profile_of_a_file(tmp_path, capsys):
    file = tmp_path / "kernel.py"
    file.write_text(KERNEL)
    words = [f"{file}::square", "--arg", "x=randn:128x512:bf16"]
    assert profile_cli.profile_main(words) == 0
    assert "MODELLED" in capsys.readouterr().out
    assert profile_cli.profile_main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["modelled"] is True
    time = facts["time_us"]
    assert time["low"] < time["central"] < time["high"]
    assert facts["cores"][0]["engines"]["scalar"]["instructions"] == 1


def test_profile_names_what_is_wrong(tmp_path, capsys):
    file = tmp_path / "kernel.py"
    file.write_text(KERNEL)
    assert profile_cli.profile_main([f"{file}::cube"]) == 2
    assert "no kernel 'cube'" in capsys.readouterr().err
