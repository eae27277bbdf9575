"""How many changes are tried, in which order, and what several gain at once."""

from __future__ import annotations

import pytest
from profile_helpers import nisa, nl, profile_of, sbuf

from nsa_neuron.simulator.profiler import advice
from nsa_neuron.simulator.profiler.candidates import Candidate
from nsa_neuron.simulator.profiler.what_if import Baseline, Change, changed, with_times

COUNT = 20


@pytest.fixture(scope="module")
def timeline():
    """Twenty passes over one tile, each after the one before."""

    def body():
        tile = sbuf((128, 512))
        for _ in range(COUNT):
            nisa.activation(tile, nl.copy, tile)

    return profile_of(body).timeline


def advised(timeline, monkeypatch, order, bounds, remains=0.0):
    """Advice where every pass could be done without, which is told in this order."""

    def rule(base):
        for k in order:
            costs = changed(base.t, [k], lambda c: with_times(c, 0.0, 0.0))
            yield Candidate(f"pass-{k}", [k], "", Change(costs=costs), bounds[k], remains)

    monkeypatch.setattr(advice, "RULES", (rule,))
    return advice.advise(timeline)


def test_those_that_promise_most_are_tried_and_half_of_them_at_once(timeline, monkeypatch):
    bounds = [timeline.total * (1 + (7 * k) % COUNT) for k in range(COUNT)]
    told, together = advised(timeline, monkeypatch, range(COUNT), bounds)
    best = sorted(range(COUNT), key=lambda k: -bounds[k])
    assert {a.rule for a in told} == {f"pass-{k}" for k in best[:16]}
    assert together.of == tuple(range(8))
    assert together.gain_us == pytest.approx(sum(a.gain_us for a in told[:8]))


@pytest.mark.parametrize(("share", "told"), [(0.0099, 0), (0.01, 2)])
def test_what_promises_less_than_a_hundredth_is_not_tried(timeline, monkeypatch, share, told):
    bounds = [timeline.total * share] * COUNT
    found, _ = advised(timeline, monkeypatch, (3, 4), bounds)
    assert len(found) == told


def test_what_no_change_can_spare_is_taken_off_each_gain_and_off_all_at_once(timeline, monkeypatch):
    bounds, remains = [timeline.total] * COUNT, timeline.total / 100
    (one, other, third), together = advised(timeline, monkeypatch, (3, 4, 5), bounds, remains)
    base = Baseline(timeline)

    def gain(*passes):
        costs = changed(timeline, list(passes), lambda c: with_times(c, 0.0, 0.0))
        return base.gain(Change(costs=costs)) / 1e3

    spent = remains / 1e3
    assert one.gain_us == other.gain_us == third.gain_us == pytest.approx(gain(3) - spent)
    assert together.of == (0, 1, 2)
    assert together.gain_us == pytest.approx(gain(3, 4, 5) - 3 * spent)
