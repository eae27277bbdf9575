"""A third party's backend of small kernels, with one of several faults planted in layer 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_neuron.backends import composite
from nsa_neuron.ops import get
from nsa_neuron.registry import Supported, Unsupported

if TYPE_CHECKING:
    from nsa_neuron.registry import Lowered, Verdict
    from nsa_neuron.spec import Bound

HEAD_DIM = 24  # of layer 1, which is where every fault is


def of_layer_1(bound: Bound) -> bool:
    return any(bound.sizes.get(symbol) == HEAD_DIM for symbol in ("D", "Dk", "Dv"))


class AcmeBackend:
    """Runs the references of the parts, but for the fault."""

    name = "acme"

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def modes(self) -> Mapping[str, str]:
        return {"eager": ""}

    def supports(self, bound: Bound, mode: str) -> Verdict:
        if self.fault == "refusal" and of_layer_1(bound):
            return Unsupported("head_dim", f"no kernel for head dim {HEAD_DIM}")
        if self.fault == "no backward" and bound.spec.name.endswith("_backward"):
            return Unsupported("kernel", f"there is no {bound.spec.name} yet")
        if bound.spec.name in composite.WHOLE:
            return composite.supports(bound, lambda part: self.supports(part, mode))
        return Supported()

    def lower(self, bound: Bound, plan: Any) -> Lowered:
        if bound.spec.name in composite.WHOLE:
            return composite.lower(bound, plan, self.lower)
        right = get(bound.spec.name).reference
        op, make = FAULTS.get(self.fault, ("", None))
        if make is None or op != bound.spec.name or not of_layer_1(bound):
            return right
        return make(right)


def wrong_window_edge(right: Callable[..., Any]) -> Lowered:
    return lambda **values: right(**{**values, "window": values["window"] - 1})


def bf16_accumulation(right: Callable[..., Any]) -> Lowered:
    """Means of blocks, summed in bfloat16."""

    def call(**values: Any) -> Tensor:
        x, block, stride = values["x"], values["block"], values["stride"]
        total = torch.zeros_like(right(**values), dtype=torch.bfloat16)
        count = total.shape[1]
        for i in range(block):
            total += x[:, i : i + (count - 1) * stride + 1 : stride].to(torch.bfloat16)
        return (total / block).to(x.dtype)

    return call


def dropped_block(right: Callable[..., Any]) -> Lowered:
    """The last block that a row selected is forgotten."""

    def call(**values: Any) -> Any:
        ids = values["block_indices"]
        last = (ids >= 0).sum(-1, keepdim=True) - 1
        keep = torch.arange(ids.shape[-1]) != last
        return right(**{**values, "block_indices": torch.where(keep, ids, -1)})

    return call


def scale_forgotten_in_dq(right: Callable[..., Any]) -> Lowered:
    def call(**values: Any) -> Any:
        dq, *rest = right(**values)
        return (dq / values["q"].shape[-1] ** -0.5, *rest)

    return call


def shifted_lse(right: Callable[..., Any]) -> Lowered:
    def call(**values: Any) -> Any:
        o, lse = right(**values)
        return o, lse + 0.01

    return call


def lost_dk(right: Callable[..., Any]) -> Lowered:
    """No gradient where one is promised."""

    def call(**values: Any) -> Any:
        dq, _, dv = right(**values)
        return dq, None, dv

    return call


def nan_in_dead_rows(right: Callable[..., Any]) -> Lowered:
    """The rows that see no compressed block divide by a sum of 0."""

    def call(**values: Any) -> Any:
        o, lse = right(**values)
        return o.masked_fill(lse.isinf()[..., None], torch.nan), lse

    return call


def raises(right: Callable[..., Any]) -> Lowered:
    def call(**values: Any) -> Any:
        raise RuntimeError("out of registers")

    return call


Fault = tuple[str, "Callable[[Callable[..., Any]], Lowered] | None"]
FAULTS: dict[str, Fault] = {
    "window edge": ("sliding_window_attention", wrong_window_edge),
    "bf16 accumulation": ("compress", bf16_accumulation),
    "dropped block": ("selected_attention", dropped_block),
    "scale in dq": ("sliding_window_attention_backward", scale_forgotten_in_dq),
    "lse": ("sliding_window_attention", shifted_lse),
    "lost dk": ("sliding_window_attention_backward", lost_dk),
    "nan in dead rows": ("compressed_attention", nan_in_dead_rows),
    "crash": ("gated_sum", raises),
}
