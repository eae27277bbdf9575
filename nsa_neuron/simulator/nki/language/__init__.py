"""The vendor's `nki.language`: dtypes, buffers, tensors, loops, operators."""

from ...control import dynamic_range, fori_loop, no_reorder, static_range, while_loop
from ...dtypes import (
    bfloat16,
    bool_,
    float4_e2m1fn_x4,
    float8_e4m3,
    float8_e4m3fn,
    float8_e4m3fn_x4,
    float8_e5m2,
    float8_e5m2_x4,
    float8_e8m0fnu,
    float16,
    float32,
    int8,
    int16,
    int32,
    tfloat32,
    uint8,
    uint16,
    uint32,
)
from ...regions import MemoryRegion
from ...tensor import NKIObject, NkiTensor
from .operators import TABLE as _TABLE
from .tiles import (
    device_print,
    ds,
    empty_like,
    full,
    hbm,
    is_hbm,
    is_on_chip,
    is_psum,
    is_sbuf,
    ndarray,
    num_programs,
    ones,
    private_hbm,
    program_id,
    program_ndim,
    psum,
    sbuf,
    shared_hbm,
    tile_size,
    zeros,
    zeros_like,
)

affine_range = sequential_range = static_range
bool = bool_
range = range
globals().update(_TABLE)


def load(src, dtype=None):
    """An SBUF copy of an HBM tensor."""
    from ..isa import dma_copy

    tile = ndarray(src.shape, dtype or src.dtype, sbuf)
    dma_copy(tile, src)
    return tile


def store(dst, value):
    """Copy a tile to HBM."""
    from ..isa import dma_copy, tensor_copy

    if value.buffer is psum:
        tile = ndarray(value.shape, value.dtype, sbuf)
        tensor_copy(tile, value)
        value = tile
    dma_copy(dst, value)
