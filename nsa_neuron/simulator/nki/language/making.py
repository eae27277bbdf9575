"""`nl.tile_size`, buffers, and the creation of tensors."""

import numpy as np

from ...issue.current import require_core
from ...machine.dtypes import bfloat16, float32
from ...machine.regions import MemoryRegion
from ...machine.trn2 import TRN2
from ...memory.tensor import DynamicSlice, NKIObject, NkiTensor
from ...rules.session import running, violation
from .. import isa

sbuf = MemoryRegion.sbuf
psum = MemoryRegion.psum
private_hbm = MemoryRegion.private_hbm
shared_hbm = MemoryRegion.shared_hbm
hbm = private_hbm


class _TileSize(NKIObject):
    """Sizes of tiles in partitions, elements or bytes (docs/trainium2.md 2.1)."""

    pmax = TRN2.partitions
    psum_fmax = TRN2.psum_bank_fp32
    psum_bank_fmax = TRN2.psum_bank_fp32
    psum_bank_fmax_bytes = TRN2.psum_bank_bytes
    gemm_stationary_fmax = TRN2.stationary_free
    gemm_moving_fmax = TRN2.moving_free
    bn_stats_fmax = TRN2.bn_stats_free
    # The values of the alignments are not published; 4 bytes is the widest element.
    psum_min_align = 4
    sbuf_min_align = 4
    psum_num_banks = TRN2.psum_banks
    sbuf_fmax_bytes = TRN2.sbuf_bytes
    total_available_sbuf_size = TRN2.sbuf_bytes
    sbuf_fmax = TRN2.sbuf_bytes // 4
    sbuf_size_bytes = TRN2.partitions * TRN2.sbuf_bytes


tile_size = _TileSize()


def is_sbuf(buffer):
    """True for `nl.sbuf`."""
    return buffer is sbuf


def is_psum(buffer):
    """True for `nl.psum`."""
    return buffer is psum


def is_hbm(buffer):
    """True for private and shared HBM."""
    return buffer in (private_hbm, shared_hbm)


def is_on_chip(buffer):
    """True for SBUF and PSUM."""
    return buffer in (sbuf, psum)


def _no_region(buffer):
    return violation(
        "usage",
        "buffer= takes a region object (strings went with NKI 0.3)",
        operand="buffer",
        value=buffer,
        limit="nl.sbuf, nl.psum, nl.hbm, ...",
    )


def ndarray(shape, dtype, buffer=sbuf, name="", address=None):
    """A new tensor with undefined contents."""
    core = running() or require_core("nl.ndarray")
    if type(buffer) is not MemoryRegion:
        raise _no_region(buffer)
    # .value is a slow descriptor
    return core.allocate(shape, dtype, buffer._value_, name or "", address)


def full(shape, fill_value, dtype, buffer=sbuf, name=""):
    """A new tensor filled with a constant."""
    tensor = ndarray(shape, dtype, buffer, name)
    value = int(fill_value) if tensor.dtype.is_integer else fill_value
    if not tensor.on_chip:
        _fill_hbm(tensor, value)
        return tensor
    isa.memset(tensor, value)
    return tensor


