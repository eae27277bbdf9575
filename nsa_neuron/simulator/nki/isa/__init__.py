"""The vendor's `nki.isa`: instructions, registers, enums."""

from ...errors import SimulationError as NkiValidationError
from ...record import Instruction as NkiInstruction
from ...registers import VirtualRegister
from . import constants
from .act import activation, activation_reduce
from .constants import *  # noqa: F403  (the enums are names of nki.isa too)
from .dma import core_barrier, dma_copy, sendrecv
from .dve import memset, tensor_copy, tensor_reduce, tensor_scalar, tensor_tensor
from .pe import nc_matmul, nc_transpose
from .pool import iota
from .registers import (
    get_nc_sub_version,
    get_nc_version,
    register_alloc,
    register_load,
    register_move,
    register_store,
)
