"""Context parallelism of a model: each rank holds a contiguous part of every sequence's tokens.

    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))
    context_parallel(model, mesh)
    tokens, targets = shard_tokens(tokens, mesh)
    loss = sharded_loss(model(tokens), targets, ranks=4, counted=...)

Everything but attention is a function of single tokens, so only the attention layers change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.parallel import loss_parallel

from nsa_neuron.distributed.context import FETCHES
from nsa_neuron.distributed.context_op import WEIGHTS, context_attention
from nsa_neuron.distributed.exchange import gather
from nsa_neuron.distributed.softmax_op import context_softmax
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.nn.attention import AttentionLayer, NativeSparseAttention, SoftmaxAttention
from nsa_neuron.nn.rotary import token_positions

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class RankAttention:
    """Attention of the own tokens and heads: what `AttentionLayer.parallel` is.

    Attributes:
        context: ranks that share the tokens; None: this rank has them all.
        heads: ranks that share a kv head, for its query heads are spread; None: no others.
        fetch: how selected keys are fetched, see `context_attention`.
        rank, world: this one's place among those that share the tokens.
        names: of the two groups, as ops take them; empty for None.
    """

    context: dist.ProcessGroup | None = None
    heads: dist.ProcessGroup | None = None
    fetch: str = "auto"
    rank: int = field(init=False)
    world: int = field(init=False)
    names: tuple[str, str] = field(init=False)

    def __post_init__(self) -> None:
        # Plain values, so that torch.compile looks into no process group.
        rank, world = _place(self.context)
        values = {"rank": rank, "world": world, "names": (_name(self.context), _name(self.heads))}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def positions(self, tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
        """Of the own tokens in their sequences, `[tokens]` int64."""
        first = self.rank * tokens
        if cu_seqlens is None:
            return torch.arange(first, first + tokens, device=device)
        return token_positions(self.world * tokens, cu_seqlens, device)[first : first + tokens]

    def nsa(self, layer: NativeSparseAttention, given: Mapping[str, Any], step: Any) -> Tensor:
        """o `[B, C, Hq, Dv]` of the own tokens."""
        c = layer.config
        if step is not None and self.context is None:  # `ContextCache` gets them by itself
            step.store_blocks(*layer.compress(given["k_raw"], given["v_raw"]))
        names = ("q", "k_raw", "v_raw", "k_slc", "v_slc", "k_win", "v_win", "gates")
        dtype = given["k_raw"].dtype
        both = (*layer.phi_k.weights(), *layer.phi_v.weights())
        weights = [None if w is None else local(w.to(dtype)) for w in both]
        assert len(weights) == len(WEIGHTS)
        g = c.geometry
        return context_attention(
            *(given[name] for name in names), *weights, given["cu_seqlens"],
            c.phi, g["block"], g["stride"], g["select_block"], g["num_selected"],
            g["num_initial"], g["num_local"], g["window"], None,
            0.0 if c.rope == "before" else layer.rope_base,
            *self.names, self.fetch,
        )  # fmt: skip

    def softmax(
        self, layer: SoftmaxAttention, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None
    ) -> Tensor:
        """o of full or windowed attention."""
        window = layer.config.window if layer.windowed else 0
        return context_softmax(q, k, v, cu_seqlens, window, self.names[0])

    def decode(self, layer: NativeSparseAttention, step: Any, q: Tensor, gates: Tensor) -> Tensor:
        """o of a later step: the heads of a group are decoded together, for they choose together
        and read the same keys; a rank keeps its own."""
        if self.heads is None:
            o: Tensor = step.attend(q, gates, layer.config.geometry)
            return o
        own = q.shape[2]
        q_all, gates_all = (torch.cat(gather(self.heads, x, "group"), 2) for x in (q, gates))
        o = step.attend(q_all, gates_all, layer.config.geometry)
        rank = self.heads.rank()
        return o[:, :, rank * own : (rank + 1) * own]


def context_parallel(model: nn.Module, mesh: DeviceMesh, fetch: str = "auto") -> nn.Module:
    """Makes a model take the own part of every sequence.

    Args:
        model: with attention layers of `nsa_neuron.nn`, of ours or Hugging Face's.
        mesh: of one dimension: the ranks that share the tokens.
        fetch: how selected keys are fetched: `gather`, `blocks`, or `auto`, what moves less.

    Returns:
        The model.

    Raises:
        InvalidArgument: another mesh, no such layers, or an unknown `fetch`.
    """
    if fetch not in FETCHES:
        raise InvalidArgument(
            "context_parallel", "fetch", repr(fetch), f"one of {', '.join(FETCHES)}"
        )
    group = group_of(mesh, "context_parallel")
    for layer in attention_layers(model, "context_parallel"):
        known = layer.parallel if isinstance(layer.parallel, RankAttention) else RankAttention()
        layer.parallel = replace(known, context=group, fetch=fetch)
    return model


def shard(x: Tensor, mesh: DeviceMesh, dim: int = 1) -> Tensor:
    """This rank's contiguous part of a tensor.

    Raises:
        InvalidArgument: the ranks do not divide it.
    """
    rank, world = _place(group_of(mesh, "shard"))
    if x.shape[dim] % world:
        expected = f"a multiple of the {world} ranks; pad it"
        raise InvalidArgument("shard", "x", f"{x.shape[dim]} tokens long", expected)
    return x.chunk(world, dim)[rank]


def shard_tokens(
    tokens: Tensor, mesh: DeviceMesh, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The own tokens and their next tokens, over borders between ranks too.

    Args:
        tokens: `[B, T]`, the same on every rank of the mesh.
        mesh: of one dimension.
        cu_seqlens: offsets of packed sequences, whose last tokens have no next one.

    Returns:
        Two `[B, T / ranks]`; -100 where there is no next token.

    Raises:
        InvalidArgument: the ranks do not divide T.
    """
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
    if cu_seqlens is not None:
        targets[:, cu_seqlens[1:].long() - 1] = -100
    return shard(tokens, mesh), shard(targets, mesh)


