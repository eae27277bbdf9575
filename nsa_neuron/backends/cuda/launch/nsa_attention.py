"""The backward pass of `nsa_attention`: its parts, with what they share computed once.

Against parts that know nothing of each other it saves the branches' deltas (in registers during the
gated sum's backward) and the float32 copies of three gradients of q.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nsa_neuron.backends.cuda.launch import gated_sum
from nsa_neuron.ops.nsa_attention import BRANCHES, Eight, branch_gradients

if TYPE_CHECKING:
    from nsa_neuron.backends.cuda.launch.common import Plan


def backward(
    kernels: Any, plan: Plan, parts: Mapping[str, Callable[..., Any]], **values: Any
) -> Eight:
    """Gradients as `nsa_neuron.ops.nsa_attention.compose_backward` gives them.

    Args:
        kernels, plan: of `gated_sum`.
        parts: launchers of the branches' backward ops by name; they take `delta`.
        values: the arguments of `nsa_attention_backward`.
    """
    outputs = tuple(values[f"o_{name}"] for name in BRANCHES)
    lses = tuple(values[f"lse_{name}"] for name in BRANCHES)
    grads, deltas = gated_sum.backward_with_deltas(
        kernels, plan, values["grad_o"], outputs, values["gates"], lses
    )
    extra = {name: {"delta": delta} for name, delta in zip(BRANCHES, deltas, strict=True)}
    compressed, chosen, near = branch_gradients(parts.__getitem__, values, grads[:3], extra)
    dq = gated_sum.add(kernels, plan, compressed[0], chosen[0], near[0])
    return dq, *compressed[1:], *chosen[1:], *near[1:], grads[3]
