"""Shape-only timing equals full simulation; the validation kernels compute what they claim."""

from __future__ import annotations

import numpy as np
import pytest

from nsa_neuron import simulator
from nsa_neuron.simulator import cost
from nsa_neuron.simulator.kernels import convolution, matmul, streaming

RNG = np.random.default_rng(7)


def normal(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(dtype)


def conv(x, w, bias, pool=False):
    """Reference convolution in float64."""
    _, h, width = x.shape
    out = np.zeros((w.shape[0], h - 2, width - 2)) + bias.reshape(-1, 1, 1)
    for i in range(3):
        for j in range(3):
            window = x[:, i : i + h - 2, j : j + width - 2].astype(np.float64)
            out += np.einsum("oc,chw->ohw", w[:, :, i, j].astype(np.float64), window)
    if pool:
        o, h, width = out.shape
        out = out.reshape(o, h // 2, 2, width // 2, 2).max(axis=(2, 4))
    return out


def product(a, b, *_):
    return a.T.astype(np.float64) @ b


MATRICES = (normal(256, 256), normal(256, 1024))
IMAGE = (normal(128, 10, 16), normal(128, 128, 3, 3) / 30, normal(128, 1))

CASES = [
    pytest.param(matmul.loads_inside, MATRICES, product, id="matmul-inside"),
    pytest.param(matmul.loads_hoisted, MATRICES, product, id="matmul-hoisted"),
    pytest.param(matmul.blocked, (*MATRICES, 1, 2, 1), product, id="matmul-blocked"),
    pytest.param(
        streaming.vector_add, (normal(2560), normal(2560), 10), lambda a, b, n: a + b, id="add"
    ),
    pytest.param(
        streaming.vector_add_rows, (normal(512), normal(512), 128),
        lambda a, b, n: (a + b)[:, None], id="add-rows",
    ),
    pytest.param(streaming.exponential, (normal(128, 64),), np.exp, id="exp"),
    pytest.param(streaming.transpose, (normal(256, 256),), lambda x: x.T, id="transpose"),
    pytest.param(convolution.convolution, IMAGE, conv, id="conv"),
    pytest.param(convolution.convolution, (*IMAGE, True), conv, id="conv-pool"),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "args", "reference"), CASES)
def test_shape_only_equals_full_simulation(kernel, args, reference):
    shapes = [
        simulator.ShapeDtype(a.shape, a.dtype) if isinstance(a, np.ndarray) else a for a in args
    ]
    full, light = simulator.simulate(kernel), simulator.simulate(kernel, data=False)
    result = full(*args)
    light(*shapes)
    want = np.asarray(reference(*args))
    np.testing.assert_allclose(
        np.asarray(result, np.float64).reshape(want.shape), want, rtol=2e-4, atol=2e-3
    )
    a, b = cost.estimate(full.run), cost.estimate(light.run)
    for level in cost.LEVELS:
        x, y = getattr(a, level), getattr(b, level)
        for name in ("lane", "start", "issue", "begin", "free", "end", "cause", "blocker"):
            assert np.array_equal(getattr(x, name), getattr(y, name)), (level, name)