def sharded_loss(
    logits: Tensor,
    targets: Tensor,
    ranks: int,
    counted: int,
    vocabulary: DeviceMesh | None = None,
) -> Tensor:
    """This rank's share of the mean cross-entropy, times the ranks that average gradients.

    The mean of the results over all ranks is the loss of the whole batch, and the mean of their
    gradients (what FSDP and DDP make) is its gradient.

    Args:
        logits: `[B, C, V]`. targets: `[B, C]`, -100 where there is none.
        ranks: data and context parallel ranks together.
        counted: targets of all of them.
        vocabulary: the tensor-parallel ranks, if each has the logits of its part of the vocabulary
            only, as `tensor_parallel(..., whole_logits=False)` gives them. The loss is the same on
            each; three numbers per token are exchanged.
    """
    flat = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    if vocabulary is None or vocabulary.size() == 1:
        total = F.cross_entropy(flat, targets.flatten(), reduction="sum")
    else:
        spread: Any = _SpreadCrossEntropy  # torch's `apply` has no annotations
        total = spread.apply(flat, targets.flatten(), vocabulary)
    return total * (ranks / counted)


class _SpreadCrossEntropy(torch.autograd.Function):
    """The sum of cross-entropies of logits `[N, V / ranks]`.

    torch's `loss_parallel` wants the backward pass inside its context, which neither a pipeline's
    schedule nor a user's `loss.backward()` can be asked to know: the gradient is made at once.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, mesh: DeviceMesh) -> Tensor:
        with torch.enable_grad(), loss_parallel():
            leaf = logits.detach().requires_grad_()
            spread = DTensor.from_local(leaf, mesh, [Shard(1)])
            summed: Any = F.cross_entropy(spread, targets, reduction="sum")
            total = summed.to_local()
            if ctx.needs_input_grad[0]:
                ctx.save_for_backward(*torch.autograd.grad(total, leaf))
        made: Tensor = total.detach()
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (made,) = ctx.saved_tensors
        return made * grad, None, None


def attention_layers(model: nn.Module, op: str) -> list[AttentionLayer]:
    """The attention layers of a model.

    Raises:
        InvalidArgument: there is none.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, AttentionLayer)]
    if not layers:
        raise InvalidArgument(op, "model", "without attention layers", "with at least one")
    return layers


def group_of(mesh: DeviceMesh, op: str) -> dist.ProcessGroup | None:
    """The process group of a mesh of one dimension; None: one rank.

    Raises:
        InvalidArgument: more dimensions.
    """
    if mesh.ndim != 1:
        raise InvalidArgument(op, "mesh", f"of {mesh.ndim} dimensions", "of one")
    return mesh.get_group() if mesh.size() > 1 else None


def local(parameter: Tensor) -> Tensor:
    """The own part of a parameter; gradients of a replicated one are summed over the mesh."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(
        grad_placements=[Partial() if p.is_replicate() else p for p in parameter.placements]
    )


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank(), group.size())


def _name(group: dist.ProcessGroup | None) -> str:
    return "" if group is None else str(group.group_name)
