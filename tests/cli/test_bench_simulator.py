"""`nsa bench --simulator`: the kernels it times compute what NumPy computes; no wall time here."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from nsa_neuron import environment, simulator
from nsa_neuron.bench import modelling, to_lines
from nsa_neuron.bench import simulator as bench
from nsa_neuron.simulator.kernels import bench as kernels

RNG = np.random.default_rng(0)


def normal(*shape, dtype=ml_dtypes.bfloat16):
    return RNG.standard_normal(shape).astype(dtype)


def exact(q_t, k_t, v):
    """Causal attention in float64."""
    q, k, v = (a.astype(np.float64) for a in (q_t.T, k_t.T, v))
    scores = q @ k.T / np.sqrt(q.shape[1])
    scores[np.triu_indices(len(q), 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ v


@pytest.mark.parametrize(
    ("kernel", "plain", "arguments", "tolerance"),
    [
        (kernels.matmul, kernels.matmul_numpy, (normal(256, 128), normal(256, 512)), 0.25),
        (kernels.softmax, kernels.softmax_numpy, (normal(256, 300, dtype=np.float32),), 1e-6),
        (
            kernels.attention,
            kernels.attention_numpy,
            # Two chunks of keys, so that the running maximum moves.
            (normal(128, 1024), normal(128, 1024), normal(1024, 128)),
            0.02,
        ),
        (
            kernels.small_instructions,
            kernels.small_instructions_numpy,
            (np.ones((1, 1), np.float32), 5),
            0.0,
        ),
    ],
)
def test_kernels_and_their_numpy_versions_agree(kernel, plain, arguments, tolerance):
    got = simulator.simulate(kernel)(*arguments).astype(np.float64)
    np.testing.assert_allclose(got, plain(*arguments).astype(np.float64), atol=tolerance, rtol=0)
    if kernel is kernels.attention:
        np.testing.assert_allclose(got, exact(*arguments), atol=0.03, rtol=0)


def test_rows_and_what_is_printed(monkeypatch):
    small = bench.Case(
        "small", kernels.softmax, kernels.softmax_numpy, (normal(128, 64, dtype=np.float32),), 1e-6
    )
    monkeypatch.setattr(bench, "cases", lambda: [small])
    monkeypatch.setattr(bench, "SMALL", 20)
    monkeypatch.setattr(modelling, "TOKENS", 512)
    monkeypatch.setattr(modelling, "MATRIX", 512)
    monkeypatch.setattr(modelling, "SIZES", (100, 1000))
    rows = bench.measure(rounds=2)
    assert [r.unit for r in rows] == ["ratio", "ms", "ms", "us", "ratio", "us", "ratio"] + [
        "1/ms"
    ] * 6 + ["us"] * 2
    lines = [json.loads(line) for line in to_lines(rows, environment.describe())]
    for line in lines:
        assert line["kind"] == "measured" and line["environment"].keys() >= {"load", "revision"}
    assert "small, memory" in bench.to_text(rows)


def test_results_that_differ_are_refused(monkeypatch):
    wrong = bench.Case(
        "wrong", kernels.softmax, np.negative, (normal(128, 64, dtype=np.float32),), 1e-6
    )
    monkeypatch.setattr(bench, "cases", lambda: [wrong])
    with pytest.raises(AssertionError, match="differ by"):
        bench.measure(rounds=1)


def test_memory_stays_close_to_the_tensors_simulated():
    """tracemalloc counts bytes, so this does not depend on how busy the machine is."""
    for case in bench.cases()[:2]:
        row = bench._memory(case)
        assert row.median < 1.5, row
