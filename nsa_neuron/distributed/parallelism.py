"""All kinds of parallelism together, on one mesh `pp x dp x cp x tp`.

Order matters: heads are spread first (tp), then tokens (cp), then blocks are wrapped for activation
checkpointing, then parameters, gradients and optimizer state are sharded over the data and context
parallel ranks (FSDP2), whose gradients it averages. A pipeline cuts the model into stages before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from nsa_neuron.distributed.context_parallel import context_parallel
from nsa_neuron.distributed.tensor_parallel import tensor_parallel
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.fields import check_rules, check_types
from nsa_neuron.nn.model import Block, run_block
from nsa_neuron.torch_private import flatten_mesh

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True)
class Parallelism:
    """How many ranks share what.

    Attributes:
        pp: stages of a pipeline. dp: parts of the batch. cp: parts of each sequence. tp: parts of
            the heads.
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        check_rules(self, ((name, getattr(self, name) >= 1, "at least 1") for name in AXES))

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def averaging(self) -> int:
        """Ranks that average gradients."""
        return self.dp * self.cp

    def mesh(self, device: str = "cpu") -> DeviceMesh:
        """The mesh of all ranks; neighbours share heads, then tokens.

        Raises:
            InvalidArgument: another number of processes runs.
        """
        world = dist.get_world_size()
        if world != self.ranks:
            found = " x ".join(f"{name} {getattr(self, name)}" for name in AXES)
            expected = f"{world} ranks, as many as run"
            raise InvalidArgument("Parallelism", "mesh", f"{found} = {self.ranks} ranks", expected)
        shape = tuple(getattr(self, name) for name in AXES)
        return init_device_mesh(device, shape, mesh_dim_names=AXES)


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    fetch: str = "auto",
    replay: bool = False,
    dtype: torch.dtype | None = None,
    sequence: bool = False,
    whole_logits: bool = True,
) -> nn.Module:
    """Spreads a model, or a stage of one, over the ranks of a mesh.

    Args:
        model: a `ByteLanguageModel` or a `Stage`, the same on every rank that shares it.
        mesh: with dimensions `dp`, `cp` and `tp`, as `Parallelism.mesh` makes it.
        fetch: how context parallelism fetches selected keys.
        replay: activation checkpointing: blocks are run again in the backward pass.
        dtype: that parameters are cast to for computing; gradients are reduced in float32. None:
            their own. Ignored where nothing is sharded.
        sequence, whole_logits: of tensor parallelism, see `tensor_parallel`.

    Returns:
        The model.
    """
    tensor_parallel(model, mesh["tp"], sequence=sequence, whole_logits=whole_logits)
    if mesh["cp"].size() > 1:
        context_parallel(model, mesh["cp"], fetch)
    if replay:
        model.run_block = replayed  # type: ignore[assignment]
    if mesh["dp"].size() * mesh["cp"].size() == 1:
        return model
    ranks = flatten_mesh(mesh["dp", "cp"], "dp_cp")
    policy = MixedPrecisionPolicy()
    if dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=ranks, mp_policy=policy)
    fully_shard(model, mesh=ranks, mp_policy=policy)
    return model


def replayed(block: nn.Module, x: Tensor, cu_seqlens: Tensor | None, step: Any) -> Tensor:
    """Runs a block and keeps only its input."""
    made: Tensor = checkpoint(run_block, block, x, cu_seqlens, step, use_reentrant=False)
    return made
