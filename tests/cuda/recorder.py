"""Stands in for a module of kernels: records launches where nothing can be launched.

Launchers get tensors on torch's `meta` device (shapes, strides and dtypes, no memory), so a million
tokens in a batch of 64 cost nothing; mixing in a tensor of another device raises, and so does
reading a value, for which a GPU would have to be waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_neuron.toolchain import KernelPackage

OPTIONS = ("num_warps", "num_stages")
PACKAGE = KernelPackage("cuda_kernels")


@dataclass(frozen=True)
class Launch:
    """One launch: kernel function, grid, and arguments by name, constants included."""

    function: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return self.function.__name__


@dataclass
class Kernels:
    """A module of `cuda_kernels` whose kernels record what they are called with."""

    stem: str
    launches: list[Launch] = field(default_factory=list)

    def __getattr__(self, name: str) -> _Kernel:
        return _Kernel(getattr(PACKAGE.load(self.stem), name), self.launches)


@dataclass(frozen=True)
class _Kernel:
    function: Any
    launches: list[Launch]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*values: Any, **named: Any) -> None:
            names = self.function.arg_names
            assert len(values) <= len(names), f"{len(values)} arguments for {names}"
            arguments = dict(zip(names, values, strict=False))
            named = {name: value for name, value in named.items() if name not in OPTIONS}
            assert not arguments.keys() & named.keys(), "an argument is given twice"
            assert named.keys() <= set(names), f"unknown: {named.keys() - set(names)}"
            arguments |= named
            assert arguments.keys() == set(names), f"missing: {set(names) - arguments.keys()}"
            self.launches.append(Launch(self.function, grid, arguments))

        return launch


class Memory(TorchDispatchMode):
    """Counts the bytes of all storages that live at a time. `peak`: the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {k: (r, n) for k, (r, n) in self.alive.items() if not r.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
