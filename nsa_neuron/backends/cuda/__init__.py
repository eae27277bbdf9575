"""The `cuda` backend: Triton kernels on an NVIDIA GPU, or interpreted on the CPU."""
