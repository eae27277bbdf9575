"""Shared by the tests of instructions: tiny kernels around one instruction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

from nsa_neuron import simulator
from nsa_neuron.simulator import SimulationError
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

if TYPE_CHECKING:
    from collections.abc import Callable

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3)
E5M2 = np.dtype(ml_dtypes.float8_e5m2)
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
FLOATS = (F32, BF16, F16, E4M3, E5M2)
RNG = np.random.default_rng(3)


def normal(*shape: int, dtype: Any = np.float32) -> Any:
    """Standard normal numbers of a dtype."""
    return RNG.standard_normal(shape).astype(np.float32).astype(dtype)


def integers(*shape: int, low: int = 0, high: int = 100, dtype: Any = np.int32) -> Any:
    """Integers in [low, high)."""
    return RNG.integers(low, high, shape).astype(dtype)


def sb(*shape: int, dtype: Any = nl.float32) -> Any:
    """An SBUF tile of zeros."""
    return nl.zeros(shape, dtype)


def new(*shape: int, dtype: Any = nl.float32) -> Any:
    """An SBUF tile with undefined contents."""
    return nl.ndarray(shape, dtype)


def ps(*shape: int, dtype: Any = nl.float32) -> Any:
    """A PSUM tile with undefined contents."""
    return nl.ndarray(shape, dtype, buffer=nl.psum)


def in_psum(tile: Any) -> Any:
    """A copy of a tile in PSUM."""
    copy = ps(*tile.shape, dtype=tile.dtype)
    nisa.tensor_copy(copy, tile)
    return copy


def stored(tile: Any) -> Any:
    """A fresh result that holds a tile."""
    if tile.buffer is nl.psum:
        copy = nl.ndarray(tile.shape, tile.dtype)
        nisa.tensor_copy(copy, tile)
        tile = copy
    out = nl.ndarray(tile.shape, tile.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(out, tile)
    return out


def simulated(body: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
    """Load the arrays into SBUF, call body, return the tile or tuple of tiles it makes."""
    return record(body, *arrays, **options)[0]


def record(body: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
    """`simulated` and the record of the run."""

    def kernel(*tensors: Any) -> Any:
        tiles = []
        for tensor in tensors:
            tile = nl.ndarray(tensor.shape, tensor.dtype)
            nisa.dma_copy(tile, tensor)
            tiles.append(tile)
        result = body(*tiles)
        if isinstance(result, tuple):
            return tuple(stored(t) for t in result)
        return stored(result)

    sim = simulator.simulate(kernel, **options)
    result = sim(*arrays)
    return result, sim.run


def engines(run: Any, opcode: str) -> list[str]:
    """The engines that an instruction ran on."""
    return [i.engine for i in run.instructions if i.opcode == opcode]


def refused(rule: str, body: Callable[..., Any], *arrays: Any, **options: Any) -> SimulationError:
    """Check that a kernel is refused by a rule, cached or not, naming the test's own line."""
    errors = []
    for _ in range(2):
        with pytest.raises(SimulationError) as caught:
            simulated(body, *arrays, **options)
        error = caught.value
        assert error.rule == rule, error
        assert error.source and error.instruction, error
        assert error.location is not None and error.location.filename.startswith(_HERE), error
        errors.append(error)
    return errors[-1]


_HERE = __file__.rsplit("/", 2)[0]  # the tests of the simulator


def f32(array: Any) -> Any:
    """fp32 values of an array of any dtype."""
    return np.asarray(array).astype(np.float32)


def close(got: Any, want: Any, dtype: Any = None, rtol: float = 2e-6) -> None:
    """Compare with a reference that was computed in higher precision and not rounded."""
    dtype = np.dtype(got.dtype if dtype is None else dtype)
    if dtype.kind in "iu":
        np.testing.assert_array_equal(got, want)
        return
    eps = 0.0 if dtype == np.float32 else float(ml_dtypes.finfo(dtype).eps) * 0.51
    tiny = 0.0 if dtype == np.float32 else float(ml_dtypes.finfo(dtype).smallest_subnormal)
    np.testing.assert_allclose(f32(got), f32(want), rtol=max(rtol, eps), atol=max(1e-6, tiny))
