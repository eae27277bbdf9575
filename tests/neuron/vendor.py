"""A stand-in of what AWS documents of `torch_neuronx`, with our simulator behind it.

Written from "How to work with NKI kernels from torch-neuronx" (SDK 2.33) and what users of it show:
`wrap_nki(kernel)[lnc](...)` runs a kernel, whose non-tensor arguments are build-time constants;
with fake tensors it gives the results' shapes. `nki_op(name, fn)` makes an operator with the schema
of fn's type hints, whose fake is fn itself. That our side agrees with this is all that a test with
it shows.
"""

from __future__ import annotations

import importlib.machinery
import itertools
import types
import warnings
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from nsa_neuron import simulator


class Wrapped:
    """What `wrap_nki(kernel)` and its `[lnc]` give; notes what was run."""

    def __init__(self, kernel: Any, module: StandIn, lnc: int = 1) -> None:
        assert not hasattr(kernel, "runs"), "wrap_nki takes the kernel, not a launch of it"
        self.kernel, self.module, self.lnc = kernel, module, lnc

    def __getitem__(self, lnc: int) -> Wrapped:
        return Wrapped(self.kernel, self.module, lnc)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            assert isinstance(value, torch.Tensor) or hash(value) is not None  # hashed constants
        self.module.launches.append((self.kernel.fn.__module__, self.kernel.fn.__name__, self.lnc))
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if not isinstance(tensors[0], FakeTensor):
            return simulator.simulate(self.kernel[self.lnc])(*args, **kwargs)
        shapes = [
            simulator.ShapeDtype(tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else x
            for x in args
        ]
        # The number of turns of a loop does not change the shapes of results; a loop whose
        # condition is loaded anew each turn ends at the next 0.
        turns = itertools.cycle((1, 0))
        traced = simulator.simulate(
            self.kernel[self.lnc], data=False, unknown=lambda _: next(turns)
        )
        with warnings.catch_warnings():
            # The turns that are made up here differ between the cores.
            warnings.simplefilter("ignore", simulator.SimulationWarning)
            found = traced(*shapes, **kwargs)
        results = found if isinstance(found, tuple) else (found,)
        made = [tensors[0].new_empty(x.shape, dtype=getattr(torch, x.dtype.name)) for x in results]
        return tuple(made) if isinstance(found, tuple) else made[0]


class StandIn(types.ModuleType):
    """The module `torch_neuronx`.

    Attributes:
        launches: (module, kernel, lnc) of every kernel that was run.
        operators: names that were registered.
    """

    def __init__(self) -> None:
        super().__init__("torch_neuronx")
        self.__spec__ = importlib.machinery.ModuleSpec("torch_neuronx", None)
        self.launches: list[tuple[str, str, int]] = []
        self.operators: list[str] = []

    def wrap_nki(self, kernel: Any) -> Wrapped:
        return Wrapped(kernel, self)

    def nki_op(self, name: str, fn: Any, mutates_args: Any = ()) -> Any:
        made = torch.library.custom_op(name, fn, mutates_args=tuple(mutates_args))
        made.register_fake(fn)
        self.operators.append(name)
        return made
