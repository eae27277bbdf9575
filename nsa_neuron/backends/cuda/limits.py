"""What the Triton kernels cannot take, whatever the GPU, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nsa_neuron.backends.cuda.launch.decode import MAX_RATIO
from nsa_neuron.registry import Unsupported

if TYPE_CHECKING:
    from nsa_neuron.spec import Bound

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
MAX_GRID_YZ = 65_535
"""Programs of a CUDA grid along y and z, where the kernels have kv heads and batches (CUDA C++
Programming Guide, technical specifications of compute capabilities)."""


def refusal(bound: Bound) -> Unsupported | None:
    """The refusal of a call that the kernels cannot take."""
    if bound.dtype not in DTYPES:
        known = "float32, float16, bfloat16"
        return Unsupported("dtype", f"{bound.dtype} is not one of {known}")
    for symbol in ("Dk", "Dv", "D"):
        if symbol in bound.sizes and bound[symbol] > MAX_HEAD_DIM:
            return Unsupported("head_dim", f"{symbol} = {bound[symbol]} > {MAX_HEAD_DIM}")
    return _REFUSALS.get(bound.spec.stem, _grid_refusal)(bound)


def _grid_refusal(bound: Bound) -> Unsupported | None:
    lanes = bound.sizes.get("B", 1) * bound.sizes.get("Hkv", 1)
    if lanes > MAX_GRID_YZ:
        reason = f"B * Hkv = {lanes} > {MAX_GRID_YZ}, CUDA's limit of a grid"
        return Unsupported("batch", reason)
    return None


def _decode_refusal(bound: Bound) -> Unsupported | None:
    """Decode's grid is along x, which has room for any batch."""
    ratio = bound["m"] // bound["d"]
    if ratio > MAX_RATIO:
        reason = f"select_block / stride = {ratio} > {MAX_RATIO}, what a tile of keys may hold"
        return Unsupported("ratio", reason)
    return None


_REFUSALS = {"decode": _decode_refusal}
