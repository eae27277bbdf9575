"""The inputs of one selected attention, as its launchers hand them on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nsa_neuron.backends.cuda.launch.common import Plan, head_dim_constants, packed_args


@dataclass(frozen=True)
class Call:
    """Kernels, plan and inputs; shapes as in `forward`.

    Attributes:
        block_indices: contiguous. cu: cu_seqlens_q and cu_seqlens_k, or None and None.
    """

    kernels: Any
    plan: Plan
    q: Tensor
    k: Tensor
    v: Tensor
    block_indices: Tensor
    select_block: int
    scale: float
    cu: tuple[Tensor | None, Tensor | None]

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.q.shape[2] // self.k.shape[2]

    @property
    def head_dims(self) -> dict[str, int]:
        """The constants DK, D0, D1, DV, V0, V1."""
        return head_dim_constants(self.q.shape[3], self.v.shape[3])

    @property
    def packed(self) -> tuple[Tensor, Tensor, int]:
        """cu_q, cu_k and the number of sequences as kernels take them."""
        return packed_args(*self.cu, self.block_indices)

    def flagged(self, chosen: Tensor | None) -> tuple[dict[str, Any], Tensor]:
        """Constants G and MEASURED, and the flag as kernels take it (unread where not MEASURED)."""
        shared = {"G": self.group, "MEASURED": chosen is not None}
        return shared, self.block_indices if chosen is None else chosen
