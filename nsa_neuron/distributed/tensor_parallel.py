"""Tensor parallelism: attention by heads, perceptrons by columns and rows, states by tokens.

Each rank holds whole kv heads with their query heads, or, where there are more ranks than kv heads,
some query heads of one kv head. In that case the ranks of a group project and compress the same
keys and values, and show each other their queries to choose blocks together, for NSA's importance
sums over a group's heads. Parameters become DTensors of the whole shapes, so that a checkpoint does
not depend on the mesh.

With `sequence`, what lies between attention and perceptrons (embedding, norms, the residual
stream) is spread by tokens: the sum behind a layer becomes a reduce-scatter and the next layer's
input an all-gather, which together move what the sum moved. It divides the memory of the states
that are kept for the backward pass, and the gradients of queries, keys and gates are summed once
instead of thrice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from nsa_neuron.distributed.context_parallel import RankAttention, attention_layers, group_of, local
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.nn.attention import AttentionLayer, NativeSparseAttention
from nsa_neuron.nn.model import Block

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from nsa_neuron.nn.config import NsaConfig


def tensor_parallel(
    model: nn.Module, mesh: DeviceMesh, *, sequence: bool = False, whole_logits: bool = True
) -> nn.Module:
    """Spreads a model over the ranks of a mesh.

    Args:
        model: a `ByteLanguageModel`, or a stage, blocks or attention layers of one.
        mesh: of one dimension; its size divides the query heads, and divides the kv heads or is a
            multiple of them.
        sequence: states between attention and perceptrons are spread by tokens, whose number the
            ranks have to divide; for whole sequences, not for steps of a cache. Off: every rank has
            the same ones.
        whole_logits: every rank gets all logits. Off: those of its part of the vocabulary,
            `[B, S, V / ranks]`, for `sharded_loss(..., vocabulary=mesh)`.

    Returns:
        The model, changed.

    Raises:
        InvalidArgument: the heads cannot be spread so, or another mesh.
    """
    group = group_of(mesh, "tensor_parallel")
    if group is None:
        return model
    for layer in attention_layers(model, "tensor_parallel"):
        spread_attention(layer, mesh, sequence)
    states = Shard(1) if sequence else Replicate()
    for module in model.modules():
        if isinstance(module, Block):
            plan: dict[str, ParallelStyle] = {
                "up": ColwiseParallel(input_layouts=states),
                "down": RowwiseParallel(output_layouts=states),
            }
            parallelize_module(module, mesh, plan)
    logits = Replicate() if whole_logits else Shard(-1)
    ends: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=states),
        "head": ColwiseParallel(input_layouts=states, output_layouts=logits),
    }
    # A stage of a pipeline has one of them, or none.
    there = {k: style for k, style in ends.items() if getattr(model, k, None) is not None}
    parallelize_module(model, mesh, there)
    for module in model.modules():
        if isinstance(module, nn.RMSNorm) and not isinstance(module.weight, DTensor):
            _on_dtensors(module, mesh, _tokens if sequence else _replicas)
            if sequence:
                _sum_gradients(module)
    if sequence:
        model.register_forward_pre_hook(_WholeSequences(mesh.size()), with_kwargs=True)
    return model


def check_heads(config: NsaConfig, ranks: int) -> None:
    """Query heads divide by the ranks, and kv heads divide by them or they by kv heads.

    Raises:
        InvalidArgument: they do not.
    """
    if config.heads % ranks:
        expected = f"a divisor of heads = {config.heads}"
        raise InvalidArgument("tensor_parallel", "mesh", f"of {ranks} ranks", expected)
    if config.kv_heads % ranks and ranks % config.kv_heads:
        expected = f"a divisor or a multiple of kv_heads = {config.kv_heads}"
        raise InvalidArgument("tensor_parallel", "mesh", f"of {ranks} ranks", expected)


class _WholeSequences:
    """Refuses calls whose tokens cannot be spread: a hook in front of a model."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def __call__(self, model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        for name, value in (*zip(("step",), args[1:2], strict=False), *named.items()):
            if name in ("step", "last") and value is not None:
                expected = "None: the tokens are spread; use sequence=False for decoding"
                raise InvalidArgument("forward", name, "given", expected)
        tokens = args[0] if args else named["tokens"]
        if not tokens.is_floating_point() and tokens.shape[1] % self.ranks:
            expected = f"a multiple of the {self.ranks} tensor-parallel ranks, or sequence=False"
            raise InvalidArgument("forward", "tokens", f"{tokens.shape[1]} long", expected)


