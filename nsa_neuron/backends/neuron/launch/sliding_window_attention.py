"""Launches `nki_kernels/sliding_window_attention.py`: `attention` of the last keys."""

from nsa_neuron.backends.neuron.launch.attention import backward, forward

__all__ = ["backward", "forward"]
