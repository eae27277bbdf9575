"""Moving data: load, store, transposes, matmul, gather, constants."""

import os

import numpy as np

from ...issue.current import require_core
from ...machine.dtypes import bits, convert, float32, resolve, uint8, uint32
from ...memory.tensor import NkiTensor
from ...rules.session import violation
from .. import isa
from .making import ndarray, new_tile, psum, require_tile, sbuf
from .operators import TABLE


def _require_hbm(src, name):
    if not isinstance(src, NkiTensor) or src.on_chip:
        raise violation(
            "usage",
            "must be a tensor in HBM",
            instruction=f"nl.{name}",
            operand="src",
            value=repr(src) if isinstance(src, NkiTensor) else type(src).__name__,
            hint="nl.copy copies a tile",
        )


def load(src, dtype=None):
    """An SBUF copy of an HBM tensor, by `dma_copy`."""
    _require_hbm(src, "load")
    tile = ndarray(src.shape, dtype or src.dtype, sbuf)
    isa.dma_copy(tile, src)
    return tile


def store(dst, value):
    """Copy an SBUF tile to HBM, by `dma_copy`."""
    require_tile(value, "store", "value")
    isa.dma_copy(dst, value)


def load_transpose2d(src, dtype=None):
    """An SBUF copy of an HBM matrix, transposed, by `dma_transpose`."""
    _require_hbm(src, "load_transpose2d")
    if src.ndim != 2:
        raise violation(
            "shape",
            "must be 2-D",
            instruction="nl.load_transpose2d",
            operand="src",
            value=src.shape,
        )
    tile = ndarray(src.shape[::-1], src.dtype, sbuf)
    isa.dma_transpose(tile, src)
    if dtype is not None and resolve(dtype).name != src.dtype.name:
        return TABLE["copy"](tile, dtype)
    return tile


def transpose(x, dtype=None):
    """x transposed into PSUM, on the Tensor Engine."""
    require_tile(x, "transpose")
    if x.ndim != 2:
        raise violation(
            "shape", "must be 2-D", instruction="nl.transpose", operand="x", value=x.shape
        )
    if dtype is not None and resolve(dtype).name != x.dtype.name:
        x = TABLE["copy"](x, dtype)
    out = ndarray(x.shape[::-1], x.dtype, psum)
    isa.nc_transpose(out, x, engine=isa.engine.tensor)
    return out


def matmul(x, y, transpose_x=False):
    """x @ y, or x.T @ y, in a new fp32 PSUM tile."""
    require_tile(x, "matmul")
    require_tile(y, "matmul", "y")
    if not transpose_x:
        x = TABLE["copy"](transpose(x))
    out = ndarray((x.shape[1], y.shape[1]), float32, psum)
    isa.nc_matmul(out, x, y)
    return out


def gather_flattened(data, indices, axis=0, dtype=None):
    """out[p, j] = data.flat[p][indices[p, j]], by `nc_n_gather`."""
    require_tile(data, "gather_flattened", "data")
    require_tile(indices, "gather_flattened", "indices")
    if axis != 0:
        raise violation(
            "value",
            "gathers within each partition",
            instruction="nl.gather_flattened",
            operand="axis",
            value=axis,
            limit=0,
        )
    if indices.dtype.name != "uint32":
        indices = TABLE["copy"](indices, uint32)
    out = new_tile(indices.shape, data.dtype)
    isa.nc_n_gather(out, data, indices)
    if dtype is not None and resolve(dtype).name != data.dtype.name:
        return TABLE["copy"](out, dtype)
    return out


def shared_constant(constant):
    """An HBM tensor that holds an array, or the array of a .npy file, from load time on.

    Raises:
        SimulationError: the constant differs between the cores of a launch.
    """
    core = require_core("nl.shared_constant")
    if isinstance(constant, str | os.PathLike):
        constant = np.load(constant)
    if not isinstance(constant, np.ndarray):
        raise violation(
            "usage",
            "must be a NumPy array or the path of a .npy file",
            instruction="nl.shared_constant",
            operand="constant",
            value=type(constant).__name__,
        )
    dtype = resolve(constant.dtype)
    tensor = core.allocate(constant.shape, dtype, "shared_hbm", "", role="constant")
    if core.data:
        array = tensor.array()
        value = convert(np.ascontiguousarray(constant), array.dtype)
        if not tensor.memory.written.full:
            array[...] = value
        elif not np.array_equal(bits(array), bits(value)):
            raise violation(
                "lnc-sync",
                "the cores embed different constants",
                instruction="nl.shared_constant",
                operand="constant",
            )
    tensor.memory.written.fill()
    return tensor


def shared_identity_matrix(n, dtype=uint8, dst=None):
    """An n x n identity matrix in SBUF, or in `dst`; one per size and dtype is shared."""
    core = require_core("nl.shared_identity_matrix")
    kind = resolve(dtype if dst is None else dst.dtype)
    key = ("identity", n, kind.name)
    tile = core.state.get(key) if dst is None else dst
    if tile is not None and tile is not dst and not tile.memory.allocation.closed:
        return tile
    constant = (*key, "hbm")
    source = core.state.get(constant)
    if source is None or source.memory.allocation.closed:
        source = shared_constant(np.eye(n, dtype=np.float32).astype(kind.numpy))
        source = core.state[constant] = source.view(kind)
    if dst is None:
        tile = core.state[key] = ndarray((n, n), kind, sbuf)
    isa.dma_copy(tile, source)
    return tile
