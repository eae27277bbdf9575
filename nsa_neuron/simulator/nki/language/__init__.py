"""The vendor's `nki.language`: dtypes, buffers, tensors, loops, operators."""

from ...issue.control import (
    affine_range,
    fori_loop,
    no_reorder,
    sequential_range,
    static_range,
    while_loop,
)
from ...issue.control import dynamic_range as _dynamic_range
from ...machine.dtypes import (
    DType,
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
from ...machine.dtypes import int64 as _int64
from ...machine.regions import MemoryRegion
from ...memory.tensor import NKIObject, NkiTensor
from ..remedies import Names as _Names
from ..typing import tensor
from .composites import (
    broadcast_to,
    ceil,
    cos,
    dropout,
    expand_dims,
    floor,
    negative,
    rand,
    random_seed,
    rms_norm,
    softmax,
    tan,
    trunc,
    where,
)
from .grids import NkiBlockGrid as _NkiBlockGrid
from .grids import NkiGrid as _NkiGrid
from .grids import NkiTileGrid as _NkiTileGrid
from .grids import alloc_blocks as _alloc_blocks
from .grids import alloc_tiles as _alloc_tiles
from .grids import blocks as _blocks
from .grids import tiles as _tiles
from .making import (
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
from .operators import TABLE as _TABLE
from .reductions import all, max, mean, min, prod, sum, var
from .transfers import (
    gather_flattened,
    load,
    load_transpose2d,
    matmul,
    shared_constant,
    shared_identity_matrix,
    store,
    transpose,
)

bool = bool_
range = range
dtype = str
globals().update(_TABLE)

_versioned = _Names(
    __name__,
    dynamic_range=_dynamic_range,
    int64=_int64,
    NkiGrid=_NkiGrid,
    NkiTileGrid=_NkiTileGrid,
    NkiBlockGrid=_NkiBlockGrid,
    tiles=_tiles,
    blocks=_blocks,
    alloc_tiles=_alloc_tiles,
    alloc_blocks=_alloc_blocks,
)
__getattr__ = _versioned.__call__
__dir__ = _versioned.listed
