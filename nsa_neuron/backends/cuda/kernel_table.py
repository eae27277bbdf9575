"""Every Triton kernel with its argument types, for compiling it where nothing can be launched.

A launch derives an argument's type from the value passed; a compile check has no values. An entry
names what differs from the conventions all kernels follow:

- `stride_*` is an int32 divisible by 16, `scale` a float32, `cu_*` an int32 pointer;
- the names in `INTEGERS` are int32; those in `FLOAT32_TENSORS` float32 pointers;
- any other argument that is not a constant is a pointer to the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nsa_neuron.backends.cuda.launch.common import head_dim_constants

INTEGERS = frozenset({"num_seqs", "S", "T", "HQ", "rows", "heads", "tokens"})
FLOAT32_TENSORS = frozenset({"lse", "delta", "grad_lse"})

Constants = Callable[[int, int, int], Mapping[str, Any]]


@dataclass(frozen=True)
class KernelEntry:
    """One kernel as the compile check sees it.

    Attributes:
        op: whose plan file holds its constants. kernel: name of the function, and of its plan
            unless `plan` says otherwise. module: module inside `cuda_kernels`.
        derive: constants from (dk, dv, G) that no plan holds.
        types: Triton types of arguments that break the conventions; `"dtype"` stands for the
            compute dtype, as in `"*dtype"`.
        wants_wgmma: whether its matrix products must be warpgroup instructions.
        min_group, max_group: the group sizes it is launched for.
    """

    op: str
    kernel: str
    module: str
    derive: Constants
    types: Mapping[str, str] = field(default_factory=dict)
    wants_wgmma: bool = True
    plan: str = ""
    min_group: int = 1
    max_group: int = 1 << 30

    def constants(self, dk: int, dv: int, group: int) -> dict[str, Any]:
        return dict(self.derive(dk, dv, group))

    def type_of(self, name: str) -> str:
        """The Triton type of argument `name`, `dtype` standing for the compute dtype."""
        if name in self.types:
            return self.types[name]
        if name in INTEGERS or name.startswith("stride_"):
            return "i32"
        if name == "scale":
            return "fp32"
        if name.startswith("cu_"):
            return "*i32"
        return "*fp32" if name in FLOAT32_TENSORS else "*dtype"

    def is_aligned(self, name: str, kind: str) -> bool:
        """Whether a launch would find the argument divisible by 16."""
        return kind.startswith("*") or name.startswith("stride_")


def _banded(window: int) -> Constants:
    def constants(dk: int, dv: int, group: int) -> Mapping[str, Any]:
        return {"G": group, "WINDOW": window, "PACKED": False, **head_dim_constants(dk, dv)}

    return constants


def _delta(dk: int, dv: int, group: int) -> Mapping[str, Any]:
    dims = head_dim_constants(dk, dv)
    return {name: dims[name] for name in ("DV", "V0", "V1")} | {"HAS_GRAD_LSE": False}


def _flash(op: str, window: int) -> tuple[KernelEntry, ...]:
    matmuls = ("forward", "backward_dq", "backward_dkv")
    return (
        *(KernelEntry(op, kernel, op, _banded(window)) for kernel in matmuls),
        KernelEntry(op, "backward_delta", op, _delta, wants_wgmma=False),
    )


KERNELS: tuple[KernelEntry, ...] = (
    *_flash("attention", 0),
    *_flash("sliding_window_attention", 512),
)
