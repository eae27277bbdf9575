"""NSA over many accelerators, on `torch.distributed`. Importing this registers sharding rules."""

from nsa_neuron.distributed.sharding import register

register()
