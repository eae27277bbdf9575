"""Kernels that come with the simulator: those behind published figures, and the bench's."""
