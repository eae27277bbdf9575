"""The vendor's `nki.isa`: instructions, registers, enums."""

from ...issue.record import Instruction as NkiInstruction
from ...rules.errors import SimulationError as NkiValidationError
from ...rules.registers import NkiScalar as _NkiScalar
from ...rules.registers import VirtualRegister
from ..remedies import Names as _Names
from . import constants
from .act import activation, activation_reduce
from .constants import *  # noqa: F403  (the enums are names of nki.isa too)
from .dma import dma_copy
from .dma_compute import dma_compute
from .dma_transpose import dma_transpose
from .dve import memset, tensor_copy, tensor_tensor
from .dve_accumulate import tensor_scalar_cumulative, tensor_scalar_reduce
from .dve_reduce import bn_aggr, bn_stats, tensor_reduce, tensor_tensor_scan
from .dve_scalar import reciprocal, scalar_tensor_tensor, tensor_scalar
from .dve_search import max8, nc_find_index8, nc_match_replace8, nc_stream_shuffle
from .dve_select import range_select, select_reduce, tensor_copy_predicated
from .gen4 import activate2, exponential, nc_matmul_mx, quantize_mx, rand2
from .pair import core_barrier, sendrecv
from .pe import nc_matmul, nc_transpose
from .pool import affine_select, iota, local_gather, nc_n_gather
from .pool_search import nonzero_with_count, sequence_bounds, tensor_partition_reduce, topk
from .random import dropout, rand_get_state, rand_set_state, rng, set_rng_seed
from .registers import (
    get_nc_sub_version,
    get_nc_version,
    register_alloc,
    register_load,
    register_move,
    register_store,
)
from .scalars import scalar_load as _scalar_load
from .scalars import scalar_store as _scalar_store

_versioned = _Names(
    __name__, NkiScalar=_NkiScalar, scalar_load=_scalar_load, scalar_store=_scalar_store
)
__getattr__ = _versioned.__call__
__dir__ = _versioned.listed
