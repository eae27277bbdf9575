"""NSA over many accelerators, on `torch.distributed`. Importing this registers sharding rules."""

from nsa_neuron.distributed.context_parallel import (
    context_parallel,
    shard,
    shard_tokens,
    sharded_loss,
)
from nsa_neuron.distributed.exchange import RankFailure, RanksDiffer, counting
from nsa_neuron.distributed.sharding import register
from nsa_neuron.distributed.tensor_parallel import tensor_parallel

register()

__all__ = [
    "RankFailure",
    "RanksDiffer",
    "context_parallel",
    "counting",
    "shard",
    "shard_tokens",
    "sharded_loss",
    "tensor_parallel",
]
