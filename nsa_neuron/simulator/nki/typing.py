"""Annotations of kernel arguments: `nt.tensor`, `nt.tensor[128, 512]`, `nki.dtype`."""

from typing import Any


class _Tensor:
    """Annotation of an HBM argument; a shape in brackets is documentation only."""

    def __getitem__(self, shape: Any) -> "_Tensor":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> "_Tensor":
        return self

    def __repr__(self) -> str:
        return "nki.tensor"


tensor = mutable_tensor = _Tensor()
dtype = str
