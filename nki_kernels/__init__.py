"""NSA's operations as NKI kernels; nothing here imports the rest of nsa-neuron."""

DISTRIBUTION = "nsa-neuron"  # another package of this name would lack it, and is refused
