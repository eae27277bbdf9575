"""Torch-side launchers of the Triton kernels, one module per op."""
