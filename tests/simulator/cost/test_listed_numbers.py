"""The kernels behind the published times of listed blocks compute attention, pass after pass."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from nsa_neuron import simulator
from nsa_neuron.simulator.kernels import listed

BF16 = np.dtype(ml_dtypes.bfloat16)


def made(*shape, scale=1.0):
    return (scale * np.random.default_rng(len(shape)).standard_normal(shape)).astype(BF16)


def attended(queries, keys, values, mask=0.0):
    """Attention of [tokens, 128] in float64."""
    scores = queries.astype(float) @ keys.T.astype(float) + mask
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ values.astype(float)


@pytest.mark.parametrize(("queues", "tiles", "rows"), [(2, 2, 128), (3, 1, 384)])
def test_packed_blocks(queues, tiles, rows):
    """Two items of three passes of two blocks: more passes than there are buffers."""
    lists = np.array([[3, 0, 4, 1, 2, 2], [2, 0, 1, 4, 3, 3]], np.int32)
    q, blocks = made(128, 2 * tiles * 128, scale=0.1), made(5, 128, 2 * rows)
    got = simulator.simulate(listed.packed_blocks)(q, blocks, lists, rows, queues, tiles, 2)
    for item, blocks_of in enumerate(lists):
        part = slice(item * tiles * 128, (item + 1) * tiles * 128)
        keys = np.concatenate([blocks[b, :, :rows].T for b in blocks_of])
        parts = blocks[blocks_of, :, rows:].reshape(6, 128, rows // 128, 128)
        values = parts.transpose(0, 2, 1, 3).reshape(-1, 128)
        want = attended(q[:, part].T, keys, values)
        np.testing.assert_allclose(got[part].astype(float), want, atol=0.01)


@pytest.mark.parametrize("masked", [False, True])
def test_split_blocks(masked):
    """Both rows of a mask are added to all scores."""
    lists = np.array([[3, 0, 4, 1, 2, 5, 2, 1], [2, 0, 1, 4, 3, 5, 0, 4]], np.int32)
    q, keys_t, values = made(128, 256, scale=0.1), made(6, 128, 64), made(6, 64, 128, scale=0.9)
    mask = made(2, 2, 512, scale=2.0) if masked else None
    got = simulator.simulate(listed.split_blocks)(q, keys_t, values, lists, 2, mask)
    for item, blocks in enumerate(lists):
        part = slice(item * 128, (item + 1) * 128)
        keys = keys_t[blocks].transpose(0, 2, 1).reshape(-1, 128)
        added = 0.0 if mask is None else mask[item].astype(float).sum(0)
        want = attended(q[:, part].T, keys, values[blocks].reshape(-1, 128), added)
        np.testing.assert_allclose(got[part].astype(float), want, atol=0.01)
