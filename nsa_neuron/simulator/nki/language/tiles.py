"""`nl.tile_size`, buffers, and the creation of tensors."""

import numpy as np

from ...context import STATE, require_core, violation
from ...machine import TRN2
from ...regions import MemoryRegion
from ...tensor import DynamicSlice, NKIObject

sbuf = MemoryRegion.sbuf
psum = MemoryRegion.psum
private_hbm = MemoryRegion.private_hbm
shared_hbm = MemoryRegion.shared_hbm
hbm = private_hbm


class _TileSize(NKIObject):
    """Sizes of tiles in partitions, elements or bytes (trainium2.md 2.1)."""

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
    core = STATE.core or require_core("nl.ndarray")
    if type(buffer) is not MemoryRegion:
        raise _no_region(buffer)
    # .value is a slow descriptor
    return core.allocate(shape, dtype, buffer._value_, name or "", address)


def full(shape, fill_value, dtype, buffer=sbuf, name=""):
    """A new tensor filled with a constant."""
    from ..isa import dma_copy, memset

    tensor = ndarray(shape, dtype, buffer, name)
    value = int(fill_value) if tensor.dtype.is_integer else fill_value
    if not tensor.on_chip:
        _fill_hbm(tensor, value, dma_copy, memset)
        return tensor
    memset(tensor, value)
    return tensor


def _fill_hbm(tensor, value, dma_copy, memset):
    """Fill an HBM tensor from one SBUF tile of at most 128 x 8 KiB."""
    size = tensor.size
    columns = min(size, 8192 // tensor.dtype.itemsize)
    rows = min(tile_size.pmax, size // columns)
    tile = ndarray((rows, columns), tensor.dtype)
    memset(tile, value)
    flat = tensor.reshape((size,))
    start = 0
    while start < size:
        count = min((size - start) // columns, rows)
        width = columns if count else size - start
        count = count or 1
        part = flat.slice(0, start, start + count * width).reshape((count, width))
        dma_copy(part, tile[0:count, 0:width])
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
