"""The vendor's `nki.collectives`: communication between the ranks of a run.

`simulate(kernel, ranks=4)` runs a kernel on four ranks; without it a kernel has rank 0 alone.
"""

from ..remedies import Names as _Names
from .functions import (
    all_gather,
    all_reduce,
    all_to_all,
    collective_permute,
    collective_permute_implicit,
    collective_permute_implicit_current_processing_rank_id,
    collective_permute_implicit_reduce,
    rank_id,
    reduce_scatter,
)
from .group import ReplicaGroup
from .split import all_gather_v_prepare as _all_gather_v_prepare
from .split import all_gather_v_trigger as _all_gather_v_trigger
from .split import all_to_all_v_prepare as _all_to_all_v_prepare
from .split import all_to_all_v_trigger as _all_to_all_v_trigger
from .variable import all_gather_v, all_to_all_v

__all__ = [
    "ReplicaGroup",
    "all_gather",
    "all_gather_v",
    "all_reduce",
    "all_to_all",
    "all_to_all_v",
    "collective_permute",
    "collective_permute_implicit",
    "collective_permute_implicit_current_processing_rank_id",
    "collective_permute_implicit_reduce",
    "rank_id",
    "reduce_scatter",
]

_versioned = _Names(
    __name__,
    all_to_all_v_prepare=_all_to_all_v_prepare,
    all_to_all_v_trigger=_all_to_all_v_trigger,
    all_gather_v_prepare=_all_gather_v_prepare,
    all_gather_v_trigger=_all_gather_v_trigger,
)
__getattr__ = _versioned.__call__
__dir__ = _versioned.listed
