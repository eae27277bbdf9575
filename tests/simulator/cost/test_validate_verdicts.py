"""`nsa profile --validate` at its bounds: just inside holds, just outside misses."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest

from nsa_neuron import simulator
from nsa_neuron.cli import COMMANDS, main
from nsa_neuron.simulator import cost
from nsa_neuron.simulator.cost import figures
from nsa_neuron.simulator.cost.figures import CALIBRATES, CASES, HELD_OUT, SHOWN
from nsa_neuron.simulator.cost.timeline import Band
from nsa_neuron.simulator.cost.validate import Comparison, compare, table
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

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


def test_a_row_of_the_table_holds_figure_model_band_ratio_and_note():
    noted = replace(FIGURE, note="counted otherwise", published=50.0)
    rows = [
        Comparison(CASE, FIGURE, Band(80.0, 109.0, 1234.5)),
        Comparison(CASE, noted, Band(40.0, 45.0, 60.0)),
        Comparison(CASE, replace(noted, note="another"), Band(40.0, 54.0, 60.0)),
        Comparison(CASE, noted, Band(40.0, 60.0, 70.0)),
    ]
    lines = table(rows).splitlines()
    header, first, second, third, fourth = (line.split("  ") for line in lines[:5])
    cells = [
        [c.strip() for c in row if c.strip()] for row in (header, first, second, third, fourth)
    ]
    unit, name = FIGURE.unit, FIGURE.name
    assert cells[0] == ["kernel", "figure", "published", "modelled", "low .. high", "ratio", "role"]
    assert cells[1] == [
        CASE.name, name, f"100 {unit}", "109", "80 .. 1234", "1.090", HELD_OUT, "ok",
    ]  # fmt: skip
    assert cells[2] == [f"{name} [1]", f"50 {unit}", "45", "40 .. 60", "0.900", HELD_OUT, "ok"]
    assert cells[3][0] == f"{name} [2]" and cells[3][-3:] == ["1.080", HELD_OUT, "ok"]
    assert cells[4][0] == f"{name} [1]" and cells[4][-3:] == ["1.200", HELD_OUT, "near"]
    assert lines[5:7] == ["[1] counted otherwise", "[2] another"]


def two_engines(x):
    """A load, a pass on VectorE, one on ScalarE that waits for it, a store."""
    tile, one, two = nl.load(x), nl.ndarray(x.shape, x.dtype), nl.ndarray(x.shape, x.dtype)
    nisa.tensor_copy(one, tile, engine=nisa.engine.vector)
    nisa.activation(two, nl.copy, one)
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    nl.store(out, two)
    return out


def test_measures_of_a_timeline_by_hand():
    made = simulator.simulate(two_engines, data=False)
    made(simulator.ShapeDtype((128, 512), "float32"))
    t = cost.central(made.run)
    nbytes = 128 * 512 * 4
    assert figures.total(t) == t.total and figures.launched(t) == t.total + 15_000
    assert figures.bandwidth(t) == pytest.approx(2 * nbytes / t.total)
    assert figures.taken("vector")(t) == pytest.approx(572 / 0.96)
    assert figures.latency("scalar")(t) == pytest.approx((512 + 190) / 1.2)
    assert figures.busy("vector")(t) == pytest.approx((512 + 152) / 0.96)
    assert figures.packets(t) == pytest.approx(2 * (128 * 3 + 16 * 5.8 + nbytes / 24.4))
    assert figures.data(0)(t) == pytest.approx(t.end[0] - t.begin[0])
    assert figures.data(-1)(t) == pytest.approx(t.end[3] - t.begin[3])
    assert figures.until_compute("vector")(t) == pytest.approx(t.issue[1])
    assert figures.semaphore("vector", "scalar")(t) == pytest.approx(37)


@pytest.mark.parametrize(("unit", "ns"), [("ns", 1), ("us", 1e3), ("ms", 1e6)])
@pytest.mark.parametrize("times", [1.0, 4.0])
def test_a_figure_is_compared_in_its_unit_as_often_as_it_was_run(unit, ns, times):
    """What else a number may count widens the band and leaves the middle."""
    figure = figures.Figure(
        "time", 1.0, unit, HELD_OUT, "here", figures.total,
        least=lambda t: t.total / 2, most=lambda t: t.total * 2,
    )  # fmt: skip
    args = (simulator.ShapeDtype((128, 512), "float32"),)
    case = figures.Case("two", two_engines, args, (figure, replace(figure, least=None, most=None)),
                        times=times)  # fmt: skip
    made = simulator.simulate(two_engines, data=False)
    made(*args)
    band = cost.estimate(made.run).band
    wide, plain = compare(case)
    scale = times / ns
    assert plain.modelled.central == wide.modelled.central == pytest.approx(band.central * scale)
    assert (plain.modelled.low, plain.modelled.high) == (
        pytest.approx(band.low * scale), pytest.approx(band.high * scale),
    )  # fmt: skip
    assert (wide.modelled.low, wide.modelled.high) == (
        pytest.approx(band.low * scale / 2), pytest.approx(band.high * scale * 2),
    )  # fmt: skip
