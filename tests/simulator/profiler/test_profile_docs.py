"""docs/profiling.md: its numbers are what the tool prints; its kernels all compute the same."""

from __future__ import annotations

import math
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from documented import DOCUMENT, refreshed
from profile_helpers import EXAMPLE, STEPS, example

from nsa_neuron import simulator
from nsa_neuron.simulator.command import loading


def test_documented_numbers_are_what_the_tool_prints(tmp_path):
    text = DOCUMENT.read_text()
    again = refreshed(text, tmp_path)
    hint = "run `python tests/simulator/profiler/documented.py` and read what changed"
    for old, new in zip(text.splitlines(), again.splitlines(), strict=False):
        assert old == new, hint
    assert text == again, hint


def test_the_document_has_all_steps_and_commands():
    text = DOCUMENT.read_text()
    for step in STEPS:
        assert f"\n| `{step}` |" in text
    assert text.count("\n$ nsa profile") >= 6


def test_each_step_is_faster_than_the_one_before():
    times = [example(step).time for step in STEPS]
    for slower, faster in pairwise(times):
        assert faster.low < slower.low
        assert faster.central < slower.central
        assert faster.high < slower.high
    assert times[-1].central < times[0].central / 20


@pytest.mark.parametrize("step", STEPS)
def test_every_step_computes_the_same(step):
    rng = np.random.default_rng(0)
    x_t = (rng.standard_normal((256, 128)) / 16).astype(ml_dtypes.bfloat16)
    w = rng.standard_normal((256, 512)).astype(ml_dtypes.bfloat16)
    with simulator.activate(), loading.imported(EXAMPLE) as module:
        out = simulator.simulate(loading.find_kernel(module, step))(x_t, w)
    product = x_t.astype(np.float64).T @ w.astype(np.float64)
    exact = product * 0.5 * (1 + np.vectorize(math.erf)(product / math.sqrt(2)))
    # One rounding to bf16: half a step of 2**-8, and fp32 sums of 256 products before.
    np.testing.assert_allclose(out.astype(np.float64), exact, rtol=2**-8, atol=2e-4)
