"""Random numbers: reproducible, chained, uniform; XORWOW against Marsaglia's scalar program."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_neuron.simulator.machine import dtypes
from nsa_neuron.simulator.semantics import prng


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(1, 11), min_size=1, max_size=6))
def test_drawing_in_pieces_gives_the_same_sequence(seed, cuts):
    whole, end = prng.dve_bits(prng.DveState(seed), (1, sum(cuts)))
    state, pieces = prng.DveState(seed), []
    for n in cuts:
        words, state = prng.dve_bits(state, (1, n))
        assert words.dtype == np.uint32
        pieces += words[0].tolist()
    assert pieces == whole[0].tolist() and state == end


def test_seeds_differ_and_bits_are_balanced():
    a, _ = prng.dve_bits(prng.DveState(1), (128, 256))
    b, _ = prng.dve_bits(prng.DveState(2), (128, 256))
    assert (a != b).mean() > 0.999
    ones = [(a >> bit & 1).mean() for bit in range(32)]
    assert max(abs(p - 0.5) for p in ones) < 0.02


def xorwow_scalar(state, count):
    """Marsaglia, Xorshift RNGs (2003), section 3.1."""
    x, y, z, w, v, d = state
    out = []
    for _ in range(count):
        t = x ^ (x >> 2)
        x, y, z, w = y, z, w, v
        v = ((v ^ (v << 4)) ^ (t ^ (t << 1))) & 0xFFFFFFFF
        d = (d + 362437) & 0xFFFFFFFF
        out.append((d + v) & 0xFFFFFFFF)
    return out, [x, y, z, w, v, d]


def test_xorwow_follows_its_published_program():
    state = prng.xorwow_default(3)
    assert state.shape == (3, prng.XORWOW_WORDS)
    got, after = prng.xorwow_bits(state, 50)
    for p in range(3):
        want, end = xorwow_scalar([int(v) for v in state[p]], 50)
        assert got[p].tolist() == want and after[p].tolist() == end
    assert len({tuple(row) for row in got.tolist()}) == 3
    first, middle = prng.xorwow_bits(state, 20)
    second, _ = prng.xorwow_bits(middle, 30)
    assert np.array_equal(np.concatenate([first, second], axis=1), got)


@pytest.mark.parametrize("dtype", [dtypes.bfloat16, dtypes.float32, dtypes.int16], ids=str)
def test_dropout_keeps_bits_or_writes_zero(dtype):
    width = dtype.itemsize * 8
    raw = np.random.default_rng(0).integers(1, 2**15, (64, 512)).astype(f"uint{width}")
    data = raw.view(dtype.numpy)
    prob = np.linspace(0, 1, 64, dtype=np.float32)[:, None]
    got, after = prng.dropout(data, prob, prng.DveState(5))
    bits = dtypes.bits(got)
    assert ((bits == raw) | (bits == 0)).all()
    assert after.drawn == data.size
    assert (bits[0] == raw[0]).all() and (bits[-1] == 0).all()
    np.testing.assert_allclose((bits == 0).mean(axis=1), prob[:, 0], atol=0.1)
    again, _ = prng.dropout(data, prob, prng.DveState(5))
    assert np.array_equal(dtypes.bits(again), bits)


@pytest.mark.parametrize(("prob", "kept"), [(0.0, 1.0), (1.0, 0.0)])
def test_dropout_at_its_limits(prob, kept):
    data = np.ones((4, 1000), np.float32)
    got, _ = prng.dropout(data, prob, prng.DveState())
    assert got.mean() == kept
