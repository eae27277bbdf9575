"""`nsa profile --validate` at its bounds: just inside holds, just outside misses."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest

from nsa_neuron.cli import COMMANDS, main
from nsa_neuron.simulator.cost.figures import CALIBRATES, CASES, HELD_OUT, SHOWN
from nsa_neuron.simulator.cost.timeline import Band
from nsa_neuron.simulator.cost.validate import Comparison, table

CASE = CASES[0]
FIGURE = replace(CASE.figures[0], published=100.0, role=HELD_OUT, note="")
BOUNDS = [
    (100.0, "ok"), (109.99, "ok"), (110.01, "near"), (119.99, "near"), (120.01, "MISS"),
    (90.01, "ok"), (89.99, "near"), (80.01, "near"), (79.99, "MISS"), (0.0, "MISS"), (1e9, "MISS"),
]  # fmt: skip


def compared(modelled: float, role: str = HELD_OUT) -> Comparison:
    """A figure of 100 that the model puts elsewhere, inside the band."""
    return Comparison(CASE, replace(FIGURE, role=role), Band(0.0, modelled, 1e9))


def outside(role: str, low: float, high: float) -> Comparison:
    """A figure of 100 with a band of its own."""
    return Comparison(CASE, replace(FIGURE, role=role), Band(low, (low + high) / 2, high))


@pytest.mark.parametrize(("modelled", "verdict"), BOUNDS)
def test_held_out_figures_may_be_off_by_a_tenth_and_by_a_fifth(modelled, verdict):
    assert compared(modelled).verdict == verdict
    assert compared(modelled).ratio == modelled / 100


@pytest.mark.parametrize("role", [CALIBRATES, HELD_OUT, SHOWN])
def test_every_figure_must_lie_inside_its_band(role):
    for low, high in ((100.01, 110.0), (90.0, 99.99)):
        assert outside(role, low, high).verdict == "OUTSIDE" and outside(role, low, high).failed
    for low, high in ((100.0, 110.0), (90.0, 100.0)):
        assert outside(role, low, high).verdict == ("ok" if role == HELD_OUT else "-")
    text = table([compared(109.0), outside(role, 90.0, 99.0)])
    assert "inside their band: 1 of 2" in text and "OUTSIDE" in text


@pytest.mark.parametrize("role", [CALIBRATES, SHOWN])
def test_what_is_only_shown_has_no_verdict(role):
    assert compared(1e9, role).verdict == "-"


def test_the_last_line_counts_what_is_within_a_tenth_and_names_the_furthest():
    text = table([compared(109.0), compared(119.0), compared(70.0), compared(1.0, SHOWN)])
    assert "held out: 1 of 3 within 10 %; furthest" in text
    assert f"{FIGURE.name}: 0.700" in text


@pytest.mark.parametrize("words", [[], ["--json"]])
@pytest.mark.parametrize(
    ("found", "code"),
    [
        ([compared(119.99), compared(80.01)], 0),
        ([compared(119.99), compared(120.01), compared(100.0)], 1),
        ([compared(79.99)], 1),
        ([compared(100.0), compared(1e9, SHOWN), compared(1e9, CALIBRATES)], 0),
        ([compared(100.0), outside(SHOWN, 101.0, 200.0)], 1),
    ],
)
def test_one_miss_is_exit_code_1(monkeypatch, capsys, found, code, words):
    module = importlib.import_module(next(c.module for c in COMMANDS if c.name == "profile"))
    monkeypatch.setattr(module, "validate", lambda params: iter(found))
    assert main(["profile", "--validate", *words]) == code
    out = capsys.readouterr().out
    if words:
        rows = json.loads(out)
        assert [row["verdict"] for row in rows][: len(found)] == [c.verdict for c in found]
        assert {row["verdict"] for row in rows[len(found) :]} <= {"not run"}
    else:
        assert ("MISS" in out or "OUTSIDE" in out) == bool(code)
