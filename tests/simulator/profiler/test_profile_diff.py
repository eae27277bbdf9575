"""Two reports compared, quantity by quantity."""

from __future__ import annotations

import pytest

from nsa_neuron.simulator.profiler import diff


def facts_of(scale=1, lanes=("vector",), cores=1, **changes):
    core = {
        "tensor": {"utilisation": 0.1 * scale},
        "memory": {b: {"peak": 100 * scale, "mean": 1} for b in ("sbuf", "psum")},
        "engines": {n: {"instructions": 10 * scale, "busy_us": 5.0 * scale} for n in lanes},
    }
    return {
        "kernel": "k", "target": "trn2", "params": "measured-3p", "instructions": 7 * scale,
        "time_us": {"low": 1.0 * scale, "central": 2.0 * scale, "high": 3.0 * scale},
        "roofline": {"hbm_bytes": 8 * scale, "bandwidth_gb_s": 4.0 * scale,
                     "share_of_ceiling": 0.25 * scale},
        "cores": [core] * cores, **changes,
    }  # fmt: skip


def test_every_quantity_of_two_reports_is_compared():
    found = diff.compare(facts_of(), facts_of(3, ("vector", "scalar")), ("one", "other"))
    for name, a in {
        "time us": 2.0, "time us, low": 1.0, "time us, high": 3.0, "instructions": 7,
        "HBM bytes": 8, "HBM GB/s": 4.0, "share of the roof": 0.25, "PE utilisation": 0.1,
        "SBUF peak, bytes": 100, "PSUM peak, bytes": 100, "vector instructions": 10,
        "vector busy us": 5.0,
    }.items():  # fmt: skip
        assert found["quantities"][name] == pytest.approx({"a": a, "b": 3 * a, "ratio": 3.0}), name
    assert found["quantities"]["scalar instructions"] == {"a": 0, "b": 30, "ratio": None}
    assert found["quantities"]["scalar busy us"] == {"a": 0, "b": 15.0, "ratio": None}
    assert found["comparable"] and len(found["quantities"]) == 14
    assert found["a"] == {"name": "one", "kernel": "k", "arguments": [], "time_us": 2.0}
    shown = diff.render(found)
    assert "new" in shown and "x 3.000" in shown and "NOT COMPARABLE" not in shown


@pytest.mark.parametrize("other", [{"target": "trn3"}, {"params": "documented"}, {"cores": 2}])
def test_reports_of_other_machines_constants_or_cores_are_not_comparable(other):
    changed = facts_of(cores=other.pop("cores", 1), **other)
    assert not diff.compare(facts_of(), changed)["comparable"]
    assert "NOT COMPARABLE" in diff.render(diff.compare(facts_of(), changed))


def test_two_cores_are_compared_one_by_one():
    names = diff.compare(facts_of(cores=2), facts_of(cores=2))["quantities"]
    assert {"core 0 PE utilisation", "core 1 PE utilisation", "core 1 vector busy us"} <= set(names)
