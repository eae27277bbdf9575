"""`nsa profile --validate` and the plain profile: bounds held, nothing presented as measured."""

from __future__ import annotations

import json
import sys

import pytest

from nsa_neuron.simulator import ShapeDtype
from nsa_neuron.simulator.command import profile as profile_cli
from nsa_neuron.simulator.cost import validate as v
from nsa_neuron.simulator.cost.figures import CALIBRATES, CASES, HELD_OUT, SHOWN
from nsa_neuron.simulator.cost.parameters import CONSTANTS

HERE = [c for c in CASES if v.runnable(c)]
QUICK = [c for c in HERE if "matmul" not in c.name and "224" not in c.name and "the" not in c.name]
SLOW = [c for c in HERE if c not in QUICK]

LIBRARY = """
import nki, nki.language as nl, nki.isa as nisa

@nki.jit
def copied(x):
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(out, x)
    return out
"""

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
def test_figures_are_inside_their_band_and_the_bound(case):
    check(case)


def check(case):
    for c in v.compare(case):
        low, high = c.modelled.low, c.modelled.high
        assert low <= c.modelled.central <= high
        assert low <= c.figure.published <= high, c.figure.name
        if c.figure.role == HELD_OUT:
            assert abs(c.ratio - 1) <= v.BOUND, f"{c.figure.name}: {c.ratio:.3f}"
        assert not c.failed


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=lambda c: c.name)
def test_figures_of_long_kernels_are_inside_their_band_and_the_bound(case):
    check(case)


def test_kernels_of_a_library_that_is_not_here_are_named_not_dropped(monkeypatch, capsys):
    monkeypatch.delenv("NKI_LIBRARY_PATH", raising=False)
    left = v.not_run()
    assert len(left) == 5 and all("attention_cte" in name for name in left)
    with pytest.raises(LookupError, match="NKI_LIBRARY_PATH names no checkout"):
        v.compare(next(c for c in CASES if c.name == left[0]))
    assert f"not run: 5 kernels ({left[0]}" in v.table(list(v.validate(cases=QUICK[:1])))


def test_a_kernel_of_a_library_is_imported_for_its_case_only(monkeypatch, tmp_path):
    package = tmp_path / "src" / "nkilib_src" / "nkilib"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "copies.py").write_text(LIBRARY)
    monkeypatch.setenv("NKI_LIBRARY_PATH", str(tmp_path))
    figure = v.Figure("time", 2.0, "us", CALIBRATES, "here", lambda t: t.total)
    case = v.Case("copied", "nkilib.copies:copied", (ShapeDtype((128, 64), "float32"),), (figure,))
    (found,) = v.compare(case)
    assert found.modelled.central > 1.0
    assert not {"nkilib", "nkilib.copies", "nki"} & set(sys.modules)
    assert str(package.parent) not in sys.path


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