def _fill_hbm(tensor, value):
    """Fill an HBM tensor from one SBUF tile of at most 128 x 8 KiB."""
    size = tensor.size
    columns = min(size, 8192 // tensor.dtype.itemsize)
    rows = min(tile_size.pmax, size // columns)
    tile = ndarray((rows, columns), tensor.dtype)
    isa.memset(tile, value)
    flat = tensor.reshape((size,))
    start = 0
    while start < size:
        count = min((size - start) // columns, rows)
        width = columns if count else size - start
        count = count or 1
        part = flat.slice(0, start, start + count * width).reshape((count, width))
        isa.dma_copy(part, tile[0:count, 0:width])
        start += count * width


def zeros(shape, dtype, buffer=sbuf, name=""):
    """A new tensor of zeros."""
    return full(shape, 0, dtype, buffer, name)


def ones(shape, dtype, buffer=sbuf, name=""):
    """A new tensor of ones."""
    return full(shape, 1, dtype, buffer, name)


def empty_like(x, dtype=None, buffer=None, name=""):
    """A new tensor of x's shape with undefined contents."""
    return ndarray(x.shape, dtype or x.dtype, buffer or x.buffer, name)


def zeros_like(x, dtype=None, buffer=None, name=""):
    """A new tensor of zeros of x's shape."""
    return zeros(x.shape, dtype or x.dtype, buffer or x.buffer, name)


def ds(start, size):
    """Elements start .. start + size - 1 of a dim."""
    return DynamicSlice(start, size)


def program_id(axis=0):
    """Index of this core in the launch."""
    return require_core("nl.program_id").index


def num_programs(axes=0):
    """Number of cores of the launch."""
    return require_core("nl.num_programs").launch.lnc


def program_ndim():
    """Number of launch axes: 0 without a bracket, 1 with."""
    return 1 if require_core("nl.program_ndim").launch.lnc > 1 else 0


def device_print(print_prefix, tensor):
    """Print a tensor's values at run time."""
    core = require_core("nl.device_print")
    if core.data:
        print(print_prefix, np.asarray(tensor.array()))
    else:
        print(print_prefix, tensor)


def promote(a, b):
    """Result dtype of two tiles: fp32 for unlike floats, bf16 for unlike fp8, else the wider.

    `nl` documents the default only for equal dtypes ("the same as the input tile"); for unlike
    ones this is the rule of NKI 0.1 (SDK 2.26 nki/api/nki.api.shared.rst).
    """
    if a.name == b.name:
        return a
    if a.is_float != b.is_float:
        return a if a.is_float else b
    if a.is_float:
        if a.is_fp8 and b.is_fp8:
            return bfloat16
        if a.itemsize == b.itemsize:
            return float32
    return a if a.itemsize >= b.itemsize else b


def new_tile(shape, dtype):
    """An SBUF tile for a result; a 1-D shape gets a free dim of 1."""
    shape = tuple(shape)
    return ndarray(shape if len(shape) > 1 else (*shape, 1), dtype, sbuf)


def require_tile(x, function, operand="x"):
    """Refuse anything but a tensor on chip."""
    if not isinstance(x, NkiTensor) or not x.on_chip:
        given = repr(x) if isinstance(x, NkiTensor) else type(x).__name__
        raise violation(
            "usage",
            "must be a tile in SBUF or PSUM",
            instruction=f"nl.{function}",
            operand=operand,
            value=given,
            hint="nl.load it first",
        )
    return x


def _fits(shape, target):
    """True when `shape` broadcasts to `target` along free dims only."""
    return (
        len(shape) == len(target)
        and shape[0] == target[0]
        and all(n in (1, m) for n, m in zip(shape, target, strict=True))
    )


def broadcast_pair(x, y, function):
    """Views of both tiles in one shape; size-1 free dims are repeated by a stride of 0.

    Raises:
        SimulationError: rule "shape": other shapes, which NKI 0.3 to 0.6 do not broadcast.
    """
    if x.size == y.size and x.shape[0] == y.shape[0]:
        return x, y, x.shape if x.ndim >= y.ndim else y.shape
    if x.ndim == y.ndim and x.shape[0] == y.shape[0]:
        target = tuple(max(a, b) for a, b in zip(x.shape, y.shape, strict=True))
        if _fits(x.shape, target) and _fits(y.shape, target):
            return repeat(x, target), repeat(y, target), target
    raise violation(
        "shape",
        "the tiles' shapes differ",
        instruction=f"nl.{function}",
        operand="y",
        value=y.shape,
        limit=x.shape,
        hint="nl.broadcast_to(y, x.shape)",
    )


def repeat(x, shape):
    """A view of x with its size-1 free dims repeated to `shape`."""
    for dim in range(1, len(shape)):
        if x.shape[dim] != shape[dim]:
            x = x.broadcast(dim, shape[dim])
    return x