def spread_attention(layer: AttentionLayer, mesh: DeviceMesh, sequence: bool = False) -> None:
    """Spreads one attention layer by its heads; `sequence`: between shards of the tokens."""
    c, ranks = layer.config, mesh.size()
    check_heads(c, ranks)
    if c.phi_per_head and ranks > c.kv_heads:
        expected = f"at most kv_heads = {c.kv_heads} with phi_per_head"
        raise InvalidArgument("tensor_parallel", "mesh", f"of {ranks} ranks", expected)
    shared = ranks > c.kv_heads
    states = Shard(1) if sequence else Replicate()
    plan: dict[str, ParallelStyle] = {
        "q": ColwiseParallel(), "out": RowwiseParallel(output_layouts=states)
    }  # fmt: skip
    if sequence:
        layer.register_forward_pre_hook(partial(_gather_tokens, mesh))
    if shared:
        _own_kv_head(layer, mesh)
    else:
        plan["kv"] = ColwiseParallel()
    for norm in (layer.q_norm, layer.k_norm):
        if norm is not None:
            _on_dtensors(norm, mesh, _heads)
            _sum_gradients(norm)
    if isinstance(layer, NativeSparseAttention):
        plan["gate"] = ColwiseParallel()
        for phi in (layer.phi_k, layer.phi_v):
            _on_dtensors(phi, mesh, _heads, _by_head if c.phi_per_head else None)
            _sum_gradients(phi)
        if shared:
            known = layer.parallel if isinstance(layer.parallel, RankAttention) else RankAttention()
            layer.parallel = replace(known, heads=_same_kv_head(mesh, c.kv_heads))
    parallelize_module(layer, mesh, plan)
    layer.config = replace(c, heads=c.heads // ranks, kv_heads=max(1, c.kv_heads // ranks))


def _own_kv_head(layer: AttentionLayer, mesh: DeviceMesh) -> None:
    """Every rank holds the weights of all kv heads and uses those of one."""
    c = layer.config
    rows = layer.kv.out_features // c.kv_heads
    head = mesh.get_local_rank() // (mesh.size() // c.kv_heads)
    distribute_module(layer.kv, mesh)
    _sum_gradients(layer.kv)

    def project(x: Tensor) -> Tensor:
        known = isinstance(x, DTensor)
        seen = x if known else DTensor.from_local(x, mesh, [Replicate()])
        own = slice(head * rows, (head + 1) * rows)
        bias = None if layer.kv.bias is None else local(layer.kv.bias)[own]
        return F.linear(local(seen), local(layer.kv.weight)[own], bias)

    layer.kv.forward = project  # type: ignore[method-assign, assignment]


def _same_kv_head(mesh: DeviceMesh, kv_heads: int) -> dist.ProcessGroup | None:
    """The ranks that have query heads of this rank's kv head."""
    ranks = dist.get_process_group_ranks(mesh.get_group())
    size = len(ranks) // kv_heads
    first = mesh.get_local_rank() // size * size
    # A device mesh of two dimensions would do the same, but then DTensors had two meshes.
    made: dist.ProcessGroup | None = dist.new_group(
        ranks[first : first + size], use_local_synchronization=True
    )
    return made


def _on_dtensors(
    module: nn.Module,
    mesh: DeviceMesh,
    inputs: Callable[..., tuple[Any, ...]],
    partition: Callable[[str, nn.Module, DeviceMesh], None] | None = None,
) -> None:
    """The module computes on DTensors, its surroundings on local tensors.

    Parameters that `partition` leaves alone are replicated.
    """
    hooks: Any = (inputs, _to_local)  # torch's annotation says that they return nothing
    distribute_module(module, mesh, partition, *hooks)


def _by_head(name: str, phi: nn.Module, mesh: DeviceMesh) -> None:
    """Spreads weights that have a leading axis of kv heads; `pe` has none."""
    for key, p in list(phi.named_parameters(recurse=False)):
        if key != "pe":
            spread = nn.Parameter(distribute_tensor(p.data, mesh, [Shard(0)]))
            phi.register_parameter(key, spread)


def _sum_gradients(module: nn.Module) -> None:
    """Gradients of replicated parameters arrive as each rank's part; they are summed at once."""

    def reduce(p: Tensor) -> None:
        if isinstance(p.grad, DTensor) and isinstance(p, DTensor):
            p.grad = p.grad.redistribute(placements=p.placements)

    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(reduce)


def _heads(phi: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
    """Heads of local keys or values are those of one tensor; offsets are everywhere the same."""
    x, *rest = inputs
    placed = DTensor.from_local(x, mesh, [Shard(2)])
    edges = [r if r is None else DTensor.from_local(r, mesh, [Replicate()]) for r in rest]
    return placed, *edges


def _gather_tokens(mesh: DeviceMesh, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """All tokens, as a DTensor, so that the gradients of its uses are summed before they travel."""
    own = DTensor.from_local(inputs[0], mesh, [Shard(1)])
    return (own.redistribute(placements=[Replicate()]), *inputs[1:])


def _tokens(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
    return (DTensor.from_local(inputs[0], mesh, [Shard(1)]), *inputs[1:])


def _replicas(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
    return (DTensor.from_local(inputs[0], mesh, [Replicate()]), *inputs[1:])


def _to_local(module: nn.Module, outputs: Any, mesh: DeviceMesh) -> Tensor:
    result: Tensor = outputs.to_local()
    return result
