"""`nki.meta.tensor`: annotation of an HBM argument."""

from .typing import tensor

__all__ = ["tensor"]
