"""Instructions through the facade: results, placement rules, PSUM groups, per-element tracking."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from nsa_neuron import simulator
from nsa_neuron.simulator import SimulationError
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

RNG = np.random.default_rng(1)
X = RNG.standard_normal((128, 64)).astype(np.float32)


def run(kernel, *args, **options):
    return simulator.simulate(kernel, **options)(*args)


def out_of(tile):
    """Store a tile to a fresh result."""
    if tile.buffer is nl.psum:
        copy = nl.ndarray(tile.shape, tile.dtype)
        nisa.tensor_copy(copy, tile)
        tile = copy
    out = nl.ndarray(tile.shape, tile.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(out, tile)
    return out


@pytest.mark.parametrize(
    "dtype",
    [np.float32, ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3, ml_dtypes.float8_e5m2],
)
@pytest.mark.parametrize("shape", [(128, 128, 512), (32, 7, 33), (1, 1, 1)])
def test_matmul_accumulates_over_k(dtype, shape):
    k, m, n = shape
    a, b = (RNG.standard_normal((2 * k, w)).astype(dtype) for w in (m, n))

    def kernel(a, b, accumulate):
        acc = nl.ndarray((m, n), nl.float32, buffer=nl.psum)
        for i in range(2):
            flag = None if accumulate is None else i > 0
            part = slice(i * k, (i + 1) * k)
            nisa.nc_matmul(acc, nl.load(a[part]), nl.load(b[part]), accumulate=flag)
        return out_of(acc)

    want = a.astype(np.float32).T @ b.astype(np.float32)
    for flag in (None, True):
        np.testing.assert_allclose(run(kernel, a, b, flag), want, rtol=2e-5, atol=2e-4)


def test_inferred_accumulation_is_per_element():
    """Overlapping windows: the second matmul adds on the left half and overwrites on the right."""

    def kernel(x):
        one = nl.load(x)
        acc = nl.ndarray((64, 96), nl.float32, buffer=nl.psum)
        nisa.nc_matmul(acc[:, 0:64], one, one)
        nisa.nc_matmul(acc[:, 32:96], one, one)
        return out_of(acc)

    gram = X.T @ X
    want = np.zeros((64, 96), np.float32)
    want[:, 0:64] += gram
    want[:, 32:96] += gram
    np.testing.assert_allclose(run(kernel, X), want, rtol=1e-5, atol=1e-4)


def test_transposes_are_bit_exact():
    a = X.copy()
    a[0, 0], a[1, 1] = np.nan, -np.inf

    def kernel(a):
        tile = nl.load(a)
        whole = nl.ndarray((64, 128), nl.float32, buffer=nl.psum)
        nisa.nc_transpose(whole, tile)
        small = nl.ndarray((32, 32), nl.float32)
        nisa.nc_transpose(small, tile[0:32, 0:32], engine=nisa.engine.vector)
        return out_of(whole), out_of(small)

    whole, small = run(kernel, a)
    np.testing.assert_array_equal(whole.view(np.uint32), a.T.copy().view(np.uint32))
    np.testing.assert_array_equal(small, a[:32, :32].T)


def test_softmax_by_instructions():
    def kernel(x):
        tile = nl.load(x)
        top, total = (nl.ndarray((128, 1), nl.float32) for _ in range(2))
        nisa.tensor_reduce(top, nl.maximum, tile, axis=1, negate=True)
        nisa.activation_reduce(tile, nl.exp, tile, nl.add, total, bias=top)
        nisa.activation(total, nl.reciprocal, total)
        nisa.tensor_scalar(tile, tile, nl.multiply, total)
        return out_of(tile)

    e = np.exp(X - X.max(1, keepdims=True))
    np.testing.assert_allclose(run(kernel, X), e / e.sum(1, keepdims=True), rtol=1e-5)


def test_integers_bits_and_iota():
    def kernel():
        a = nl.ndarray((4, 2, 8), nl.int32)
        nisa.iota(a, [[100, 2], [1, 8]], offset=5, channel_multiplier=1000)
        b = nl.ndarray((4, 2, 8), nl.int32)
        nisa.tensor_scalar(b, a, nl.bitwise_and, 7, op1=nl.left_shift, operand1=1)
        c = nl.ndarray((4, 2, 8), nl.int32)
        big = nl.full((4, 2, 8), 2**25 + 1, nl.int32)
        nisa.tensor_tensor(c, big, a, nl.add)
        return out_of(a), out_of(b), out_of(c)

    a, b, c = run(kernel)
    p, i, j = np.ogrid[0:4, 0:2, 0:8]
    np.testing.assert_array_equal(a, 5 + 1000 * p + 100 * i + j)
    np.testing.assert_array_equal(b, (a & 7) << 1)
    np.testing.assert_array_equal(c, a + 2**25 + 1)


def test_reading_an_unwritten_element_names_it():
    def kernel(x):
        tile = nl.ndarray((128, 64), nl.float32)
        nisa.dma_copy(tile[:, 0:63], x[:, 0:63])
        return out_of(tile)

    with pytest.raises(simulator.UninitializedReadError, match=r"128 of 8192 .* first \(0, 63\)"):
        run(kernel, X)
    relaxed = simulator.simulate(kernel, relax=("uninitialized-read",))
    result = relaxed(X)
    assert np.isnan(result[:, 63]).all() and (result[:, :63] == X[:, :63]).all()
    assert [e.rule for e in relaxed.run.cores[0].relaxed] == ["uninitialized-read"]


def test_aliases_share_what_was_written():
    def kernel(x):
        first = nl.ndarray((128, 64), nl.float32, address=(0, 1024))
        nisa.dma_copy(first, x)
        return out_of(nl.ndarray((128, 32), nl.float32, address=(0, 1024 + 128)))

    np.testing.assert_array_equal(run(kernel, X), X[:, 32:])


def test_addressed_tensors_live_together_may_not_overlap():
    def kernel(x):
        first = nl.ndarray((128, 64), nl.float32, address=(0, 0))
        nisa.dma_copy(first, x)
        second = nl.ndarray((128, 64), nl.float32, address=(0, 128))
        nisa.dma_copy(second, x)
        return out_of(first), out_of(second)

    with pytest.raises(SimulationError) as caught:
        run(kernel, X)
    assert caught.value.rule == "address-overlap"


def test_addressed_tensors_made_beforehand_may_take_turns():
    def kernel(x):
        tiles = [nl.ndarray((128, 64), nl.float32, address=(0, 0)) for _ in range(3)]
        outs = []
        for _ in range(2):
            for tile in tiles:
                nisa.dma_copy(tile, x)
                outs.append(out_of(tile))
        return tuple(outs)

    for out in run(kernel, X):
        np.testing.assert_array_equal(out, X)


def sb(*shape, dtype=nl.float32):
    return nl.zeros(shape, dtype)


def ps(*shape, dtype=nl.float32):
    return nl.ndarray(shape, dtype, buffer=nl.psum)


def matmul(dst, st, mv, **kw):
    return nisa.nc_matmul(dst, st, mv, **kw)


def _twice(t):
    acc = ps(64, 64)
    nisa.memset(acc, 0.0)
    matmul(acc, t, t)
    nisa.memset(acc[:, 0:32], 0.0)
    matmul(acc, t, t)


BROKEN = [
    ("start-partition", lambda t: nisa.memset(t[5:10], 0.0)),
    ("start-partition", lambda t: nisa.tensor_copy(t[32:96], t[0:64])),
    ("partition-step", lambda t: nisa.tensor_copy(t[0:64], t[0:128:2])),
    ("partition-match", lambda t: nisa.tensor_copy(t[0:32], t[0:64])),
    ("element-count", lambda t: nisa.tensor_copy(t[:, 0:8], t)),
    (
        "free-dims",
        lambda t: nisa.tensor_copy(
            sb(128, 32), t.ap([*[[64, 128], [3, 2], [5, 2], [1, 2], [7, 2], [2, 2]][:5], [9, 2]])
        ),
    ),
    ("buffer", lambda t: nisa.tensor_copy(t, nl.ndarray((128, 64), nl.float32, buffer=nl.hbm))),
    ("buffer", lambda t: nisa.dma_copy(t, ps(128, 64))),
    ("buffer", lambda t: nisa.tensor_copy(ps(128, 64), t, engine=nisa.engine.gpsimd)),
    ("buffer", lambda t: matmul(t[0:64, 0:64], t, t)),
    ("engine", lambda t: nisa.tensor_copy(t, t, engine=nisa.engine.tensor)),
    ("psum-inputs", lambda t: nisa.tensor_tensor(t, ps(128, 64), ps(128, 64), nl.add)),
    ("psum-bank", lambda t: matmul(ps(64, 600)[:, 480:544], t, t)),
    ("psum-accumulate", lambda t: matmul(ps(64, 64), t, t, accumulate=True)),
    ("psum-foreign", _twice),
    ("tile-size", lambda t: matmul(ps(64, 1024)[:, 0:513], t, sb(128, 513))),
    ("tile-size", lambda t: matmul(ps(128, 64), sb(128, 129), t)),
    ("dtype", lambda t: matmul(ps(64, 64), sb(128, 64, dtype=nl.int32), t)),
    ("dtype-match", lambda t: matmul(ps(64, 64), sb(128, 64, dtype=nl.bfloat16), t)),
    ("dtype", lambda t: nisa.tensor_scalar(t, t, nl.bitwise_and, 1)),
    ("operator", lambda t: nisa.activation(t, nl.add, t)),
    ("generation", lambda t: nisa.tensor_tensor(t, t, t, nl.abs_max)),
    ("axis", lambda t: nisa.tensor_reduce(t[:, 0:1], nl.add, t, axis=0)),
    ("value", lambda t: nisa.memset(sb(4, 4, dtype=nl.int32), 1.5)),
    (
        "dge",
        lambda t: nisa.dma_copy(sb(128, 64, dtype=nl.bfloat16), t, dge_mode=nisa.dge_mode.hwdge),
    ),
    ("generation", lambda t: nisa.dma_copy(t, t, priority=1)),
    ("tile-position", lambda t: matmul(ps(64, 64), t, t, tile_position=(0, 0))),
    ("bounds", lambda t: nisa.tensor_copy(t, t.ap([[64, 128], [1, 64]], offset=1))),
    ("shape", lambda t: nisa.tensor_scalar(t, t, nl.add, t[:, 0:2])),
    ("on-chip-rank", lambda t: nl.ndarray((4,), nl.float32)),
    ("shape", lambda t: nl.ndarray((4, 0), nl.float32)),
    ("partition-limit", lambda t: nl.ndarray((129, 4), nl.float32)),
]


@pytest.mark.parametrize(
    ("rule", "body"), BROKEN, ids=[f"{i}-{b[0]}" for i, b in enumerate(BROKEN)]
)
def test_broken_rules(rule, body):
    def kernel(x):
        body(nl.load(x))

    for _ in range(2):  # a cached check refuses as well
        with pytest.raises(SimulationError) as caught:
            run(kernel, X)
        error = caught.value
        assert error.rule == rule, error
        assert error.source and error.location.filename == __file__


def test_messages_hold_what_is_needed():
    def kernel(x):
        tile = nl.load(x)
        nisa.tensor_copy(dst=tile[0:32], src=tile[0:64])

    with pytest.raises(SimulationError) as caught:
        run(kernel, X)
    text = str(caught.value)
    for part in (
        "tensor_copy.src",
        "64 partitions",
        "got 64, allowed 32",
        "rule partition-match",
        "test_core.py",
        "nisa.tensor_copy(dst=tile[0:32], src=tile[0:64])",
        "[64, 64]",
    ):
        assert part in text
