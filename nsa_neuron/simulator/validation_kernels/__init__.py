"""Kernels behind published Trainium2 figures, rewritten to the same tiling for `--validate`."""
