"""`nl` functions of several instructions and transfers against NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from nl_helpers import apply, normal, record, to_result

from nsa_neuron import simulator
from nsa_neuron.simulator import SimulationError
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl


@pytest.mark.parametrize("name", ["sin", "cos", "tan"])
def test_trigonometry_reduces_its_argument(name):
    x = np.concatenate([np.linspace(-40, 40, 4001), [0.0, np.pi, -np.pi, 1000.0, -7.0]])
    x = x.astype(np.float32)[None]
    want = getattr(np, name)(x.astype(np.float64))
    got = apply(getattr(nl, name), x)
    if name == "tan":
        far = np.abs(want) < 20
        np.testing.assert_allclose(got[far], want[far], rtol=1e-4, atol=2e-5)
    else:
        np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("axis, shape", [(-1, (128, 64)), (1, (7, 300)), ((1, 2), (16, 3, 5))])
def test_softmax(axis, shape):
    x = 5 * normal(*shape)
    wide = np.exp(x.astype(np.float64) - x.max(axis=axis, keepdims=True))
    want = wide / wide.sum(axis=axis, keepdims=True)
    np.testing.assert_allclose(apply(lambda t: nl.softmax(t, axis), x), want, rtol=3e-6)


def test_softmax_of_the_last_of_three_axes():
    x = normal(16, 3, 5)
    wide = np.exp(x.astype(np.float64))
    want = wide / wide.sum(-1, keepdims=True)
    np.testing.assert_allclose(apply(lambda t: nl.softmax(t, axis=2), x), want, rtol=3e-6)


@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_rms_norm(rows, dtype):
    x, w = normal(32, 50).astype(dtype), normal(rows, 50, seed=1).astype(dtype)
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-6) * w.astype(np.float64)
    got = apply(lambda x, w: nl.rms_norm(x, w, axis=1, n=50), x, w)
    assert got.dtype == dtype
    rtol = 3e-6 if dtype is np.float32 else 1e-2
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=rtol, atol=1e-6)


def test_where():
    c = (normal(64, 20) > 0).astype(np.float32)
    x, y = normal(64, 20, seed=1), normal(64, 20, seed=2)
    np.testing.assert_array_equal(apply(nl.where, c, x, y), np.where(c, x, y))
    np.testing.assert_array_equal(apply(lambda c, x: nl.where(c, x, 7.0), c, x), np.where(c, x, 7))
    np.testing.assert_array_equal(
        apply(lambda c, y: nl.where(c, -1.0, y), c, y), np.where(c, -1, y)
    )


@pytest.mark.parametrize("shape", [(128, 16), (48, 16), (1, 16)])
def test_broadcast_to_more_partitions(shape):
    x = normal(1, 16)
    got, used = record(lambda t: nl.broadcast_to(t, shape), x)
    np.testing.assert_array_equal(got, np.broadcast_to(x, shape))
    assert used == ["vector.nc_stream_shuffle"] * (-(-shape[0] // 32) if shape[0] > 1 else 0)


def test_broadcast_to_free_dims_is_a_view():
    x = normal(16, 1, 3)
    got, used = record(lambda t: nl.broadcast_to(t, (16, 4, 3)), x)
    np.testing.assert_array_equal(got, np.broadcast_to(x, (16, 4, 3)))
    assert used == []


def test_broadcast_to_refuses_other_shapes():
    with pytest.raises(SimulationError) as error:
        apply(lambda t: nl.broadcast_to(t, (16, 4)), normal(16, 3))
    assert error.value.rule == "shape"


def test_expand_dims():
    x = normal(16, 3)
    np.testing.assert_array_equal(apply(lambda t: nl.expand_dims(t, 1), x), x[:, None])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_matmul(dtype):
    x, y = normal(64, 32).astype(dtype), normal(32, 200, seed=1).astype(dtype)
    want = x.astype(np.float64) @ y.astype(np.float64)
    got, used = record(nl.matmul, x, y)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    assert "tensor.nc_transpose" in used
    got, used = record(lambda x, y: nl.matmul(x, y, transpose_x=True), x.T.copy(), y)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    assert "tensor.nc_transpose" not in used


def test_transpose_is_in_psum():
    x = normal(100, 60, dtype=np.float16)

    def kernel(x):
        tile = nl.transpose(nl.load(x))
        assert tile.buffer is nl.psum
        return to_result(tile)

    np.testing.assert_array_equal(simulator.simulate(kernel)(x), x.T)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_load_transpose2d(dtype):
    x = normal(128, 64).astype(dtype)

    def kernel(x):
        return to_result(nl.load_transpose2d(x))

    np.testing.assert_array_equal(simulator.simulate(kernel)(x), x.T)


def test_load_with_a_cast_and_of_too_many_partitions():
    x = normal(200, 4)

    def cast(x):
        return to_result(nl.load(x[0:100], dtype=nl.float16))

    np.testing.assert_array_equal(simulator.simulate(cast)(x), x[:100].astype(np.float16))
    with pytest.raises(SimulationError) as error:
        apply(lambda t: t, x)
    assert error.value.rule == "partition-limit"


def test_store_takes_no_psum():
    with pytest.raises(SimulationError) as error:

        def kernel(x):
            out = nl.ndarray(x.shape[::-1], x.dtype, buffer=nl.shared_hbm)
            nl.store(out, nl.transpose(nl.load(x)))
            return out

        simulator.simulate(kernel)(normal(8, 8))
    assert error.value.rule == "buffer"


def test_gather_flattened():
    data = normal(64, 40)
    index = np.random.default_rng(1).integers(0, 40, (64, 25)).astype(np.uint32)
    want = np.take_along_axis(data, index.astype(np.int64), 1)
    np.testing.assert_array_equal(apply(nl.gather_flattened, data, index), want)


def test_random_numbers_repeat_after_a_seed():
    def kernel():
        seed = nl.full((1, 1), 42, dtype=nl.int32)
        draws = []
        for _ in range(2):
            nl.random_seed(seed)
            draws.append(to_result(nl.rand((128, 64), nl.float32)))
        draws.append(to_result(nl.rand((128, 64), nl.float32)))
        return tuple(draws)

    a, b, c = simulator.simulate(kernel)()
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(b, c)
    assert 0 <= a.min() and a.max() < 1
    assert abs(a.mean() - 0.5) < 0.02 and abs(a.var() - 1 / 12) < 0.005


def test_random_seed_of_a_number_says_what_to_write():
    with pytest.raises(SimulationError, match=r"nl\.full"):
        simulator.simulate(lambda: nl.random_seed(3))()


def test_dropout():
    x = np.ones((128, 500), np.float32)
    got = apply(lambda t: nl.dropout(t, 0.25), x)
    assert set(np.unique(got)) == {0.0, 1.0}
    assert abs((got == 0).mean() - 0.25) < 0.02
    np.testing.assert_array_equal(apply(lambda t: nl.dropout(t, 1.0), x), 0 * x)


@pytest.mark.parametrize("dtype", [nl.uint8, nl.float32, nl.bfloat16, nl.float16])
def test_shared_identity_matrix(dtype):
    def kernel():
        first = nl.shared_identity_matrix(100, dtype=dtype)
        assert first is nl.shared_identity_matrix(100, dtype=dtype)
        other = nl.ndarray((100, 100), dtype)
        nl.shared_identity_matrix(100, dst=other)
        return to_result(first), to_result(other)

    for got in simulator.simulate(kernel)():
        np.testing.assert_array_equal(got.astype(np.float32), np.eye(100))


def test_shared_constant(tmp_path):
    table = normal(3, 40, 7)
    np.save(tmp_path / "table.npy", table)

    def kernel(path):
        a = nl.shared_constant(table)
        assert a.buffer is nl.shared_hbm and a.shape == table.shape
        b = nl.shared_constant(path)
        return to_result(nl.add(nl.load(a[0]), nl.load(b[1])))

    got = simulator.simulate(kernel)(str(tmp_path / "table.npy"))
    np.testing.assert_array_equal(got, table[0] + table[1])


def test_shared_constant_must_not_differ_between_cores():
    def kernel(same):
        data = np.full((4, 4), 0 if same else nl.program_id(0), np.float32)
        return nl.shared_constant(data)

    wrapped = simulator.Kernel(kernel)[2]
    simulator.simulate(wrapped)(True)
    with pytest.raises(SimulationError) as error:
        simulator.simulate(wrapped)(False)
    assert error.value.rule == "lnc-sync"


def test_constructors():
    def kernel():
        a = nl.full((4, 6), 3, nl.int32)
        b = nl.ones((4, 6), nl.int32)
        c = nl.zeros_like(a)
        d = nl.empty_like(a, dtype=nl.float32)
        assert d.dtype == nl.float32 and d.shape == (4, 6)
        nisa.tensor_tensor(c, a, b, nl.add)
        return to_result(c)

    np.testing.assert_array_equal(simulator.simulate(kernel)(), np.full((4, 6), 4))


def test_device_print(capsys):
    apply(lambda t: (nl.device_print("tile:", t), t)[1], np.full((1, 2), 3.0, np.float32))
    assert "tile:" in capsys.readouterr().out
