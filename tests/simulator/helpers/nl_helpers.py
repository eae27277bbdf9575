"""Run an `nl` function on tiles and hand back what it made."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsa_neuron import simulator
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl


def to_result(tile: Any) -> Any:
    """Copy a tile to a fresh result tensor."""
    if not tile.on_chip:
        return tile
    if tile.buffer is nl.psum:
        tile = nl.copy(tile)
    out = nl.ndarray(tile.shape, tile.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(out, tile)
    return out


def apply(function: Any, *arrays: Any, **options: Any) -> np.ndarray:
    """Load the arrays, call `function(*tiles)`, return its tile as an array."""
    return record(function, *arrays, **options)[0]


def record(function: Any, *arrays: Any, **options: Any) -> tuple[np.ndarray, list[str]]:
    """`apply`, and the "engine.opcode" of the instructions between loads and the last copy."""

    def kernel(*tensors: Any) -> Any:
        return to_result(function(*[nl.load(t) for t in tensors]))

    run = simulator.simulate(kernel, **options)
    out = run(*arrays)
    assert run.run is not None
    used = [f"{i.engine}.{i.opcode}" for i in run.run.cores[0].instructions]
    return out, used[len(arrays) : -1]


def normal(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    """Standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)
